"""The upkeep of a bank: what it holds, a coarser codec for it, and its end."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.codecs.registry import CODECS, get_codec
from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.collection import PAGE, AtomCollection
from regrad_qdrant.bank.stores.base import (
    PayloadWrite,
    PointId,
    bounded,
    json_bytes,
    pages,
)
from regrad_qdrant.errors import RecordError

STATUS_SAMPLE = 1000  # atoms whose size `status` measures


@dataclass(frozen=True)
class BankStatus:
    """What `status` found; bytes are those of the record's JSON as it stands in the payload."""

    points: int
    atoms: int  # stale and damaged ones among them
    missing: int  # points with a text and no atom
    stale: int
    space: str
    codec: str | None
    bytes_median: int | None
    bytes_max: int | None
    without_text: int = 0  # points that can have no atom
    damaged: int = 0  # values under the bank's key that are no usable records
    orphans: int = 0  # atoms in the sidecar whose document is gone

    def as_dict(self) -> dict[str, Any]:
        return {
            "points": self.points,
            "atoms": self.atoms,
            "missing": self.missing,
            "stale": self.stale,
            "space": self.space,
            "codec": self.codec,
            "bytes_per_atom": {"median": self.bytes_median, "max": self.bytes_max},
            "without_text": self.without_text,
            "damaged": self.damaged,
            "orphans": self.orphans,
        }


@dataclass
class RecodeReport:
    """What `recode` did."""

    recoded: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # point id → why its atom could not be read


def status(bank: AtomCollection) -> BankStatus:
    """Counts of points and atoms, and the atoms' sizes (of the first thousand).

    Every text is read once, and no atom but those whose size is taken.
    """
    states: Counter[str] = Counter(
        "without text" if state == "missing" and not hit.text else state for state, hit in bank.surveyed()
    )
    sizes: list[int] = []
    codecs: set[str] = set()
    atoms = states["current"] + states["stale"] + states["damaged"]
    if atoms:
        for point in itertools.islice(bank.in_this_space([bank.payload_key], page=32), STATUS_SAMPLE):
            value = point.payload[bank.payload_key]
            sizes.append(json_bytes(value))
            codecs.add(str(value.get("codec")))
    return BankStatus(
        points=states.total(),
        atoms=atoms,
        missing=states["missing"] + states["gone"],
        stale=states["stale"],
        space=bank.space,
        codec=", ".join(sorted(codecs)) or None,
        bytes_median=int(statistics.median(sizes)) if sizes else None,
        bytes_max=max(sizes) if sizes else None,
        without_text=states["without text"],
        damaged=states["damaged"],
        orphans=sum(1 for _ in bank.orphans()),
    )


def recode(
    bank: AtomCollection, codec: str, layout: AtomLayout, on_progress: Callable[[int], None] = lambda _: None
) -> RecodeReport:
    """Bring this space's atoms to a coarser codec, in place and without the model.

    Resumable: atoms that are in the codec already, or in one as coarse, are not read. A damaged atom stays as
    it is and is named in the report.

    Args:
        layout: of the space's atoms.
        on_progress: called with the number of atoms just dealt with.
    """
    wanted = get_codec(codec)
    report = RecodeReport()
    finer = finer_codecs(codec, layout)
    page = max(1, min(PAGE, bank.max_request_bytes // (8 * layout.numel)))  # an atom is at most fp32 in base64
    for ids in pages(_with_codec(bank, finer), page):
        points = bank.atoms.retrieve(ids, [bank.payload_key])
        writes: list[tuple[PayloadWrite, int]] = []
        for point in points:
            if not bank.belongs(point):  # gone, though the index still has it
                continue
            try:
                old = Record.from_payload(point.payload[bank.payload_key])
                value = {bank.payload_key: old.recoded(wanted.name, bank.space, layout).to_payload()}
                same = {f"{bank.payload_key}.{name}": part for name, part in (("sha", old.sha), ("codec", old.codec))}
                writes.append((PayloadWrite(point.id, value, same), json_bytes(value)))
            except RecordError as error:
                report.failed[str(point.id)] = str(error)
        for batch in bounded(bank.max_request_bytes, writes, lambda write: write.id):
            bank.atoms.set_payload(batch)
            report.recoded += len(batch)
        on_progress(len(ids))
    return report


def finer_codecs(codec: str, layout: AtomLayout) -> set[str]:
    """The codecs in which an atom takes more bytes than in this one."""
    size = get_codec(codec).size(layout)
    return {name for name, other in CODECS.items() if other.size(layout) > size}


def count_finer(bank: AtomCollection, codec: str, layout: AtomLayout) -> int:
    """How many atoms `recode` would bring to this codec."""
    return sum(1 for _ in _with_codec(bank, finer_codecs(codec, layout)))


def _with_codec(bank: AtomCollection, codecs: set[str]) -> Iterator[PointId]:
    """The points whose atom of this space is in one of these codecs: read, not filtered by, for it has no index."""
    fields = [bank.space_path, f"{bank.payload_key}.codec"]
    for point in bank.in_this_space(fields):
        if point.payload[bank.payload_key].get("codec") in codecs:
            yield point.id


def drop(bank: AtomCollection) -> int:
    """Remove this space's atoms, and nothing else; returns how many there were.

    The nested key goes first, in the same request: a server that deletes a parent key leaves the index of what was
    below it as it was. With the last atom under the key go its index and, of this space, what ingestion noted. Of a
    sidecar the points go too, unless they hold something else.
    """
    if not bank.atoms.exists():
        return 0
    count = sum(1 for _ in bank.in_this_space([bank.space_path]))
    if count:
        bank.atoms.create_keyword_index(bank.space_path)  # by which strict mode deletes
        bank.atoms.delete_keys([bank.space_path, bank.payload_key], bank.has_atom)
    if bank.in_sidecar:
        for page in pages(bank.scroll(None, True, store=bank.atoms), PAGE):
            if empty := [point.id for point in page if not point.payload]:
                bank.atoms.delete_points(empty)
    bank.forget()
    if not bank.has_other_spaces():
        bank.atoms.delete_index(bank.space_path)
    return count
