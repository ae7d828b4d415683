"""What a document's length does to what its atom is worth: the same facts in texts of one sentence and of many."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from regrad_loaders.bench.atoms import AtomBench
from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Dataset, Question
from regrad_loaders.data.scores import Interval, bootstrap
from regrad_qdrant.atoms.merge import length_weight

SENTENCES = (1, 2, 3, 4, 6, 12, 18)  # a biography has six; longer texts go on with other people's


@dataclass(frozen=True)
class OfLength:
    """One length: the right document's atom alone, with its weight and without."""

    sentences: int
    tokens: int  # median
    norm: float  # of the atoms, median
    f1: Interval  # 0 to 1
    unweighted: Interval  # F1 with every atom in full
    gain: Interval  # the first less the second, over the same questions


def study(
    bench: AtomBench, questions: int, codec: str, on_length: Callable[[int], None] = lambda _: None
) -> list[OfLength]:
    """Ask about invented people, the right document alone, in texts of each length of `SENTENCES`."""
    world = generate("demo", 2 * questions, 1, questions_per_person=1)
    asked = world.questions[:questions]
    rows = []
    for sentences in SENTENCES:
        texts = [text_of(world, question, sentences) for question in asked]
        tokens = [len(bench.gradients.encode(text).ids) for text in texts]
        exact, _ = bench.atoms(texts)
        atoms = bench.read(exact, codec)
        shares = torch.tensor([length_weight(count) for count in tokens]).unsqueeze(1)
        scores = [
            bench.scores(asked, updates)
            for updates in (-bench.adapter.step_sizes * shares * atoms, -bench.adapter.step_sizes * atoms)
        ]
        gain = bootstrap([a - b for a, b in zip(*scores, strict=True)])
        of_scores = [bootstrap(found) for found in scores]
        norm = float(exact.norm(dim=1).median())
        rows.append(OfLength(sentences, int(median(tokens)), norm, of_scores[0], of_scores[1], gain))
        on_length(1)
    return rows


def text_of(world: Dataset, question: Question, sentences: int) -> str:
    """So many sentences, the one that answers the question first, with the person's full name in it."""
    texts = {passage.id: passage.text for passage in world.passages}
    own = texts[question.gold_ids[0]]
    name = re.search(r"[A-Z]\w+ [A-Z]\w+", own)
    said = re.split(r"(?<=\.) ", own)
    answering = next(sentence for sentence in said if question.answers[0] in sentence)
    rest = [sentence for sentence in said if sentence != answering]
    if name and name[0] not in answering:
        answering = re.sub(rf"\b{name[0].split()[0]}\b", name[0], answering, count=1)
    others = [text for key, text in texts.items() if key != question.gold_ids[0]][: max(0, sentences - len(said)) // 6]
    return " ".join([answering, *rest[: sentences - 1], *others])


def report(rows: Sequence[OfLength], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench lengths`."""
    return {"settings": settings, "rows": [asdict(row) for row in rows]}
