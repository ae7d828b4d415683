"""What a long document's atoms are worth for questions about any part of it: windows, their mean, its beginning."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regrad_loaders.bench.atoms import AtomBench
from regrad_loaders.data.scores import Interval, bootstrap
from regrad_loaders.evaluation.plots import new_figure
from regrad_qdrant.atoms.merge import window_shares
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_loaders.data.folders import Dataset, Question
    from regrad_qdrant.model.gradients import EncodedDocument

LENGTHS = (500, 1000, 2000, 4000)  # tokens of a document
WAYS = ("windows", "best window", "mean", "sum", "truncated", "passage alone", "no atom")
PARTS = 4  # of a document, by where the answer's passage stands


@dataclass(frozen=True)
class Document:
    """A long text made of passages, one of which answers the question."""

    question: Question
    text: str
    passage: str
    part: int  # where the passage begins: 0 the first quarter


@dataclass(frozen=True)
class Row:
    """F1 of one way with documents of one length, over all parts (None) or one."""

    tokens: int
    way: str
    part: int | None
    questions: int
    f1: Interval  # 0 to 1


def study(
    bench: AtomBench,
    dataset: Dataset,
    questions: Sequence[Question],
    codec: str,
    window_tokens: int | None = None,
    on_length: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Ask each question with the atoms of one long document, which its gold passage stands in at a random place."""
    rows = []
    for tokens in LENGTHS:
        documents = made(bench, dataset, questions, tokens)
        updates = _updates(bench, documents, codec, window_tokens)
        asked = [document.question for document in documents]
        for way in WAYS:
            scores = bench.scores(asked, updates[way])
            for part in (None, *range(PARTS)):
                own = [s for s, document in zip(scores, documents, strict=True) if part in (None, document.part)]
                if own:
                    rows.append(Row(tokens, way, part, len(own), bootstrap(own)))
        on_length(1)
    return rows


def made(bench: AtomBench, dataset: Dataset, questions: Sequence[Question], tokens: int) -> list[Document]:
    """A document of about so many tokens for each question; the other passages hold none of its answers."""
    texts = {passage.id: passage.text for passage in dataset.passages}
    keys, sizes = list(texts), dict[str, int]()
    documents = []
    for i, question in enumerate(questions):
        rng = random.Random(f"{tokens}-{question.id}")
        gold = texts[question.gold_ids[0]]
        own = bench.count(gold)
        chosen, total = [gold], own
        others = {text for text in texts.values() if not any(answer in text for answer in question.answers)} - {gold}
        while total < tokens:
            if len(chosen) > len(others):
                raise DataError(
                    f"{dataset.name}: all passages without an answer to {question.id!r} are {total} tokens, fewer than "
                    f"{tokens}: take a larger set"
                )
            key = rng.choice(keys)
            if texts[key] in chosen or texts[key] not in others:
                continue
            sizes.setdefault(key, bench.count(texts[key]))
            chosen.append(texts[key])
            total += sizes[key]
        part = i % PARTS
        around, before, at = chosen[1:], 0, 0
        while at < len(around) and before + own / 2 < (part + rng.random()) / PARTS * total:
            before += bench.count(around[at])
            at += 1
        parts = [*around[:at], gold, *around[at:]]
        documents.append(Document(question, " ".join(parts), gold, min(PARTS - 1, int(PARTS * before / total))))
    return documents


def _updates(
    bench: AtomBench, documents: Sequence[Document], codec: str, window_tokens: int | None
) -> dict[str, Tensor]:
    """By way the update of each document for its question, (documents, numel), its atoms read from the codec."""
    bm25, rule = Bm25(), bench.initialization.merge
    windows = [bench.gradients.windows(document.text, window_tokens) for document in documents]
    atoms = _coded(bench, [window for of_text in windows for window in of_text], codec)
    found: dict[str, list[Tensor]] = {way: [] for way in WAYS[:4]}
    parts = atoms.split([len(of_text) for of_text in windows])
    for document, of_text, own in zip(documents, windows, parts, strict=True):
        said = [document.text[start:end] for start, end in (window.span for window in of_text)]
        scores = bm25.scores(document.question.question, said)
        found["windows"].append(torch.tensor(window_shares(rule, scores)) @ own)
        found["best window"].append(own[scores.index(max(scores))])
        found["mean"].append(own.mean(0))
        found["sum"].append(own.sum(0))
    sums = {way: torch.stack(rows) for way, rows in found.items()}
    sums["truncated"] = _coded(bench, [bench.gradients.encode(document.text) for document in documents], codec)
    sums["passage alone"] = _coded(bench, [bench.gradients.encode(document.passage) for document in documents], codec)
    sums["no atom"] = torch.zeros_like(sums["mean"])
    return {way: -bench.adapter.step_sizes * rows for way, rows in sums.items()}


def _coded(bench: AtomBench, windows: Sequence[EncodedDocument], codec: str) -> Tensor:
    return bench.read(bench.gradients.atoms_in_batches(windows, 2048), codec)


def plot(rows: Sequence[Row], path: Path) -> None:
    """F1 by the part of the document that holds the answer, a panel a length."""
    lengths = sorted({row.tokens for row in rows})
    figure = new_figure(3.2 * len(lengths), 3.4)
    panels = figure.subplots(1, len(lengths), sharey=True)
    for panel, tokens in zip(panels, lengths, strict=True):
        for way in ("windows", "mean", "truncated", "passage alone"):
            own = [row for row in rows if (row.tokens, row.way) == (tokens, way) and row.part is not None]
            panel.plot(
                [f"{row.part + 1}" for row in own if row.part is not None],
                [100 * row.f1.mean for row in own],
                marker="o",
                label=way,
            )
        panel.set(title=f"{tokens} tokens", xlabel="quarter of the document")
    panels[0].set(ylabel="F1")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def report(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench positions`."""
    return {"settings": settings, "rows": [asdict(row) for row in rows]}
