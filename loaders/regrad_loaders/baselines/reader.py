"""What baselines share that answer as `ReGrad` does, from something else than its prompts' passages."""

from __future__ import annotations

from collections.abc import Sequence

from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.answer.query import Query
from regrad_qdrant.answer.retrieval import Found
from regrad_qdrant.bank.bank import GradientBank


class Reader:
    """Searches with the model, bank and prompts of a `ReGrad`."""

    def __init__(self, regrad: ReGrad) -> None:
        self.regrad = regrad

    @property
    def bank(self) -> GradientBank:
        return self.regrad.bank

    def found(self, questions: Sequence[str | Query], top_k: int, using: str | Sequence[str] | None) -> list[Found]:
        """What each question is answered from."""
        asked = [question if isinstance(question, Query) else Query(question) for question in questions]
        return self.regrad.retrieval.retrieve(asked, top_k, using, 0)
