"""The atoms of what was retrieved: those that are there, and those that are computed, or stored, as they are met.

Where a hit has no atom, one of an older text, or a damaged one, `on_missing`, `on_stale` and `on_damaged` say what
happens; a bank can fill by use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC, get_codec
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.stores.base import PointId
from regrad_qdrant.errors import BankError, DataError, RecordError, RegradError, StaleAtomError
from regrad_qdrant.model.gradients import BATCH_TOKENS, EncodedDocument, GradientComputer

COUNTED = 100_000  # points without an atom whose retrievals are counted
OnStale = Literal["skip", "recompute", "refuse"]
OnDamaged = Literal["skip", "recompute", "refuse"]
OnMissing = Literal["skip", "compute", "store"]


@dataclass(frozen=True)
class Usable:
    """The documents of one question whose atoms can be applied, and what is to be said of the others."""

    hits: list[Hit]
    notes: list[str]
    skipped: dict[PointId, str]  # of the others, why


@dataclass(frozen=True)
class FillPolicy:
    """What happens to hits whose atom is missing or stale; the fields are options of `ReGrad`.

    Raises:
        RegradError: for an option that is none.
    """

    on_stale: OnStale = "skip"
    on_missing: OnMissing = "skip"
    store_after: int = 1
    codec: str = DEFAULT_CODEC
    on_damaged: OnDamaged = "skip"

    def __post_init__(self) -> None:
        for name, kind in {"on_stale": OnStale, "on_missing": OnMissing, "on_damaged": OnDamaged}.items():
            if (chosen := getattr(self, name)) not in get_args(kind):
                raise RegradError(f"{name} {chosen!r} is not one of {', '.join(get_args(kind))}")
        if self.store_after < 1:
            raise RegradError(f"store_after must be at least 1, not {self.store_after}")
        get_codec(self.codec)


class Filling:
    """Gives each hit its atom, as far as it has one or gets one.

    Args:
        gradients: computes atoms with the adapter's own model.
    """

    def __init__(self, bank: GradientBank, adapter: Adapter, gradients: GradientComputer, policy: FillPolicy) -> None:
        self.bank, self.adapter, self.gradients, self.policy = bank, adapter, gradients, policy
        self._prepared = False
        self._retrieved: dict[PointId, int] = {}  # of points without an atom, how often; the latest last

    def usable(self, found: Sequence[Sequence[Hit]], online: Sequence[bool]) -> list[Usable]:
        """For each question its hits that have an atom of their present text, and what is to be said of the others;
        what is to be computed is computed for all questions together.

        Args:
            found: the hits of each question.
            online: of each question, whether all its atoms are computed anew and none is read or stored.

        Raises:
            RecordError: one of its kinds, where the policy refuses a stale or a damaged atom.
        """
        pairs = list(zip(found, online, strict=True))
        anew = {hit.id: hit for hits, is_online in pairs for hit in hits if is_online}
        lacking = {hit.id: hit for hits, is_online in pairs for hit in hits if not is_online and self._to_compute(hit)}
        computed, refused = self._computed(list((anew | lacking).values()))
        unstored: dict[PointId, str] = {}
        if self.policy.on_missing == "store":
            new = [(hit, record) for hit, record in computed if hit.id in lacking and _lack(hit) == MISSING]
            if due := [(hit, record) for hit, record in new if self._is_due(hit.id)]:
                unstored = self._stored(due)
        fresh = {hit.id: record for hit, record in computed}
        usable = []
        for hits, is_online in pairs:
            ours = anew if is_online else lacking
            judged = []
            for hit in hits:
                whole = replace(hit, record=fresh.get(hit.id), damaged=None) if hit.id in ours else hit
                lack = refused.get(hit.id) if whole.record is None and hit.id in ours else _lack(whole)
                judged.append((whole, lack))
            ready = _sorted_out(judged)
            lost = dict.fromkeys(unstored[hit.id] for hit in hits if not is_online and hit.id in unstored)
            usable.append(replace(ready, notes=[*ready.notes, *lost]))
        return usable

    def _stored(self, due: Sequence[tuple[Hit, Record]]) -> dict[PointId, str]:
        """Store these atoms; where that fails, what is to be said of each: the answer has its atoms all the same."""
        try:
            if not self._prepared:
                self.bank.index()  # and the sidecar, where there is to be one
                self.bank.describe(self.adapter.space)
                self._prepared = True
            self.bank.put(due, replace=False)
        except BankError as error:
            return {hit.id: f"atoms were computed and could not be stored: {error}" for hit, _ in due}
        return {}

    def _to_compute(self, hit: Hit) -> bool:
        """Whether a hit's atom is to be computed for this query."""
        lack = _lack(hit)
        if lack is None:
            return False
        if lack == MISSING:
            return self.policy.on_missing != "skip"
        if lack == STALE:
            if self.policy.on_stale == "refuse":
                raise StaleAtomError(
                    f"the text of point {hit.id!r} has changed since its atom was computed: ingest again"
                )
            return self.policy.on_stale == "recompute"
        if self.policy.on_damaged == "refuse":
            raise RecordError(f"point {hit.id!r}: {hit.damaged}")
        return self.policy.on_damaged == "recompute"

    def _is_due(self, key: PointId) -> bool:
        """Counts one more retrieval of a point without an atom; whether it is time to store one."""
        count = self._retrieved.pop(key, 0) + 1
        if count >= self.policy.store_after:
            return True
        self._retrieved[key] = count
        if len(self._retrieved) > COUNTED:
            del self._retrieved[next(iter(self._retrieved))]
        return False

    def _computed(self, hits: Sequence[Hit]) -> tuple[list[tuple[Hit, Record]], dict[PointId, str]]:
        """The atoms of the hits' texts, coded as ingestion codes them; and of those that can have none, why."""
        encoded: list[tuple[Hit, list[EncodedDocument]]] = []
        refused: dict[PointId, str] = {}
        for hit in hits:
            try:
                encoded.append((hit, self.gradients.windows(hit.text)))
            except DataError as error:
                refused[hit.id] = f"can have no atom: {error}"
        if not encoded:
            return [], refused
        flat = self.gradients.atoms_in_batches([window for _, windows in encoded for window in windows], BATCH_TOKENS)
        kept: list[Hit] = []
        spans: list[list[tuple[int, int]]] = []
        finite: list[bool] = []
        for (hit, windows), atoms in zip(encoded, flat.split([len(windows) for _, windows in encoded]), strict=True):
            good = bool(atoms.isfinite().all())
            finite += [good] * len(windows)
            if good:
                kept.append(hit)
                spans.append([window.span for window in windows])
            else:
                refused[hit.id] = "can have no atom: its gradient is not finite"
        if not kept:
            return [], refused
        texts, layout = [hit.text for hit in kept], self.adapter.space.layout
        records = make_records(flat[finite], texts, self.bank.space, self.policy.codec, layout, spans)
        return list(zip(kept, records, strict=True)), refused


