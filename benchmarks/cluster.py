"""Ingestion by many workers, simulated: Ray's own machinery, records as they are and a real bank, and workers that
sleep for as long as a GPU would compute.

    python benchmarks/cluster.py --json benchmarks/cluster.json

A worker is a process, so that memory bounds how many there are: 0.4 GB each.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tables import table

from regrad_loaders.data.facts import generate
from regrad_qdrant import Document, GradientBank, MetaInitialization
from regrad_qdrant.bank.cluster import Cluster, attach_on_cluster
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.model.gradients import EncodedDocument, GradientComputer

if TYPE_CHECKING:
    from torch import Tensor

SECTION = re.compile(r"(<!-- benchmarks/cluster\.py -->\n).*?(<!-- end -->)", re.DOTALL)
A_SECOND = 171.0  # atoms of a 1B model on one H200 (docs/scale.md)


class Sleeping(GradientComputer):
    """Gives random atoms of the shipped initialization's space, as fast as a GPU would."""

    def __init__(self, init: str, a_second: float) -> None:
        self.space = MetaInitialization.load(init).space
        self.max_length, self.a_second = 256, a_second

    def windows(self, text: str, most: int | None = None) -> list[EncodedDocument]:
        return [self.encode(text)]

    def encode(self, text: str) -> EncodedDocument:
        return EncodedDocument([0] * len(text.split()), False, (0, len(text)))

    def atoms(self, documents: Sequence[EncodedDocument]) -> Tensor:
        import torch

        time.sleep(len(documents) / self.a_second)
        return torch.randn(len(documents), self.space.numel)


def rate(init: str, documents: int, workers: int, a_second: float) -> tuple[float, float]:
    """Documents a second that so many workers put into an embedded bank, after the first tenth; and the share of their
    time that they waited."""
    initialization = MetaInitialization.load(init)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store("docs", path=Path(folder))
        with GradientBank(store, "docs", initialization.fingerprint) as bank:
            bank.create()
            people = generate("train", documents, 1).passages[:documents]
            bank.add(Document(passage.id, passage.payload) for passage in people)
            seen: list[tuple[float, int]] = []
            make = functools.partial(Sleeping, init, a_second)
            report = attach_on_cluster(
                bank, initialization, make, None, "sign", Cluster("local", workers),
                lambda count, _: seen.append((time.perf_counter(), count)),
            )  # fmt: skip
    first = max(1, len(seen) // 10)
    counted = sum(count for _, count in seen[first:])
    return counted / (seen[-1][0] - seen[first - 1][0]), report.waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="smollm2-135m-instruct")
    parser.add_argument("--workers", default="1,2,4,8,16")
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--a-second", type=float, default=A_SECOND, help="atoms of one worker")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    arguments = parser.parse_args()
    found = []
    for workers in map(int, arguments.workers.split(",")):
        speed, waiting = rate(arguments.init, arguments.documents, workers, arguments.a_second)
        found.append({"workers": workers, "documents_per_second": speed, "waiting": waiting})
        print(found[-1], flush=True)
    if arguments.json:
        settings = {"documents": arguments.documents, "a_second": arguments.a_second, "init": arguments.init}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": found}, indent=1), encoding="utf-8")
    rows = [
        [
            str(row["workers"]), f"{arguments.a_second * row['workers']:,.0f}", f"{row['documents_per_second']:,.0f}",
            f"{row['documents_per_second'] / arguments.a_second / row['workers']:.2f}",
        ]
        for row in found
    ]  # fmt: skip
    said = table(["workers", "atoms a second that they could make", "documents a second", "efficiency"], rows)
    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(SECTION.sub(lambda at: at[1] + said + at[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
