"""What is asked, in which mode, and what comes back.

direct      the bare model                         rag         the bare model, passages in the prompt
pe-rag      as rag, with a stronger prompt
regrad      atoms applied, question alone          regrad+icl  atoms applied, passages in the prompt
online      atoms computed now, none stored        random      atoms of other documents of the bank (a control)
init        φ₀ with no atoms (a control)           init+icl    φ₀ with no atoms, passages in the prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from regrad_qdrant.bank.documents import check_unicode, filter_of
from regrad_qdrant.errors import DataError, RegradError
from regrad_qdrant.model.prompts import Prompt, QuestionType, Style

if TYPE_CHECKING:
    from qdrant_client.models import Filter

    from regrad_qdrant.answer.generation import Finish
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.bank.stores.base import PointId, Vector

Mode = Literal["direct", "rag", "pe-rag", "regrad", "regrad+icl", "online", "random", "init", "init+icl"]
MODES: tuple[Mode, ...] = get_args(Mode)
Grounded = bool | Literal["auto"]
WITHOUT_DOCUMENTS = ("direct", "init")
Characters = tuple[int, int]  # of a text: the first, and one past the last
BARE = ("direct", "rag", "pe-rag")  # the modes of the base model without its plug-in
WITHOUT_ATOMS = (*BARE, "init", "init+icl")
WITH_PASSAGES = ("rag", "pe-rag", "regrad+icl", "init+icl")  # in the prompt


@dataclass(frozen=True)
class Query:
    """One question, with what of `ReGrad.answer` belongs to it alone.

    `sources` are the documents that a grounded answer is a span of, where these are others than the hits; `system`
    stands in place of the prompt format's instruction, and `turns`, (role, text) each, are the conversation before.
    """

    question: str
    mode: Mode = "regrad"
    type: QuestionType = "open"
    choices: Sequence[str] = ()
    query_filter: Filter | None = None
    query: str | Vector | Mapping[str, Vector] | None = None
    hits: Sequence[Hit] | None = None
    max_new_tokens: int | None = None
    grounded: Grounded = False
    sources: Sequence[Hit] | None = None
    style: Style = "short"
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RegradError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.grounded not in (False, True, "auto"):
            raise RegradError(f"grounded is True, False or 'auto', not {self.grounded!r}")
        if self.query_filter is not None:
            object.__setattr__(self, "query_filter", filter_of(self.query_filter))
        if isinstance(self.choices, str):
            raise DataError(f"choices go in a list: [{self.choices!r}]")
        check_unicode(self.question, *self.choices, self.system or "", *(text for _, text in self.turns))

    def prompt(self, hits: Sequence[Hit]) -> Prompt:
        """What the model is asked, with the passages in the modes that show them."""
        passages = tuple(hit.text for hit in hits) if self.mode in WITH_PASSAGES else ()
        engineered = self.mode == "pe-rag"
        return Prompt(
            self.question, self.type, tuple(self.choices), passages, engineered, self.max_new_tokens, self.style,
            self.system, self.turns,
        )  # fmt: skip


@dataclass(frozen=True)
class Timings:
    """Seconds of each part of one answer; a part that the mode does not have is 0."""

    search: float = 0.0
    decode: float = 0.0
    apply: float = 0.0
    generate: float = 0.0
    restore: float = 0.0

    @property
    def total(self) -> float:
        return self.search + self.decode + self.apply + self.generate + self.restore


@dataclass(frozen=True)
class Source:
    """Where a grounded answer stands: characters of a document's text."""

    document_id: PointId
    start: int
    end: int  # one past the last


@dataclass(frozen=True)
class Answer:
    """An answer with what it came from."""

    text: str
    mode: Mode
    hits: list[Hit] = field(repr=False)  # best first; those of `random` are the documents whose atoms were applied
    timings: Timings
    prompt_tokens: int
    weights: dict[PointId, float] = field(default_factory=dict)  # of the atoms that were applied, by point
    notes: tuple[str, ...] = ()  # what was left out, and why, for people to read
    skipped: dict[PointId, str] = field(default_factory=dict)  # of each retrieved point without an atom applied, why
    windows: dict[PointId, dict[Characters, float]] = field(default_factory=dict)  # shares of a text's applied parts
    source: Source | None = None  # of a grounded answer
    finish: Finish = "stop"  # "length" of one that was cut at `max_new_tokens`
