"""Question-answering data: a folder with `corpus.jsonl` and `qa.jsonl`, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrad_qdrant.bank.layouts import CORPUS
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import QuestionType


@dataclass(frozen=True)
class Passage:
    """One document: its id, the text that becomes an atom, and the fields that go into the payload."""

    id: str
    text: str
    payload: dict[str, Any] = field(default_factory=dict)


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


def read_corpus(path: Path) -> list[Passage]:
    """The passages of a `corpus.jsonl`: one object a line with at least `id` and `text`.

    Raises:
        DataError: for a line that is no object, lacks a field, has an empty text or repeats an id; the
            error names the file and the line.
    """
    passages: dict[str, Passage] = {}
    for place, row in _rows(path):
        key, text = _field(row, "id", place), _field(row, "text", place)
        if not text.strip():
            raise DataError(f"{place}: the text of {key!r} is empty; give it a text or remove the line")
        if key in passages:
            raise DataError(f"{place}: the id {key!r} is there twice; ids must be unique")
        passages[key] = Passage(key, CORPUS.text_of(row) or text, row)
    if not passages:
        raise DataError(f"{path}: no passages; expected one JSON object a line with 'id' and 'text'")
    return list(passages.values())


def read_questions(path: Path) -> list[Question]:
    """The questions of a `qa.jsonl`: one object a line with at least `id`, `question` and `answers`.

    Raises:
        DataError: as `read_corpus`.
    """
    known = {"id", "question", "answers", "gold_ids", "split", "type", "choices"}
    questions = []
    for place, row in _rows(path):
        answers = row.get("answers")
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{place}: 'answers' must be a list with at least one answer, found {answers!r}")
        if not _field(row, "question", place).strip():
            raise DataError(f"{place}: the question is empty")
        questions.append(
            Question(
                id=_field(row, "id", place),
                question=_field(row, "question", place),
                answers=tuple(str(answer) for answer in answers),
                gold_ids=tuple(row.get("gold_ids") or ()),
                split=row.get("split") or "",
                type=row.get("type") or "open",
                choices=tuple(row.get("choices") or ()),
                fields={name: value for name, value in row.items() if name not in known},
            )
        )
    if not questions:
        raise DataError(f"{path}: no questions; expected one JSON object a line with 'id', 'question' and 'answers'")
    return questions


def read_folder(folder: Path) -> Dataset:
    """A folder that holds `corpus.jsonl` and `qa.jsonl`."""
    return Dataset(folder.name, read_corpus(folder / "corpus.jsonl"), read_questions(folder / "qa.jsonl"))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}")
            yield place, row


def _field(row: dict[str, Any], name: str, place: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(
            f"{place}: the field {name!r} is missing or no string; fields found: {', '.join(row) or 'none'}"
        )
    return str(row[name])