INGEST = "run regrad-qdrant ingest --from-collection NAME"
MISSING = f"has no atom of this initialization: {INGEST} with the --init and --payload-key of the question"
STALE = f"has changed since its atom was computed: skipped; {INGEST}"
NONE_USABLE = "none of the retrieved documents has a usable atom: answering without, with φ₀ alone"


def as_stored(hits: Sequence[Hit]) -> Usable:
    """The hits whose stored atoms can be applied, where no model is at hand that could compute others."""
    return _sorted_out([(hit, _lack(hit)) for hit in hits])


def _sorted_out(judged: Sequence[tuple[Hit, str | None]]) -> Usable:
    """Hits, each with what it lacks."""
    left_out = dict[str, list[Hit]]()
    for hit, lack in judged:
        if lack is not None:
            left_out.setdefault(lack, []).append(hit)
    skipped = {hit.id: lack for lack, of in left_out.items() for hit in of}
    kept = [hit for hit, lack in judged if lack is None]
    return Usable(kept, [_note(lack, of) for lack, of in left_out.items()], skipped)


def _lack(hit: Hit) -> str | None:
    """What a hit lacks to be applied; None where it lacks nothing."""
    if hit.damaged is not None:
        return f"has a damaged atom ({hit.damaged}): skipped; remove its key from the payload and {INGEST}"
    if hit.record is None:
        return MISSING
    return STALE if hit.stale else None


def _note(lack: str, hits: Sequence[Hit]) -> str:
    """One sentence for all hits that lack the same."""
    named = ", ".join(repr(hit.document_id) for hit in hits[:3])
    others = f" and {len(hits) - 3} more" if len(hits) > 3 else ""
    return f"{'document' if len(hits) == 1 else 'each of the documents'} {named}{others} {lack}"
