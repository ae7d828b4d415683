"""Questions with the passages that were retrieved for each: the folders `data_aug/SET/*.json` of PRAG and of ReGrad's
authors, one list of objects a file, with `question`, `answer`, `passages` and perhaps `choices`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrad_loaders.data.folders import Dataset, Question
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.errors import DataError

SPLITS = ("train", "dev", "test", "validation")
_IDS, _TEXTS = ("id", "qid", "test_id", "_id"), ("text", "passage", "contents", "paragraph_text")


def read_augmented(path: Path, split: str | None = None) -> Dataset:
    """A file, or all of a folder. A question's split is its file's name, where that is one, or else `split`; its
    passages count as found for it (`Question.fields["retrieved"]`), best first, and none as gold.

    Raises:
        DataError: for a file that can't be read, or an object without a question, an answer or passages; it is named.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .json file in it")
    passages: dict[str, Passage] = {}
    questions: list[Question] = []
    for file in files:
        named = file.stem if file.stem in SPLITS else split or "train"
        for number, row in enumerate(_rows(file)):
            place = f"{file}, object {number}"
            found = _passages(row, place)
            passages |= {passage.id: passage for passage in found}
            questions.append(_question(row, place, file.stem, number, named, [one.id for one in found]))
    if not questions:
        raise DataError(f"{path}: no questions")
    if twice := [key for key, count in Counter(question.id for question in questions).items() if count > 1]:
        raise DataError(f"{path}: two questions have the id {twice[0]!r} (file and id)")
    return Dataset(path.stem, list(passages.values()), questions)


def _rows(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"can't read {file}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of objects, found {type(rows).__name__}")
    return rows


def _question(row: Mapping[str, Any], place: str, file: str, number: int, split: str, found: list[str]) -> Question:
    asked, answer = row.get("question"), row.get("answer", row.get("answers"))
    answers = answer if isinstance(answer, list) else [answer]
    given = [str(one) for one in answers if one is not None and str(one).strip()]
    if not isinstance(asked, str) or not asked.strip() or not given:
        raise DataError(f"{place}: needs a question and an answer; its fields are {', '.join(row)}")
    choices = row.get("choices") or ()
    texts = list(choices.values()) if isinstance(choices, Mapping) else list(choices)
    name = next((str(row[field]) for field in _IDS if row.get(field) is not None), str(number))
    return Question(
        f"{file}-{name}", asked, tuple(dict.fromkeys(given)), (), split, str(row.get("type") or "open"),
        tuple(map(str, texts)), {"retrieved": tuple(dict.fromkeys(found))},
    )  # fmt: skip


def _passages(row: Any, place: str) -> list[Passage]:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}")
    given = row.get("passages", row.get("augment"))
    if not isinstance(given, list) or not given:
        raise DataError(f"{place}: 'passages' must be a list with at least one passage, found {given!r}")
    texts = [_text(one, place) for one in given]
    keys = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return [Passage(key, text, {"id": key, "text": text}) for key, text in zip(keys, texts, strict=True)]


def _text(given: Any, place: str) -> str:
    if isinstance(given, Mapping):
        given = next((given[name] for name in _TEXTS if isinstance(given.get(name), str)), None)
    if not isinstance(given, str) or not given.strip():
        raise DataError(f"{place}: a passage is a text, or an object with one of {', '.join(_TEXTS)}")
    return given
