"""Interference: what an answer loses when other documents' atoms are merged with that of the document it needs.

Every question is answered from its gold passage alone, and then from it among what BM25 returns beside it (hard
negatives) or among random documents. The same atoms, read through one codec, serve every merge rule and every k.
A gold passage that retrieval missed takes the place of the last hit, with its score: recall has no part in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from regrad_loaders.bench.atoms import AtomBench, Task
from regrad_loaders.data.folders import Question
from regrad_loaders.data.scores import Interval, bootstrap
from regrad_qdrant.atoms.merge import MergeRule

GOLD = "gold passage alone"
HARD = "hard negatives"  # what BM25 returns beside the gold passage
RANDOM = "random documents"


@dataclass(frozen=True)
class Merged:
    """One way of merging, on one set."""

    init: str
    task: str
    among: str  # GOLD, HARD or RANDOM
    rule: str
    documents: int  # merged for every question
    f1: Interval  # 0 to 1
    of_gold: Interval  # F1 as a share of that of the gold passage alone, over the same questions


def study(
    bench: AtomBench,
    task: Task,
    codec: str,
    rules: Sequence[MergeRule],
    ks: Sequence[int],
    noise: Sequence[int],
    on_atoms: Callable[[int], None] = lambda _: None,
    on_row: Callable[[int], None] = lambda _: None,
) -> list[Merged]:
    """Answer every question with its gold passage alone, then with each rule at each k of `ks` (the gold passage among
    hard negatives) and with each number of random documents added to the gold passage.

    Random documents come in with the score of the last of the question's hits. Every question of the task has one
    gold passage.
    """
    hits, strangers = zip(*_candidates(task, ks, noise), strict=True)
    used = documents(task, ks, noise)
    rows = {key: i for i, key in enumerate(used)}
    exact, _ = bench.atoms([task.texts[key] for key in used], on_atoms)
    decoded = bench.read(exact, codec)

    golds = [{question.gold_ids[0]: 1.0} for question in task.questions]
    alone = _scores(bench, replace(task, hits=golds), decoded, rows, MergeRule("sum"))
    merged = [_merged(bench.name, task, GOLD, "any", 1, alone, alone)]
    on_row(1)
    ways = [(HARD, k, [with_gold(*asked, k) for asked in zip(task.questions, hits, strict=True)]) for k in ks if k > 1]
    for count in noise:
        drawn = [
            gold | dict.fromkeys(keys[:count], min(found.values()) / max(found.values()))
            for gold, found, keys in zip(golds, hits, strangers, strict=True)
        ]
        ways.append((RANDOM, count + 1, drawn))
    for among, count, given in ways:
        for rule in rules:
            scores = _scores(bench, replace(task, hits=given), decoded, rows, rule)
            merged.append(_merged(bench.name, task, among, rule.rule, count, scores, alone))
            on_row(1)
    return merged


def documents(task: Task, ks: Sequence[int], noise: Sequence[int]) -> list[str]:
    """The passages whose atoms `study` needs."""
    return sorted({key for hits, strangers in _candidates(task, ks, noise) for key in (*hits, *strangers)})


def _candidates(task: Task, ks: Sequence[int], noise: Sequence[int]) -> Iterator[tuple[dict[str, float], list[str]]]:
    """For every question its hits, with the gold passage among them, and the most random documents that are added."""
    for question, found in zip(task.questions, task.hits, strict=True):
        hits = with_gold(question, found, max(ks))
        others = [key for key in task.texts if key not in hits]
        yield hits, random.Random(question.id).sample(others, min(max(noise, default=0), len(others)))


def with_gold(question: Question, hits: dict[str, float], k: int) -> dict[str, float]:
    """The first k hits, best first, with the gold passage surely among them: one that retrieval missed takes the last
    one's place and score."""
    [gold] = question.gold_ids
    kept = dict(list(hits.items())[:k])
    if gold not in kept:
        lowest = min(kept.values(), default=1.0)
        if len(kept) == k:
            kept.popitem()
        kept[gold] = lowest
    return kept


def _scores(bench: AtomBench, task: Task, decoded: Tensor, rows: dict[str, int], rule: MergeRule) -> list[float]:
    most = max(len(found) for found in task.hits)
    sums = bench.sums(task, decoded, rows, most, rule)
    return bench.scores(task.questions, -bench.adapter.step_sizes * sums)


def _merged(
    init: str, task: Task, among: str, rule: str, count: int, scores: list[float], alone: list[float]
) -> Merged:
    return Merged(init, task.name, among, rule, count, bootstrap(scores), share(scores, alone))


def share(scores: Sequence[float], of: Sequence[float], rounds: int = 2000) -> Interval:
    """The ratio of two means over the same questions, with its 95 % bootstrap interval; 1 where the second is 0."""

    def ratio(top: Any, bottom: Any) -> Any:
        return np.where(bottom > 0, top / np.maximum(bottom, 1e-9), 1.0)

    above, below = np.asarray(scores, dtype=float), np.asarray(of, dtype=float)
    drawn = np.random.default_rng(0).integers(len(above), size=(rounds, len(above)))
    low, high = np.percentile(ratio(above[drawn].mean(axis=1), below[drawn].mean(axis=1)), [2.5, 97.5])
    return Interval(float(ratio(above.mean(), below.mean())), float(low), float(high))


def report(rows: Sequence[Merged], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench merge`."""
    return {"settings": settings, "rows": [asdict(row) for row in rows]}
