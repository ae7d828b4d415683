"""The atoms of what was retrieved: those that are there, and those that are computed, or stored, as they are met.

Where a hit has no atom, or one of an older text, `on_missing` and `on_stale` say what happens; a bank can fill by use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC, get_codec
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.stores.base import PointId
from regrad_qdrant.errors import DataError, RegradError, StaleAtomError
from regrad_qdrant.model.gradients import BATCH_TOKENS, EncodedDocument, GradientComputer

COUNTED = 100_000  # points without an atom whose retrievals are counted
OnStale = Literal["skip", "recompute", "refuse"]
OnMissing = Literal["skip", "compute", "store"]


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

    def __post_init__(self) -> None:
        if self.on_stale not in get_args(OnStale):
            raise RegradError(f"on_stale {self.on_stale!r} is not one of {', '.join(get_args(OnStale))}")
        if self.on_missing not in get_args(OnMissing):
            raise RegradError(f"on_missing {self.on_missing!r} is not one of {', '.join(get_args(OnMissing))}")
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
        self._retrieved: dict[PointId, int] = {}  # of points without an atom, how often; the latest last

    def usable(self, found: Sequence[Sequence[Hit]], online: Sequence[bool]) -> list[list[Hit]]:
        """For each question its hits that have an atom of their present text; what is to be computed is computed for
        all questions together.

        Args:
            found: the hits of each question.
            online: of each question, whether all its atoms are computed anew and none is read or stored.
        """
        pairs = list(zip(found, online, strict=True))
        anew = {hit.id: hit for hits, is_online in pairs for hit in hits if is_online}
        lacking = {hit.id: hit for hits, is_online in pairs for hit in hits if not is_online and self._to_compute(hit)}
        computed = self._computed(list((anew | lacking).values()))
        if self.policy.on_missing == "store":
            new = [(hit, record) for hit, record in computed if hit.id in lacking and hit.record is None]
            self.bank.put([(hit, record) for hit, record in new if self._is_due(hit.id)], replace=False)
        fresh = {hit.id: record for hit, record in computed}
        kept = []
        for hits, is_online in pairs:
            ours = anew if is_online else lacking
            candidates = [replace(hit, record=fresh.get(hit.id)) if hit.id in ours else hit for hit in hits]
            kept.append([hit for hit in candidates if hit.record is not None and not hit.stale])
            if hits and not kept[-1]:
                warnings.warn(
                    "none of the retrieved documents has a usable atom: answering with φ₀ alone", stacklevel=5
                )
        return kept

    def _to_compute(self, hit: Hit) -> bool:
        """Whether a hit's atom is to be computed for this query; warns where it is to be left out."""
        if hit.record is None:
            if self.policy.on_missing == "skip":
                warnings.warn(
                    f"point {hit.id!r} has no atom of space {self.bank.space}: run regrad-qdrant ingest", stacklevel=6
                )
            return self.policy.on_missing != "skip"
        if hit.stale and self.policy.on_stale == "refuse":
            raise StaleAtomError(f"the text of point {hit.id!r} has changed since its atom was computed: ingest again")
        if hit.stale and self.policy.on_stale == "skip":
            warnings.warn(
                f"the text of point {hit.id!r} has changed since its atom was computed: skipped", stacklevel=6
            )
        return hit.stale and self.policy.on_stale == "recompute"

    def _is_due(self, key: PointId) -> bool:
        """Counts one more retrieval of a point without an atom; whether it is time to store one."""
        count = self._retrieved.pop(key, 0) + 1
        if count >= self.policy.store_after:
            return True
        self._retrieved[key] = count
        if len(self._retrieved) > COUNTED:
            del self._retrieved[next(iter(self._retrieved))]
        return False

    def _computed(self, hits: Sequence[Hit]) -> list[tuple[Hit, Record]]:
        """The atoms of the hits' texts, coded as ingestion codes them."""
        encoded: list[tuple[Hit, EncodedDocument]] = []
        for hit in hits:
            try:
                encoded.append((hit, self.gradients.encode(hit.text)))
            except DataError as error:
                warnings.warn(f"point {hit.id!r} can have no atom: {error}", stacklevel=7)
        if not encoded:
            return []
        with self.adapter.initial():
            flat = self.gradients.atoms_in_batches([document for _, document in encoded], BATCH_TOKENS)
        finite = flat.isfinite().all(dim=1)
        kept = [hit for (hit, _), good in zip(encoded, finite.tolist(), strict=True) if good]
        records = make_records(
            flat[finite], [hit.text for hit in kept], self.bank.space, self.policy.codec, self.adapter.space.layout
        )
        return list(zip(kept, records, strict=True))
