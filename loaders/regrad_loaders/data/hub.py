"""Question-answering data of the Hugging Face Hub, or any that `datasets` loads, by a mapping of its fields."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from regrad_loaders.data.folders import Dataset, Question
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.errors import DataError

FIELDS = ("question", "answers", "passages", "id", "type", "choices")
NEEDED = ("question", "answers", "passages")


def read_hub(name: str, split: str, fields: Mapping[str, str], config: str | None = None) -> Dataset:
    """One split of a dataset, its passages gathered from its rows.

    Args:
        name: as `datasets.load_dataset` takes it: a repository of the Hub, or a local folder.
        fields: where a row holds `question`, `answers` and `passages`, and perhaps `id`, `type` and `choices`. A dot
            goes into an object, or into every object of a list: `answers.text`. Answers and passages may be a text or
            a list of texts; every passage of a row counts as its question's gold passage.
        config: of a dataset that has several.

    Rows without an answer or a passage are left out.

    Raises:
        DataError: without the package `datasets`, for data that it can't load, or a field that rows do not have.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("data of the Hub needs datasets: pip install 'regrad-qdrant[hub]'") from error
    unknown, missing = set(fields) - set(FIELDS), set(NEEDED) - set(fields)
    if unknown or missing:
        raise DataError(
            f"{name}: fields maps {', '.join(FIELDS)}; unknown {sorted(unknown)}, missing {sorted(missing)}"
        )
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises its own kinds, and those of its readers
        raise DataError(f"can't load {name!r}, split {split!r}: {error}") from error
    return _gathered(name, split, rows, fields)


def _gathered(name: str, split: str, rows: Iterable[Mapping[str, Any]], fields: Mapping[str, str]) -> Dataset:
    passages: dict[str, Passage] = {}
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows):
        place = f"{name}, {split}, row {number}"
        found = {field: _texts(row, path, place) for field, path in fields.items()}
        texts = [text for text in found["passages"] if text.strip()]
        if not found["answers"] or not texts or not found["question"]:
            continue
        gold = tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)
        passages |= {key: Passage(key, text, {"text": text}) for key, text in zip(gold, texts, strict=True)}
        key = (found.get("id") or [str(number)])[0]
        if key in questions:
            raise DataError(f"{place}: the id {key!r} is an earlier row's; map a field that tells rows apart, or none")
        questions[key] = Question(
            id=key,
            question=found["question"][0],
            answers=tuple(dict.fromkeys(found["answers"])),
            gold_ids=tuple(dict.fromkeys(gold)),
            split=split,
            type=(found.get("type") or ["open"])[0],
            choices=tuple(found.get("choices") or ()),
        )
    if not questions:
        raise DataError(f"{name}: no row of the split {split!r} has a question, an answer and a passage")
    return Dataset(name, list(passages.values()), list(questions.values()))


def _texts(row: Any, path: str, place: str) -> list[str]:
    """The texts at a dotted path, depth first."""
    found = [row]
    for part in path.split("."):
        into: list[Any] = []
        for value in found:
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, Mapping) or part not in item:
                    has = ", ".join(item) if isinstance(item, Mapping) else type(item).__name__
                    raise DataError(f"{place}: no field {path!r}; at {part!r} there is {has}")
                into.append(item[part])
        found = into
    flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
    return [str(item) for item in flat if item is not None]
