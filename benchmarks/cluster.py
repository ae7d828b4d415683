"""Ingestion by many workers, simulated: Ray's own machinery and records as they are, and workers that sleep for as long
as a GPU would compute. Two ways to write: an embedded bank, whose single writer is this process; and workers that write
by themselves, into a server that takes no time, which leaves Ray's own limit.

    python benchmarks/cluster.py --json benchmarks/cluster.json

More than PROCESSES workers are as many processes, each of which makes atoms as fast as its share of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from tables import renew, table

from regrad_loaders.data.facts import generate
from regrad_qdrant import Document, GradientBank, MetaInitialization
from regrad_qdrant.bank.cluster import Cluster, attach_on_cluster
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.model.gradients import EncodedDocument, GradientComputer

if TYPE_CHECKING:
    from torch import Tensor

A_SECOND = 171.0  # atoms of a 1B model on one H200 (docs/scale.md)
PROCESSES = 8  # of workers, at most: 0.4 GB each
SECONDS = 20  # that the workers alone would need, at least
MOST = 12_000  # documents of a run


class Sleeping(GradientComputer):
    """Gives the same random atoms of the initialization's space again and again, as fast as a GPU would."""

    def __init__(self, init: str, a_second: float, begun: Path) -> None:
        import torch

        self.space = MetaInitialization.load(init).space
        self.max_length, self.a_second, self._begun = 256, a_second, begun
        self._drawn = torch.randn(64, self.space.numel)

    def windows(self, text: str, most: int | None = None) -> list[EncodedDocument]:
        return [EncodedDocument([0] * len(text.split()), False, (0, len(text)))]

    def atoms(self, documents: Sequence[EncodedDocument]) -> Tensor:
        if not self._begun.exists():
            self._begun.touch()
        time.sleep(len(documents) / self.a_second)
        return self._drawn[: len(documents)]


class Endless:
    """A server's bank as far as ingestion knows it: so many points without an atom, and writes that take no time."""

    layout = "plain"
    atoms = SimpleNamespace(one_thread=False)

    def __init__(self, space: str, documents: int) -> None:
        self.space, self._documents = space, documents

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def missing(self, shard: Any) -> Iterator[Hit]:
        first, step = (0, 1) if shard is None else (shard.index, shard.count)
        for i in range(first, self._documents, step):
            text = f"Person {i} was born in {1900 + i % 100} and works as a locksmith in Town {i % 977}. " * 8
            yield Hit(i, 0.0, text, {"text": text})

    def examined(self, shard: Any) -> Iterator[tuple[str, Hit]]:
        return iter(())

    def put(self, records: Iterable[Any]) -> None:
        for _, record in records:
            record.to_payload()

    def count_with_atoms(self, ids: Sequence[Any]) -> int:
        return len(ids)

    def count_atoms(self) -> int:
        return 0

    def count_of_other_spaces(self) -> int:
        return 0

    def index(self) -> None:
        pass

    def describe(self, space: Any) -> None:
        pass

    def optimize(self) -> None:
        pass


def rate(init: str, workers: int, a_second: float, embedded: bool) -> dict[str, Any]:
    """Documents a second of so many workers, from the moment that the first begins until the last is written."""
    initialization = MetaInitialization.load(init)
    documents = min(MOST, int(SECONDS * workers * a_second))
    processes = min(workers, PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        make = functools.partial(Sleeping, init, a_second * workers / processes, begun)
        ended = [0.0, 0.0]  # documents that came through, and when the last did

        def count(points: int, _: int) -> None:
            ended[:] = [ended[0] + points, time.time()]

        def ingest(bank: Any, open_bank: Callable[[], Any] | None) -> float:
            cluster = Cluster("local", processes)
            return attach_on_cluster(bank, initialization, make, open_bank, "sign", cluster, count).waiting

        if embedded:
            store = open_store("docs", path=Path(folder) / "bank")
            with GradientBank(store, "docs", initialization.fingerprint) as bank:
                bank.create()
                people = generate("train", documents, 1).passages[:documents]
                bank.add(Document(passage.id, passage.payload) for passage in people)
                waiting = ingest(bank, None)
        else:
            opened = functools.partial(Endless, initialization.fingerprint, documents)
            waiting = ingest(opened(), opened)
        assert ended[0] == documents, f"{ended[0]} of {documents} documents came through"
        seconds = ended[1] - begun.stat().st_mtime
    return {
        "workers": workers, "documents": documents, "documents_per_second": documents / seconds, "waiting": waiting
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="smollm2-135m-instruct")
    parser.add_argument("--workers", default="1,8,64,256")
    parser.add_argument("--a-second", type=float, default=A_SECOND, help="atoms of one worker")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, embedded in (("embedded", True), ("server", False)):
        for workers in map(int, arguments.workers.split(",")):
            row = rate(arguments.init, workers, arguments.a_second, embedded)
            found.setdefault(name, []).append(row)
            print(name, row, flush=True)
    if arguments.json:
        settings = {"a_second": arguments.a_second, "init": arguments.init, "processes": PROCESSES}
        arguments.json.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n", encoding="utf-8")
    rows = []
    for embedded_row, row in zip(found["embedded"], found["server"], strict=True):
        could = arguments.a_second * row["workers"]
        cells = [
            f"{each['documents_per_second']:,.0f} ({each['documents_per_second'] / could:.0%})"
            for each in (embedded_row, row)
        ]
        rows.append([str(row["workers"]), f"{could:,.0f}", *cells])
    heads = ["workers", "atoms a second that they could make", "into an embedded bank", "writing by themselves"]
    renew(arguments.page, "<!-- benchmarks/cluster.py -->\n", table(heads, rows))


if __name__ == "__main__":
    main()
