"""What it costs to ask a filled bank whether anything is left to do: requests, what is read, memory.

    python benchmarks/upkeep.py --points 100000

fills an embedded Edge shard with documents and atoms of random numbers, as large as the small initialization's, then
counts what a second ingestion and `status` ask of it. Bytes are those of what comes back, as JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import documents, peak_of_memory, tiny_gradients
from tables import table

from regrad_qdrant import GradientBank
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.stores.base import json_bytes, pages
from regrad_qdrant.bank.stores.edge import EdgeStore

PAGE = 1000


class Counted(EdgeStore):
    """A shard that counts its requests, and the bytes that they bring back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.requests: Counter[str] = Counter()
        self.bytes = 0

    def scroll(self, *arguments: Any) -> Any:
        points, following = super().scroll(*arguments)
        self._count("scroll", points)
        return points, following

    def retrieve(self, *arguments: Any) -> Any:
        points = super().retrieve(*arguments)
        self._count("retrieve", points)
        return points

    def count(self, *arguments: Any) -> int:
        self._count("count", [])
        return super().count(*arguments)

    def set_payload(self, *arguments: Any) -> None:
        self._count("set_payload", [])
        super().set_payload(*arguments)

    def _count(self, request: str, points: list[Any]) -> None:
        self.requests[request] += 1
        self.bytes += sum(json_bytes(point.payload) + len(str(point.id)) for point in points)


@dataclass(frozen=True)
class Cost:
    """What one command cost."""

    what: str
    requests: Counter[str]
    megabytes: float
    seconds: float
    memory: float  # MB above what was there before

    def row(self) -> list[str]:
        asked = ", ".join(f"{count} {request}" for request, count in self.requests.items())
        return [self.what, asked, f"{self.megabytes:.1f}", f"{self.seconds:.1f}", f"{self.memory:.0f}"]


def filled(store: Counted, space: str, layout: Any, count: int) -> GradientBank:
    bank = GradientBank(store, store.name, space)
    bank.create()
    torch.manual_seed(0)
    for page in pages(documents(count), PAGE):
        bank.add(page)
        texts = [document.payload["text"] for document in page]
        records = make_records(torch.randn(len(page), layout.numel), texts, space, "sign", layout)
        bank.put(zip([document.id for document in page], records, strict=True))
    return bank


def cost(what: str, store: Counted, work: Any) -> Cost:
    store.requests, store.bytes = Counter(), 0
    started = time.perf_counter()
    with peak_of_memory() as seen:
        work()
    return Cost(what, store.requests, store.bytes / 1e6, time.perf_counter() - started, max(seen) - seen[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    points = parser.parse_args().points
    gradients, space = tiny_gradients()
    with tempfile.TemporaryDirectory() as folder:
        store = Counted(Path(folder) / "docs")
        bank = filled(store, space, gradients.space.layout, points)
        attach_atoms(bank, gradients, "sign")  # notes what the first ingestion notes
        rows = [
            cost("a second ingestion", store, lambda: attach_atoms(bank, gradients, "sign")),
            cost("status", store, bank.status),
        ]
        bank.close()
    print(table(["", "requests", "MB read", "seconds", "MB of memory"], [row.row() for row in rows]))


if __name__ == "__main__":
    main()
