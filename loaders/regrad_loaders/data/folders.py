"""Question-answering data: a folder with `corpus.jsonl` and `qa.jsonl`, read and checked."""

from __future__ import annotations

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
    questions = []
    for place, row in json_rows(path):
        answers = row.get("answers")
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{place}: 'answers' must be a list with at least one answer, found {answers!r}")
        if not string_field(row, "question", place).strip():
            raise DataError(f"{place}: the question is empty")
        questions.append(
            Question(
                id=string_field(row, "id", place),
                question=string_field(row, "question", place),
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
