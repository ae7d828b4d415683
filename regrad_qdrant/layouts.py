"""Where a payload keeps the text that its atom is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """A way to keep documents in payloads.

    `text` is the path of the text (dots descend into nested objects); the value of `title`, where the
    payload has one that the text does not already hold, is set before it on a line of its own.
    """

    name: str
    text: str
    title: str | None = None

    def text_of(self, payload: Mapping[str, Any]) -> str | None:
        """The document's text, or None where the payload has none."""
        text = _at(payload, self.text)
        if not isinstance(text, str) or not text.strip():
            return None
        title = _at(payload, self.title) if self.title else None
        if isinstance(title, str) and title.strip() and title not in text:
            return f"{title}\n{text}"
        return text

    def fields(self) -> list[str]:
        """The payload's top-level keys that `text_of` reads."""
        return [path.split(".")[0] for path in (self.text, self.title) if path]


CORPUS = Layout("corpus", text="text", title="title")


def _at(payload: Mapping[str, Any], path: str) -> Any:
    value: Any = payload
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
