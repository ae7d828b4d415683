"""Tables of the generated pages, in Markdown, and where they go in a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def renew(page: Path, begin: str, said: str, end: str = "<!-- end -->") -> None:
    """Put `said` between two marks of a page.

    Raises:
        ValueError: where the page has not got them.
    """
    text = page.read_text(encoding="utf-8")
    start = text.index(begin) + len(begin)
    page.write_text(text[:start] + said + text[text.index(end, start) :], encoding="utf-8")
