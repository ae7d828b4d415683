"""Merge rules: from the scores of the retrieved documents to the weights of their atoms.

The update of one query is Δ = −α ⊙ Σ wᵢ·g(dᵢ). `sum` is the paper's rule (wᵢ = 1). The others lean on the
retrieval: a plain sum does not know whose fact is asked for, but the scores often do. Scores count relative
to the best one, s = score / best, so that the scale of BM25 or of a dense model does not matter:

    sum      wᵢ = 1
    top1     wᵢ = 1 for the best hit, 0 for the others
    softmax  wᵢ = exp(sᵢ/τ) / Σⱼ exp(sⱼ/τ)
    margin   wᵢ = exp((sᵢ − 1)/τ), so the best hit always counts in full

The temperature τ is meta-learned, and the same rule serves meta-training and queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

SHORT = 40  # tokens of a text below which its atom weighs less

RULES = ("sum", "top1", "softmax", "margin")


def length_weight(tokens: int) -> float:
    """The further weight of the atom of a text of so many tokens: 1 from `SHORT` on, in proportion below.

    The loss is a mean over tokens, so the gradient of a short text is large (its norm is 4.5 at 12 tokens, 1.3 at 90)
    and a step sized for paragraphs overshoots: of invented facts in texts of 12 tokens 58.9 F1 without this weight,
    94.2 with it (`regrad-qdrant bench lengths`).
    """
    return min(1.0, tokens / SHORT)


@dataclass(frozen=True)
class MergeRule:
    """A rule and its temperature τ (unused by `sum` and `top1`)."""

    rule: str = "sum"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise DataError(f"merge rule {self.rule!r} is not one of {', '.join(RULES)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise DataError(f"the temperature must be positive and finite, found {self.temperature}")

    def weights(self, scores: Sequence[float]) -> list[float]:
        """One weight for each score, in the scores' order. Scores need not be sorted."""
        import torch

        if not scores:
            return []
        row = torch.tensor([list(scores)], dtype=torch.float64)
        weights = merge_weights(self.rule, row, torch.ones_like(row, dtype=torch.bool), torch.tensor(self.temperature))
        return [float(weight) for weight in weights[0]]


def window_shares(rule: MergeRule, scores: Sequence[float]) -> list[float]:
    """The shares of a long text's windows: that which the question is about counts in full, the others as the rule lets
    documents of such BM25 scores. All alike where none has a word of it; under `sum` the first counts alone.
    """
    if max(scores) <= 0:
        return [1 / len(scores)] * len(scores)
    return (MergeRule("top1") if rule.rule == "sum" else rule).weights(scores)


def merge_weights(rule: str, scores: Tensor, present: Tensor, temperature: Tensor) -> Tensor:
    """The weights of a batch of queries, differentiable in the temperature.

    Args:
        scores: (queries, documents) retrieval scores.
        present: (queries, documents), true where the document was retrieved for the query.
        temperature: scalar τ > 0.

    Returns:
        (queries, documents) weights, zero where a document is not present.
    """
    import torch

    best = scores.masked_fill(~present, -math.inf).amax(dim=1, keepdim=True)
    # Relative to the best score; a best score of zero or below (some dense models) falls back to differences.
    relative = torch.where(best > 0, scores / best.clamp(min=1e-9), scores - best + 1)
    if rule == "sum":
        weights = torch.ones_like(scores)
    elif rule == "top1":
        first = scores.masked_fill(~present, -math.inf).argmax(dim=1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(1, first, 1.0)
    else:
        weights = torch.exp((relative.clamp(max=1) - 1) / temperature)
    weights = weights * present
    if rule == "softmax":
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights
