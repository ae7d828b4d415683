"""Parametric RAG (PRAG; Su et al. 2025): an adapter trained for each document, stored, and merged at query time.

As there, a document is augmented: with a rewriting of it and questions about it, and an adapter learns all of that,
prompt and answer, token by token. Two things differ, for want of a larger language model: the rewriting is the
document's sentences in another order, and the questions are the package's cloze questions.

An adapter here is a change of B in the layers that ReGrad adapts, A being shared. So the adapters of several documents
add up to exactly the sum of their ΔW, as PRAG merges them, and one has the form of an atom, of −ΔB in the space
`values` at a step size of 1: a bank stores it, and a query applies it, as any other.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regrad_loaders.baselines.continued import precision
from regrad_loaders.data.cloze import INSTRUCTION, blanks
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.merge import MergeRule, length_weight
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.gradients import EncodedDocument, GradientComputer, batches, document_losses, pad
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.plugin import base_of, row_updates
from regrad_qdrant.model.prompts import Prompt, PromptFormat

LEARNING_RATE = 3e-3
EPOCHS = 3
QUESTIONS = 3  # about each document, at most
CODEC = "fp16"  # of a stored adapter
MERGE = MergeRule("sum")

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def _unseen(_: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


class DocumentAdapters(GradientComputer):
    """Trains an adapter for each text, where a `GradientComputer` takes its gradient.

    Documents train side by side, row i of every batch with its own change: Adam works number by number, so that each
    is trained as it would be alone.

    Args:
        adapter: of an initialization in the space `values` whose step sizes are 1.
        format: of the prompts that questions are put in.
        progress: a block that shows a training, from the number of its steps, each document's counted; it yields what
            advances it.
    """

    def __init__(
        self,
        adapter: Adapter,
        tokenizer: Any,
        format: PromptFormat,
        *,
        epochs: int = EPOCHS,
        learning_rate: float = LEARNING_RATE,
        seed: int = 0,
        progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] = _unseen,
    ) -> None:
        super().__init__(adapter.model, tokenizer, adapter.space, adapter.initialization.max_length, adapter.initial)
        self.format, self.epochs, self.learning_rate, self.seed = format, epochs, learning_rate, seed
        self._progress = progress
        self.seconds: list[float] = []  # that each document took

    def windows(self, text: str, most: int | None = None) -> list[EncodedDocument]:
        """One adapter a text: it learns all of what `max_length` leaves of it."""
        return [self.encode(text)]

    def atoms_in_batches(
        self,
        documents: Sequence[EncodedDocument],
        max_tokens: int,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """−ΔB of every document (documents, numel), trained in batches of at most `max_tokens` tokens."""
        examples = [self.examples(document) for document in documents]
        lengths = [max(map(len, of_one)) for of_one in examples]
        found = torch.empty(len(documents), self.space.numel)
        with self._progress(self.epochs * sum(map(len, examples))) as advance:
            for batch in batches(lengths, max_tokens):
                started = time.perf_counter()
                trained = self._trained([examples[i] for i in batch], advance).cpu()
                self.seconds += [(time.perf_counter() - started) / len(batch)] * len(batch)
                for i, change in zip(batch, trained, strict=True):  # a short text's atom is weighed down; this is none
                    found[i] = -change / length_weight(len(documents[i].ids))
                on_batch(len(batch))
        return found

    def examples(self, document: EncodedDocument) -> list[list[int]]:
        """What an adapter learns: token ids of prompts with the passage, or its rewriting, and the answer, and of the
        last question alone; of a text without a question the text and its rewriting. As many for every document."""
        text = self.tokenizer.decode(document.ids, skip_special_tokens=True)
        rng = random.Random(f"{self.seed}-{text}")
        sentences = _SENTENCE.split(text)
        rewriting = " ".join(rng.sample(sentences, len(sentences)))
        found = blanks(text)
        asked = rng.sample(found, min(QUESTIONS, len(found)))
        shown = [(passage, one) for one in asked[:-1] or asked for passage in (text, rewriting)]
        learned = [self._example(question, answer, (passage,)) for passage, (question, answer) in shown]
        learned += [self._example(question, answer, ()) for question, answer in asked[-1:]]
        learned = learned or [document.ids, self.tokenizer(rewriting).input_ids]
        return [learned[i % len(learned)] for i in range(2 * QUESTIONS - 1)]

    def _example(self, question: str, answer: str, passages: tuple[str, ...]) -> list[int]:
        prompt = Prompt(f"{INSTRUCTION} {question}", passages=passages).render(self.tokenizer, self.format)
        asked: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return [*asked, *self.format.target(self.tokenizer, answer, 40)]

    def _trained(self, examples: Sequence[Sequence[list[int]]], advance: Callable[[int], None]) -> Tensor:
        """The change (documents, numel) that each document's examples teach, one of each a step."""
        device = input_device(base_of(self.model))
        with self._turn(), torch.inference_mode(False), torch.enable_grad():
            changes = {
                name: torch.zeros(len(examples), *shape, device=device, requires_grad=True)
                for name, shape in self.space.shapes.items()
            }
            optimizer = torch.optim.AdamW(list(changes.values()), lr=self.learning_rate, weight_decay=0.0)
            for step in range(self.epochs * len(examples[0])):
                rows = [of_one[step % len(of_one)] for of_one in examples]
                ids, mask = pad(rows, self.tokenizer.pad_token_id or 0, device)
                with row_updates(self.model, self.space, changes), precision(self.model):
                    document_losses(self.model, ids, mask).sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                advance(len(examples))
            return self.space.flatten({name: change.detach().float() for name, change in changes.items()})


def without_steps(start: MetaInitialization) -> MetaInitialization:
    """The same A and B for adapters that are added as they are: step sizes of 1, merged as PRAG merges."""
    return start.with_step_sizes(dict.fromkeys(start.step_sizes, 1.0), MERGE)
