"""How much each retrieved document's atom counts: by the merge rule, its text's length, and the question's words.

No model is needed for it, so that a process without one can weigh what another one merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.atoms.merge import length_weight, window_shares
from regrad_qdrant.bank.documents import relevances
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.gradients import document_ids

if TYPE_CHECKING:
    from regrad_qdrant.answer.query import Characters
    from regrad_qdrant.atoms.merge import MergeRule
    from regrad_qdrant.atoms.record import Record
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.bank.stores.base import PointId

LONG = 1000  # characters of a text that surely has more tokens than a short one
NEGLIGIBLE = 1e-3  # share of a window, beside the largest, that is left out


@dataclass(frozen=True)
class Weighed:
    """The atoms of one question's documents: Σ sharesᵢ·g(recordsᵢ) is its update, before the step sizes."""

    records: list[Record]
    shares: list[float]  # of each record
    weights: dict[PointId, float]  # of each document
    windows: dict[PointId, dict[Characters, float]]  # of each document, the shares of its windows


class Weighing:
    """Weighs the atoms of retrieved documents.

    Args:
        tokenizer: of the base model.
        bank: of the documents. It is not read before something is weighed.
    """

    def __init__(self, merge: MergeRule, tokenizer: Any, bank: GradientBank) -> None:
        self.merge = merge
        self._tokenizer = tokenizer
        self._bank = bank

    @property
    def bm25(self) -> Bm25:
        """In the language that the bank's own has, or in English: for windows of long texts, and for sentences."""
        found = (embedder for embedder in self._bank.embedders.values() if isinstance(embedder, Bm25))
        return next(found, None) or Bm25()

    def weights(self, hits: Sequence[Hit]) -> list[float]:
        """wᵢ of these documents' atoms, best first: the merge rule's, less for short texts (`merge.length_weight`)."""
        weights = self.merge.weights(relevances(hits))
        return [weight * self._length_weight(hit.text) for hit, weight in zip(hits, weights, strict=True)]

    def window_weights(self, question: str, windows: Sequence[str]) -> list[float]:
        """The shares of a long text's windows (`merge.window_shares`)."""
        return window_shares(self.merge, self.bm25.scores(question, windows))

    def weighed(self, hits: Sequence[Hit], question: str) -> Weighed:
        """All atoms of these documents that count, with the share of each."""
        weights = self.weights(hits)
        parts = [self._windows(hit, question) for hit in hits]
        return Weighed(
            records=[record for windows in parts for record, _, _ in windows],
            shares=[weight * share for weight, part in zip(weights, parts, strict=True) for _, _, share in part],
            weights={hit.id: weight for hit, weight in zip(hits, weights, strict=True)},
            windows={hit.id: {span: share for _, span, share in part} for hit, part in zip(hits, parts, strict=True)},
        )

    def _length_weight(self, text: str) -> float:
        if len(text) > LONG:
            return 1.0
        try:
            return length_weight(len(document_ids(self._tokenizer, text)))
        except DataError:
            return 1.0

    def _windows(self, hit: Hit, question: str) -> list[tuple[Record, Characters, float]]:
        """The windows of a text that count, with the characters and the share of each."""
        if hit.record is None:
            return []
        if not hit.record.rest:
            return [(hit.record, (0, len(hit.text)), 1.0)]
        spans = hit.record.spans
        shares = self.window_weights(question, [hit.text[start:end] for start, end in spans])
        windows = zip(hit.record.windows(), spans, shares, strict=True)
        return [(window, span, share) for window, span, share in windows if share > NEGLIGIBLE * max(shares)]
