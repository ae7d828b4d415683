"""Where a payload keeps the text that its atom is computed from.

`LAYOUTS` are those of the frameworks; `detect` finds the one that a collection's payloads have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrad_qdrant.errors import BankError, DataError

SHOWN = 6  # candidates that an error lists
SUSPECTS = ("text", "content", "page_content", "document", "body", "chunk", "passage")


@dataclass(frozen=True)
class Layout:
    """A way to keep documents in payloads.

    Args:
        name: how it is called in reports.
        text: the path of the text; dots descend into nested objects, and into JSON where a field holds it as a
            string; a key with a dot in its name stands in double quotes. Or a function from the payload to the text;
            then `reads` names the top-level keys it needs.
        title: the path of a title, set before the text on a line of its own where the text does not hold it.
        marks: top-level keys that every payload of this layout has.
        id: the path of the id that the document's owner knows it by.
    """

    name: str
    text: str | Callable[[Mapping[str, Any]], str | None]
    title: str | None = None
    marks: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    id: str = "id"

    def __post_init__(self) -> None:
        if callable(self.text) and not self.reads:
            raise DataError(f"layout {self.name!r}: a function needs `reads`, the payload's keys that it looks at")

    def text_of(self, payload: Mapping[str, Any]) -> str | None:
        """The document's text, or None where the payload has none."""
        text = self.text(payload) if callable(self.text) else value_at(payload, self.text)
        if not isinstance(text, str) or not text.strip():
            return None
        title = value_at(payload, self.title) if self.title else None
        if isinstance(title, str) and title.strip() and title not in text:
            return f"{title}\n{text}"
        return text

    def fields(self) -> list[str]:
        """The payload's top-level keys that `text_of` reads, as Qdrant's selectors have them."""
        return [json_path(keys_of(path)[:1]) for path in self._paths()]

    def state_of(self, payload: Mapping[str, Any]) -> dict[str, str | None]:
        """What of a payload its text was read from: paths as Qdrant's filters have them, with their values.

        A title that could be there and is not is part of the state, as None.
        """
        state: dict[str, str | None] = {}
        for path in self._paths():
            keys = keys_of(path)
            for end in range(1, len(keys) + 1):  # a field that holds JSON as a string ends the path
                value = value_at(payload, json_path(keys[:end]))
                if isinstance(value, str):
                    state[json_path(keys[:end])] = value
                    break
            else:
                if path == self.title and value is None:
                    state[json_path(keys)] = None
        return state

    def noted(self) -> dict[str, str] | None:
        """What `Layout(**noted)` makes this layout of; None for one that is a function."""
        if callable(self.text):
            return None
        return {name: value for name in ("name", "text", "title", "id") if (value := getattr(self, name)) is not None}

    def _paths(self) -> list[str]:
        """The paths that `text_of` reads."""
        text = self.reads if callable(self.text) else (self.text,)
        return [path for path in (*text, self.title) if path]

    def __str__(self) -> str:
        return f"{self.name} (text under {'a function' if callable(self.text) else self.text})"


CORPUS = Layout("corpus", text="text", title="title")
LAYOUTS = (
    Layout("LlamaIndex", text="_node_content.text", marks=("_node_content", "_node_type")),
    Layout("LangChain", text="page_content", marks=("page_content", "metadata")),
    Layout("Haystack", text="content", marks=("content", "meta")),
    Layout("mcp-server-qdrant", text="document", marks=("document", "metadata")),
    Layout("LlamaIndex, flat", text="text", marks=("text", "_node_type")),
)


def detect(payloads: Sequence[Mapping[str, Any]]) -> Layout:
    """The layout of a collection, from some of its payloads.

    A framework's marks decide; without any, the one field that holds text under a usual name.

    Raises:
        BankError: if none or several fit; the error lists the candidates and the option that chooses.
    """
    texts = [payload for payload in payloads if payload]
    if not texts:
        return CORPUS
    marked = [layout for layout in LAYOUTS if _fits(layout, texts)]
    if marked:
        return marked[0]  # a framework's own fields come before a user's metadata of the same name
    usual = [key for key in SUSPECTS if any(_is_text(payload.get(key)) for payload in texts)]
    if usual == ["text"]:
        return CORPUS
    usual = usual or _nested(texts)
    if len(usual) == 1:
        return Layout("plain", usual[0])
    candidates = usual or sorted({key for payload in texts for key, value in payload.items() if _is_text(value)})
    found = ", ".join(f"{key} ({_sample(texts, key)!r}…)" for key in candidates[:SHOWN]) or "no field of text at all"
    more = f" and {len(candidates) - SHOWN} more" if len(candidates) > SHOWN else ""
    raise BankError(
        f"can't tell where the payloads keep the text; found {found}{more}: choose with --text-path PATH, in Python "
        "layout=Layout('mine', 'PATH')"
    )


def _nested(payloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths of texts under a usual name one object down, such as metadata.text."""
    paths = {
        json_path([outer, key])
        for payload in payloads
        for outer, inner in payload.items()
        if isinstance(inner, Mapping)
        for key in SUSPECTS
        if _is_text(inner.get(key))
    }
    return sorted(paths)


def _fits(layout: Layout, payloads: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all have its marks, and some a text."""
    return all(set(layout.marks) <= set(payload) for payload in payloads) and any(map(layout.text_of, payloads))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _sample(payloads: Sequence[Mapping[str, Any]], key: str) -> str:
    values = (payload.get(key, value_at(payload, key)) for payload in payloads)
    return next(str(value)[:24] for value in values if _is_text(value))


def value_at(payload: Mapping[str, Any], path: str) -> Any:
    """The value at a path: dots descend into objects, and into JSON where a field holds it as a string."""
    value: Any = payload
    for key in keys_of(path):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):  # also of numbers, and nesting, that no reader takes
                return None
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def keys_of(path: str) -> list[str]:
    """The keys of a path; one with a dot in its name stands in double quotes."""
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^."]+)', path)]


def json_path(keys: Sequence[str]) -> str:
    """The path of these keys as Qdrant writes it: quoted where a key is more than letters, digits, _ and -."""
    return ".".join(key if re.fullmatch(r"[\w-]+", key, re.ASCII) else f'"{key}"' for key in keys)
