"""How a bank on the embedded engine grows: search, disk, memory and the rate of filling, from small to large."""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regrad_loaders.bench.figures import Figure, percentile
from regrad_loaders.data.facts import generate
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.record import make_records, text_sha
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Document
from regrad_qdrant.bank.stores.base import pages
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.model.memory import anonymous_megabytes, give_back_memory

QUERIES = 200
A_TURN = 20
PAGE = 500
TOP_K = 3
WARM_UP = "File 0"
PEOPLE = 40_000  # different ones


def bench_growth(
    layout: AtomLayout,
    codec: str,
    sizes: Sequence[int],
    fingerprint: str = "0" * 16,
    on_points: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Banks of these sizes, searched in turns.

    Points hold a biography, its BM25 vector and an atom of random numbers in the layout, coded as any other: what the
    engine holds and moves is the same, and no model is needed.
    """
    place = Path(tempfile.mkdtemp(prefix="regrad-growth-"))
    banks: dict[int, GradientBank] = {}
    details: dict[str, Any] = {}
    try:
        for size in sizes:
            gc.collect()
            give_back_memory()
            before = anonymous_megabytes()
            started = time.perf_counter()
            banks[size] = bank = GradientBank(open_store("docs", path=place / str(size)), "docs", fingerprint)
            bank.create()
            _fill(bank, size, layout, codec, on_points)
            bank.optimize()
            seconds = time.perf_counter() - started
            give_back_memory()
            on_disk = sum(file.stat().st_blocks * 512 for file in (place / str(size)).rglob("*") if file.is_file())
            details[str(size)] = {
                "points_per_second": size / seconds,
                "disk_bytes_per_point": on_disk / size,
                "memory_mb": anonymous_megabytes() - before,
            }
        seconds_of = _search_in_turns(banks)
    finally:
        for bank in banks.values():
            bank.close()
        shutil.rmtree(place, ignore_errors=True)
    small, large = min(sizes), max(sizes)
    ratios: dict[str, list[float]] = {}
    for kind, by_size in seconds_of.items():
        for size, values in by_size.items():
            details[str(size)] |= {f"p{p}_ms_by_{kind}": 1000 * percentile(values, p / 100) for p in (50, 99)}
        both = zip(pages(by_size[large], A_TURN), pages(by_size[small], A_TURN), strict=True)
        ratios[kind] = [median(of_large) / median(of_small) for of_large, of_small in both]
    name = f"growth.p50_{_short(large)}_over_{_short(small)}"
    first, last = details[str(small)], details[str(large)]
    figures = {
        name: Figure.of(ratios["number"], "times", 1.0, "a search that does not see how large the bank is"),
        f"{name}_first_asked": Figure.of(
            ratios["number_first_asked"], "times", 1.0, "the same; of a larger bank less is in memory"
        ),
        f"{name}_by_name": Figure.of(ratios["name"], "times", 1.0, "the same; more people bear the name's parts"),
        f"growth.rate_{_short(large)}_over_{_short(small)}": _plain(
            last["points_per_second"] / first["points_per_second"]
        ),
        f"growth.disk_{_short(large)}_over_{_short(small)}": _plain(
            last["disk_bytes_per_point"] / first["disk_bytes_per_point"]
        ),
    }
    return figures, details


def _plain(value: float) -> Figure:
    return Figure(value, value, value, "times", 1.0, "as much for every point")


def _fill(bank: GradientBank, size: int, layout: AtomLayout, codec: str, on_points: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    atoms = make_records(torch.randn(8, layout.numel), [""] * 8, bank.space, codec, layout)
    for page in pages(_documents(size), PAGE):
        bank.add(page)
        hits = bank.fetch([document.id for document in page])
        texts = [hit.text for hit in hits]
        records = [replace(atoms[i % len(atoms)], sha=text_sha(text)) for i, text in enumerate(texts)]
        bank.put(zip(hits, records, strict=True))
        on_points(len(page))


def _documents(count: int) -> Iterator[Document]:
    """Biographies of different people, who come again past `PEOPLE`; three points share a number."""
    passages = generate("train", min(count, PEOPLE), 1, questions_per_person=1).passages
    return (Document(i, {"text": f"{passages[i % len(passages)].text} File {i // TOP_K}."}) for i in range(count))


def _questions(size: int) -> dict[str, list[str]]:
    """Of a name, whose parts more people bear the more there are; and of a number, which three points share always."""
    rng = random.Random(0)
    names = [" ".join(document.payload["text"].split()[:2]) for document in _documents(size)]
    return {
        "name": [f"What does {rng.choice(names)} do?" for _ in range(QUERIES)],
        "number": [f"Who is number {rng.randrange(max(1, size // TOP_K))}?" for _ in range(QUERIES)],
    }


def _search_in_turns(banks: dict[int, GradientBank]) -> dict[str, dict[int, list[float]]]:
    """Seconds of every search, by kind of question and size: when it is first asked, and may find its atoms not in
    memory, and when it is asked again. Banks take turns of `A_TURN` questions: a bank in use does not meet its caches
    emptied by another one before every search."""
    seconds: dict[str, dict[int, list[float]]] = {}
    for kind, questions in _questions(min(banks)).items():
        for asked in (f"{kind}_first_asked", kind):
            seconds[asked] = {size: [] for size in banks}
            for part in pages(questions, A_TURN):
                for size, bank in banks.items():
                    bank.search(WARM_UP, TOP_K)
                    seconds[asked][size] += [_seconds_of(bank, question) for question in part]
    return seconds


def _seconds_of(bank: GradientBank, question: str) -> float:
    started = time.perf_counter()
    hits = bank.search(question, TOP_K)
    taken = time.perf_counter() - started
    if not hits or any(hit.record is None for hit in hits):
        raise RuntimeError(f"{question!r}: expected hits with their atoms, found {len(hits)}")
    return taken


def _short(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
