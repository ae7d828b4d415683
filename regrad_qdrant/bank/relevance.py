"""From retrieval scores to relevances, which say the same whatever the scores are.

A relevance is 1 for the best document of a search and falls with its distance from it. It must not depend on what a
score is: BM25 starts at zero, the cosines of one model lie between 0.80 and 0.85, distances grow where others fall. So
the distance from the best is measured by how far the scores of that very search fall over its deeper candidates:

    rᵢ = 1 − (1 − R_D)·(best − sᵢ)/(best − s_D)

with s_D the score of the D-th candidate and R_D the relevance that a D-th candidate typically has. Scale, offset and
direction cancel. BM25, which has a zero of its own (a text that shares no word with the question), needs no deeper
candidates: rᵢ = sᵢ/best. Where nothing but the order is known, the typical relevances of the ranks stand in.
"""

from __future__ import annotations

from collections.abc import Sequence

DEPTH = 20  # candidates whose scores are looked at
# Median of score/best by rank of BM25: the mean of Natural Questions, SQuAD 2.0, SquadShifts, HotpotQA and phantomwiki.
TYPICAL = (
    1.0, 0.76, 0.68, 0.61, 0.55, 0.52, 0.49, 0.46, 0.45, 0.43,
    0.41, 0.40, 0.39, 0.38, 0.37, 0.36, 0.35, 0.34, 0.34, 0.33,
)  # fmt: skip


def typical(rank: int) -> float:
    """The relevance of a document of which nothing but its rank is known, 0 the best."""
    return TYPICAL[min(rank, len(TYPICAL) - 1)]


def by_rank(count: int) -> list[float]:
    """The relevances of so many documents, best first, of which nothing but the order is known."""
    return [typical(rank) for rank in range(count)]


def from_zero(scores: Sequence[float]) -> list[float]:
    """The relevances of scores with a zero of their own, best first."""
    if not scores or scores[0] <= 0:
        return by_rank(len(scores))
    return [score / scores[0] for score in scores]


def from_candidates(scores: Sequence[float], candidates: Sequence[float]) -> list[float]:
    """The relevances of scores, best first, by those of the search's deeper candidates, which begin with them."""
    if len(candidates) < 2:
        return by_rank(len(scores))
    best, deepest = candidates[0], candidates[-1]
    if best == deepest:
        return [1.0] * len(scores)
    fall = (1 - typical(len(candidates) - 1)) / (best - deepest)
    return [1 - fall * (best - score) for score in scores]
