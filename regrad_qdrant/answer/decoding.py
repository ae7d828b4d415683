"""The way that an answer is found: written freely, the likeliest of its options, or a span of the retrieved texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from regrad_qdrant.answer.generation import Asking, Generated, choose, generate
from regrad_qdrant.answer.grounding import ground
from regrad_qdrant.answer.retrieval import Found
from regrad_qdrant.answer.spans import SpanReader, Spans
from regrad_qdrant.model.prompts import Prompt

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Task:
    """What the model is asked, and the spans that its answer is one of; None: it writes freely."""

    prompt: Prompt
    spans: Spans | None = None

    @property
    def way(self) -> str:
        """Tasks of one way can be answered together."""
        return "chosen" if self.prompt.options else "written" if self.spans is None else "grounded"

    @property
    def rows(self) -> int:
        """Of the batch whose rows have updates: one, or one for each spelling of each option."""
        return max(1, len(self.prompt.spellings))


class Decoder:
    """Finds answers with a model as it is at the moment: the caller applies updates to it.

    Args:
        beams: of the search for a grounded answer.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, asking: Asking, beams: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._asking = asking
        self._beams = beams

    def task(self, found: Found) -> Task:
        """What one question's documents make of it: where they have no words, it is answered freely."""
        prompt = found.asked.prompt(found.hits)
        if not found.asked.grounded or prompt.options:
            return Task(prompt)
        return Task(prompt, self._reader.spans([hit.text for hit in found.sources]) or None)

    def answers(self, tasks: Sequence[Task], **streaming: Any) -> list[Generated]:
        """The answers to tasks of one way, in their order.

        Args:
            streaming: as `generate` has it, of a single prompt.
        """
        prompts, way = [task.prompt for task in tasks], tasks[0].way
        if way == "chosen":
            return choose(self._model, self._tokenizer, prompts, self._asking)
        if way == "written":
            return generate(self._model, self._tokenizer, prompts, self._asking, **streaming)
        spans = [task.spans for task in tasks if task.spans is not None]
        return ground(self._model, self._tokenizer, prompts, spans, self._asking, self._beams)

    @cached_property
    def _reader(self) -> SpanReader:
        return SpanReader(self._tokenizer)


def parts(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """The tasks that are answered together: those of one way, and of those that choose as many as make no more rows
    than there are tasks."""
    for way in ("written", "grounded"):
        if part := [i for i, task in enumerate(tasks) if task.way == way]:
            yield part
    part = []
    for i, task in enumerate(tasks):
        if task.way != "chosen":
            continue
        if part and sum(tasks[j].rows for j in part) + task.rows > len(tasks):
            yield part
            part = []
        part.append(i)
    if part:
        yield part
