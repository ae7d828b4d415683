"""Copying a collection, atoms and all, between stores: Edge or an in-process folder to a server, and back.

Ids, vectors and payloads are copied as they are. A page of points is compared with what the target holds, what differs
is written, and read back: so a copy that was stopped goes on, and a finished one is verified point by point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from regrad_qdrant.bank.stores.base import (
    MAX_REQUEST_BYTES,
    Point,
    PointId,
    SparseVector,
    Store,
    Vector,
    bounded,
    sized,
)
from regrad_qdrant.errors import BankError

PAGE = 128
TOLERANCE = 1e-5  # engines normalize cosine vectors again, which moves their last bits


@dataclass
class MigrationReport:
    """What a copy did."""

    points: int = 0
    written: int = 0
    present: int = 0  # were in the target already, equal
    differing: list[PointId] = field(default_factory=list)  # do not read back as they were written
    left_out: list[str] = field(default_factory=list)  # settings of the source that the target's engine does not hold


def migrate(
    source: Store,
    target: Store,
    on_progress: Callable[[int], None] = lambda _: None,
    *,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> MigrationReport:
    """Copy every point; where the target is not there it is made as the source is: its vectors, their storage and
    quantization, its payload indexes and metadata, as far as the target's engine holds them (`left_out`). A copy of
    another name is not led to the source's sidecar.

    Points that the target alone has stay, and a target that is there keeps its own settings.

    Raises:
        BankError: if there is no source, or if the target has other vectors.
    """
    if not source.exists():
        raise BankError(f"there is no collection {source.name!r} to copy")
    vectors = source.vectors()
    report = MigrationReport()
    if target.exists() and target.vectors() != vectors:
        raise BankError(
            f"collection {target.name!r} exists with other vectors: {target.vectors()}, expected {vectors}: choose "
            "another name for the copy"
        )
    if not target.exists() or not target.count():  # or it was stopped before its indexes were made
        configuration = source.configuration()
        if source.name != target.name:
            metadata = {key: value for key, value in configuration.metadata.items() if not _leads_to_sidecar(value)}
            configuration = replace(configuration, metadata=metadata)
        report.left_out = target.create_as(configuration)
        if source.has_shard_keys:
            report.left_out.append("the shard keys")
    offset: PointId | None = None
    while True:
        points, offset = source.read(PAGE, offset)
        _copy(points, target, report, max_request_bytes)
        on_progress(len(points))
        if offset is None:
            break
    for key, noted in target.read_metadata().items():
        if isinstance(noted, Mapping) and "shapes" in noted:  # an embedded source has no index to be copied
            target.create_keyword_index(f"{key.rpartition('.')[0]}.space")
    target.optimize()
    return report


def _leads_to_sidecar(noted: object) -> bool:
    return isinstance(noted, Mapping) and "sidecar" in noted


def _copy(points: Sequence[Point], target: Store, report: MigrationReport, max_request_bytes: int) -> None:
    there = target.read_ids([point.id for point in points])
    new = [point for point in points if not _equal(point, there.get(point.id))]
    for batch in bounded(max_request_bytes, sized(new), lambda point: point.id):
        target.upsert(batch)
    copied = target.read_ids([point.id for point in new])
    report.points += len(points)
    report.written += len(new)
    report.present += len(points) - len(new)
    report.differing += [point.id for point in new if not _equal(point, copied.get(point.id))]


def _equal(point: Point, other: Point | None) -> bool:
    return other is not None and point.payload == other.payload and _same_vectors(point.vectors, other.vectors)


def _same_vectors(ours: Mapping[str, Vector], theirs: Mapping[str, Vector]) -> bool:
    return set(ours) == set(theirs) and all(_same(ours[name], theirs[name]) for name in ours)


def _same(ours: Vector, theirs: Vector) -> bool:
    if isinstance(ours, SparseVector) or isinstance(theirs, SparseVector):
        if not (isinstance(ours, SparseVector) and isinstance(theirs, SparseVector)):
            return False
        pairs = [dict(zip(vector.indices, vector.values, strict=True)) for vector in (ours, theirs)]
        return set(pairs[0]) == set(pairs[1]) and all(_close(pairs[0][i], pairs[1][i]) for i in pairs[0])
    return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
