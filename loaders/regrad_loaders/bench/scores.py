"""What a retrieval's scores may be without harm: the same atoms, merged by every kind of score that a search can have.

The ranking is BM25's in all rows but those of a dense model, and so is the confidence: only how it is written differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from regrad_loaders.bench.atoms import AtomBench, Task
from regrad_loaders.data.scores import Interval, bootstrap
from regrad_qdrant.bank.embed import Embedder
from regrad_qdrant.bank.relevance import DEPTH, by_rank, from_candidates, from_zero

BM25 = "BM25"
AS_IT_WAS = "close cosines, score over best"  # a control: a rule that takes a score as it comes
RRF_K = 2  # the constant of a server's reciprocal rank fusion


def _cosines(scores: Sequence[float]) -> list[float]:
    """As close together as an e5-like model's: the best at 0.85."""
    return [0.80 + 0.05 * score / scores[0] for score in scores]


def _distances(scores: Sequence[float]) -> list[float]:
    """Euclidean ones of unit vectors with these cosines: the smallest is the best."""
    return [(2 - 2 * cosine) ** 0.5 for cosine in _cosines(scores)]


def _fused(scores: Sequence[float]) -> list[float]:
    return [1 / (RRF_K + rank) for rank in range(len(scores))]


def _relative(written: Callable[[Sequence[float]], list[float]]) -> Callable[[Sequence[float]], list[float]]:
    """From BM25's scores to the relevances of the same, written in another way."""

    def relevances(scores: Sequence[float]) -> list[float]:
        there = written(scores)
        return from_candidates(there, there)

    return relevances


# From BM25's scores of the deeper candidates to relevances: as they are taken for each kind of score.
KINDS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    BM25: from_zero,
    "close cosines": _relative(_cosines),
    "distances": _relative(_distances),
    "reciprocal rank fusion": _relative(_fused),
    "an order alone": lambda s: by_rank(len(s)),
    AS_IT_WAS: lambda s: [score / _cosines(s)[0] for score in _cosines(s)],
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One kind of score, on one set."""

    init: str
    task: str
    kind: str
    top_k: int
    f1: Interval  # 0 to 1
    behind: Interval  # F1 of the same ranking with BM25's scores less this, over the same questions


def study(
    bench: AtomBench,
    task: Task,
    codec: str,
    top_k: int,
    dense: Embedder | None = None,
    on_atoms: Callable[[int], None] = lambda _: None,
    on_row: Callable[[int], None] = lambda _: None,
) -> list[Scored]:
    """Answer every question with each kind of score, and by a dense model's own ranking where one is given; that one is
    compared with the same ranking without scores.

    Args:
        task: with the hits of depth `relevance.DEPTH`.
    """
    own = None if dense is None else _ranked(task, dense)
    used = sorted({key for hits in (*task.hits, *(own or [])) for key in list(hits)[:top_k]})
    rows = {key: i for i, key in enumerate(used)}
    exact, _ = bench.atoms([task.texts[key] for key in used], on_atoms)
    decoded = bench.read(exact, codec)

    def answered(hits: Sequence[dict[str, float]], relevances: Callable[[Sequence[float]], list[float]]) -> list[float]:
        weighed = [
            dict(list(zip(found, relevances(list(found.values())), strict=True))[:top_k]) if found else {}
            for found in hits
        ]
        sums = bench.sums(replace(task, hits=weighed), decoded, rows, top_k)
        on_row(1)
        return bench.scores(task.questions, -bench.adapter.step_sizes * sums)

    found = {kind: answered(task.hits, relevances) for kind, relevances in KINDS.items()}
    made = [_scored(bench.name, task, kind, top_k, scores, found[BM25]) for kind, scores in found.items()]
    if own is not None:
        order = answered(own, lambda scores: by_rank(len(scores)))
        cosines = answered(own, lambda scores: from_candidates(scores, scores))
        made.append(_scored(bench.name, task, "a dense model's order alone", top_k, order, order))
        made.append(_scored(bench.name, task, "a dense model's cosines", top_k, cosines, order))
    return made


def _ranked(task: Task, dense: Embedder) -> list[dict[str, float]]:
    """The deeper candidates of each question by cosine."""
    import torch
    from torch.nn.functional import normalize

    keys = list(task.texts)
    documents = normalize(torch.tensor(dense.documents([task.texts[key] for key in keys])), dim=1)
    hits = []
    for question in task.questions:
        cosines = documents @ normalize(torch.tensor(dense.query(question.question)), dim=0)
        best = cosines.topk(min(DEPTH, len(keys)))
        hits.append({keys[i]: value for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)})
    return hits


def _scored(init: str, task: Task, kind: str, top_k: int, scores: list[float], of: list[float]) -> Scored:
    behind = bootstrap([there - here for here, there in zip(scores, of, strict=True)])
    return Scored(init, task.name, kind, top_k, bootstrap(scores), behind)


def report(rows: Sequence[Scored], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench scores`."""
    return {"settings": settings, "rows": [asdict(row) for row in rows]}
