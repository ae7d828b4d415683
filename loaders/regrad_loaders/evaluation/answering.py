"""What an evaluation asks: anything that answers queries over a bank, as `ReGrad` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from regrad_qdrant.answer.query import Answer, Query
from regrad_qdrant.bank.bank import GradientBank


class Answering(Protocol):
    """Answers batches of questions from what its bank finds."""

    @property
    def bank(self) -> GradientBank: ...

    def answer_many(
        self, questions: Sequence[str | Query], *, top_k: int = 3, using: str | Sequence[str] | None = None
    ) -> list[Answer]: ...
