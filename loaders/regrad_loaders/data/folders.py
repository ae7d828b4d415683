"""Question-answering data: a folder with `corpus.jsonl` and `qa.jsonl`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrad_qdrant.bank.corpus import Passage, json_rows, read_corpus, string_field
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import QuestionType


@dataclass(frozen=True)
class Question:
    """One question; `type` is the set's own word for its kind, `kind` the prompt it gets."""

    id: str
    question: str
    answers: tuple[str, ...]
    gold_ids: tuple[str, ...] = ()
    split: str = ""
    type: str = "open"
    choices: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> QuestionType:
        if self.choices:
            return "choice"
        answers = {answer.strip().lower() for answer in self.answers}
        return "yesno" if self.type.startswith("yesno") or answers <= {"yes", "no"} else "open"


@dataclass(frozen=True)
class Dataset:
    """A corpus and the questions about it."""

    name: str
    passages: list[Passage]
    questions: list[Question]

    def split(self, *names: str) -> list[Question]:
        return [question for question in self.questions if question.split in names]


def read_questions(path: Path) -> list[Question]:
    """The questions of a `qa.jsonl`: one object a line with at least `id`, `question` and `answers`.

    Raises:
        DataError: as `read_corpus`.
    """
    known = {"id", "question", "answers", "gold_ids", "split", "type", "choices"}
    questions: dict[str, Question] = {}
    for place, row in json_rows(path):
        answers = _texts(row, "answers", place)
        if not any(answer.strip() for answer in answers):
            raise DataError(f"{place}: 'answers' must be a list with at least one answer, found {list(answers)}")
        if not string_field(row, "question", place).strip():
            raise DataError(f"{place}: the question is empty")
        key = string_field(row, "id", place)
        if key in questions:
            raise DataError(f"{place}: the id {key!r} is there twice")
        questions[key] = Question(
            id=key,
            question=string_field(row, "question", place),
            answers=tuple(answer for answer in answers if answer.strip()),
            gold_ids=_texts(row, "gold_ids", place),
            split=str(row.get("split") or ""),
            type=str(row.get("type") or "open"),
            choices=_texts(row, "choices", place),
            fields={name: value for name, value in row.items() if name not in known},
        )
    if not questions:
        raise DataError(f"{path}: no questions; expected one JSON object a line with 'id', 'question' and 'answers'")
    return list(questions.values())


def _texts(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A field that is a list of texts, or of numbers that stand for texts; empty where there is none."""
    values = row.get(name) or []
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise DataError(f"{place}: {name!r} must be a list of texts, found {values!r}")
    return tuple(str(value) for value in values)


def read_folder(folder: Path) -> Dataset:
    """A folder that holds `corpus.jsonl` and `qa.jsonl`."""
    return Dataset(folder.name, read_corpus(folder / "corpus.jsonl"), read_questions(folder / "qa.jsonl"))
