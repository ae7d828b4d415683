"""Search with atoms on the embedded engines, and the memory of filling them: Edge against the in-process client.

    python benchmarks/engines.py --points 20000

Points hold invented biographies and atoms of the size of the shipped initialization's; a search returns the three best
with their atoms. Searches take turns between the engines. Memory is of a process that does nothing but fill a bank.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from qdrant_client import QdrantClient

from regrad_loaders.facts import generate
from regrad_qdrant import Document, GradientBank
from regrad_qdrant.codec import DEFAULT_CODEC
from regrad_qdrant.record import Record, make_records, text_sha
from regrad_qdrant.store import open_store, pages

SPACE, NUMEL, DISTINCT = "a" * 16, 10_752, 64


def documents(count: int) -> Iterator[Document]:
    """As many biographies as asked for; people come again under other ids."""
    passages = generate("train", min(count, 2000), 1).passages
    return (Document(i, {"text": f"{passages[i % len(passages)].text} No. {i}."}) for i in range(count))


def fill(bank: GradientBank, count: int) -> None:
    """The points, then their atoms page by page, as ingestion does."""
    bank.create()
    bank.add(documents(count))
    numbers = torch.randn(DISTINCT, NUMEL, generator=torch.Generator().manual_seed(0))
    atoms = [record.atom for record in make_records(numbers, [""] * DISTINCT, SPACE, DEFAULT_CODEC)]
    for page in pages(bank.missing(), 64):
        records = (Record(SPACE, text_sha(hit.text), DEFAULT_CODEC, atoms[i % DISTINCT]) for i, hit in enumerate(page))
        bank.put(zip(page, records, strict=True))


def megabytes_of_filling(folder: Path, count: int) -> float:
    """The peak memory of a process that fills an Edge bank, in MB."""
    command = [sys.executable, __file__, "--fill", str(folder), "--points", str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fill:
        with GradientBank.open(arguments.fill, "docs", SPACE) as bank:
            fill(bank, arguments.points)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        memory = {count: megabytes_of_filling(folder / str(count), count) for count in (1000, arguments.points)}
        edge = GradientBank(open_store("docs", path=folder / str(arguments.points)), "docs", SPACE)
        client = GradientBank(QdrantClient(":memory:"), "docs", SPACE)
        fill(client, arguments.points)
        rng, seconds = random.Random(0), {"edge": [], "client": []}
        texts = [document.payload["text"] for document in documents(2000)]
        questions = [f"What does {' '.join(rng.choice(texts).split()[:2])} do?" for _ in range(arguments.queries)]
        for question in questions:
            for name, bank in (("edge", edge), ("client", client)):
                started = time.perf_counter()
                hits = bank.search(question, 3)
                seconds[name].append(time.perf_counter() - started)
                if len(hits) != 3 or any(hit.record is None for hit in hits):
                    raise SystemExit(f"{name}: expected three hits with their atoms")
        edge.close()
    result = {"points": arguments.points, "memory_mb": {str(count): value for count, value in memory.items()}}
    for name, values in seconds.items():
        result[name] = {"median_ms": 1000 * median(values), "p99_ms": 1000 * quantiles(values, n=100)[98]}
    result["client_over_edge_median"] = result["client"]["median_ms"] / result["edge"]["median_ms"]
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
