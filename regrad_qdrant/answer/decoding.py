"""The way that an answer is found: written freely, the likeliest of its options, or a span of the retrieved texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from regrad_qdrant.answer.generation import Asking, Generated, choose, generate, mean_log_probabilities
from regrad_qdrant.answer.grounding import ground
from regrad_qdrant.answer.retrieval import Found
from regrad_qdrant.answer.spans import SpanReader, Spans
from regrad_qdrant.model.prompts import Prompt

if TYPE_CHECKING:
    from peft import PeftModel

    from regrad_qdrant.answer.weighing import Weighing


Way = Literal["chosen", "written", "grounded", "either"]
SURER = 2.0  # by how much of mean log-probability the free answer must be likelier than the best span, to be given
SURER_OF_COUNTS = 1.0  # … where it is a number of one or two digits: few texts say how many of something they name

_COUNT = re.compile(r"\d{1,2}")


@dataclass(frozen=True)
class Task:
    """What the model is asked, and the spans that its answer is one of; None: it writes freely."""

    prompt: Prompt
    spans: Spans | None = None
    either: bool = False  # the model may prefer to write freely

    @property
    def way(self) -> Way:
        """Tasks of one way can be answered together."""
        if self.prompt.options:
            return "chosen"
        return "written" if self.spans is None else "either" if self.either else "grounded"

    @property
    def rows(self) -> int:
        """Of the batch: one, or one for each spelling of each option."""
        return max(1, len(self.prompt.spellings))


class Decoder:
    """Finds answers with a model as it is at the moment: the caller applies updates to it.

    Args:
        weighing: its BM25 is for the sentences of a grounded answer.
        beams: of the search for one.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, asking: Asking, weighing: Weighing, beams: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._asking = asking
        self._weighing = weighing
        self._beams = beams

    def task(self, found: Found) -> Task:
        """What one question's documents make of it: where they have no words, it is answered freely."""
        prompt = found.asked.prompt(found.hits)
        if not found.asked.grounded or prompt.options:
            return Task(prompt)
        score = functools.partial(self._weighing.bm25.scores, found.asked.question)
        spans = self._reader.spans([hit.text for hit in found.sources], score) or None
        return Task(prompt, spans, found.asked.grounded == "auto")

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
        grounded = ground(self._model, self._tokenizer, prompts, spans, self._asking, self._beams)
        if way == "grounded":
            return grounded
        free = generate(self._model, self._tokenizer, prompts, self._asking)
        sure = mean_log_probabilities(self._model, self._tokenizer, prompts, [one.text for one in free], self._asking)
        return [
            own if _surer(own.text, likely, span) else span
            for own, span, likely in zip(free, grounded, sure, strict=True)
        ]

    def with_beams(self, beams: int) -> Decoder:
        """The same with another width of the search."""
        return Decoder(self._model, self._tokenizer, self._asking, self._weighing, beams)

    @cached_property
    def _reader(self) -> SpanReader:
        return SpanReader(self._tokenizer)


def _surer(text: str, log_probability: float, span: Generated) -> bool:
    """Whether a free answer of such a mean log-probability is given in place of the best span."""
    if span.log_probability is None:
        return True
    least = SURER_OF_COUNTS if _COUNT.fullmatch(text.strip()) else SURER
    return log_probability - span.log_probability > least


def parts(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """The tasks that are answered together: those of one way, and of those that choose as many as make no more rows
    than there are tasks."""
    ways: tuple[Way, ...] = ("written", "grounded", "either")
    for way in ways:
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
