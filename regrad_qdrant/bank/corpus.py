"""A corpus to fill a bank from: `corpus.jsonl`, read and checked line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.layouts import CORPUS
from regrad_qdrant.bank.stores.base import PointId
from regrad_qdrant.errors import DataError


@dataclass(frozen=True)
class Passage:
    """One document: its id, the text that becomes an atom, and the fields that go into the payload."""

    id: str
    text: str
    payload: dict[str, Any] = field(default_factory=dict)


def read_corpus(path: Path) -> list[Passage]:
    """The passages of a `corpus.jsonl`: one object a line with at least `id` and `text`.

    Raises:
        DataError: for a line that is no object, lacks a field, has an empty text or repeats an id (a UUID may be spelt
            in several ways); the error names the file and the line.
    """
    passages: dict[PointId, Passage] = {}
    empty: list[str] = []
    for place, row in json_rows(path):
        key, text = string_field(row, "id", place), string_field(row, "text", place)
        if not text.strip():
            empty.append(f"the text of {key!r} is empty ({place})")
        if (point := point_id(key)) in passages:
            raise DataError(f"{place}: the id {key!r} is there twice; ids must be unique")
        passages[point] = Passage(key, CORPUS.text_of(row) or text, row)
    if empty:
        raise DataError(f"{listed(empty)}: give each a text, or remove the line")
    if not passages:
        raise DataError(f"{path}: no passages; expected one JSON object a line with 'id' and 'text'")
    return list(passages.values())


def listed(found: list[str], shown: int = 5) -> str:
    """What was found, the first ones in words."""
    return "; ".join(found[:shown]) + (f"; and {len(found) - shown} more" if len(found) > shown else "")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each after its place in words for an error.

    Raises:
        DataError: for a file that is not there, or a line that is no JSON object in UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: a folder, where a file was expected" if path.is_dir() else f"{path}: no such file")
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


def string_field(row: dict[str, Any], name: str, place: str) -> str:
    """The string under a name.

    Raises:
        DataError: if there is none.
    """
    if not isinstance(row.get(name), str):
        found = f"{row[name]!r}, which is no string" if name in row else f"the fields {', '.join(row) or '(none)'}"
        raise DataError(f"{place}: the field {name!r} must be a string; found {found}")
    return str(row[name])
