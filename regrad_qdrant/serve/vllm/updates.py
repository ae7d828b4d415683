"""What a ReGrad does up to the merge, where vLLM has the model: search, weigh, and pack what its worker merges."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regrad_qdrant.answer.filling import NONE_USABLE, as_stored
from regrad_qdrant.answer.generation import Asking
from regrad_qdrant.answer.pipeline import Merged
from regrad_qdrant.answer.query import BARE
from regrad_qdrant.answer.retrieval import Retrieval
from regrad_qdrant.answer.weighing import Weighing
from regrad_qdrant.errors import RecordError
from regrad_qdrant.serve.vllm.packed import PackedUpdate

if TYPE_CHECKING:
    from regrad_qdrant.answer.retrieval import Found
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.model.initialization import MetaInitialization


class Updates:
    """The documents and updates of one initialization's requests.

    Args:
        tokenizer: of the base model.
        bank: whose space is the initialization's.
    """

    def __init__(self, initialization: MetaInitialization, tokenizer: Any, bank: GradientBank) -> None:
        self.initialization, self.tokenizer, self.bank = initialization, tokenizer, bank
        self.asking = Asking(initialization.prompt)
        self.retrieval = Retrieval(bank)
        self._weighing = Weighing(initialization.merge, tokenizer, bank)

    def merged(self, found: Found) -> tuple[PackedUpdate | None, Merged]:
        """The update of a question's usable atoms, and what is to be told of them; None for the bare model.

        Every atom is decoded once here, so that none that can't be meets the worker, where it would stop more than its
        own request.
        """
        if found.asked.mode in BARE:
            return None, Merged(None, {}, found.notes, {})
        usable = as_stored([self._examined(hit) for hit in found.hits])
        weighed = self._weighing.weighed(usable.hits, found.asked.question)
        notes = [*found.notes, *usable.notes]
        if found.hits and not usable.hits:
            notes.append(NONE_USABLE)
        update = PackedUpdate(self.initialization.fingerprint, weighed.records, weighed.shares)
        return update, Merged(None, weighed.weights, notes, usable.skipped, weighed.windows)

    def _examined(self, hit: Hit) -> Hit:
        if hit.record is None:
            return hit
        try:
            hit.record.decode(self.initialization.fingerprint, self.initialization.space.layout)
        except RecordError as error:
            return replace(hit, damaged=str(error))
        return hit
