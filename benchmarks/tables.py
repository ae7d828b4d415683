"""Tables of the generated pages, in Markdown, and where they go in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrad_loaders.data.scores import Interval


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def f1_of(row: Mapping[str, Any]) -> Interval:
    """The F1, or the difference of two, in a row of a run's JSON."""
    return Interval(row["f1"], *row["f1_interval"])


def signed(found: Interval) -> str:
    """A difference of scores and its interval, in points."""
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} … {100 * found.high:+.1f})"


def difference(run: Mapping[str, Any], mode: str, minus: str) -> Interval:
    """How far one mode of a run is from another."""
    return f1_of(next(row for row in run["differences"] if (row["mode"], row["minus"]) == (mode, minus)))


def renew(page: Path, begin: str, said: str, end: str = "<!-- end -->") -> None:
    """Put `said` between two marks of a page.

    Raises:
        ValueError: where the page has not got them.
    """
    text = page.read_text(encoding="utf-8")
    start = text.index(begin) + len(begin)
    page.write_text(text[:start] + said + text[text.index(end, start) :], encoding="utf-8")


def alike(given: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Check that runs which stand in one table had these settings in common.

    Raises:
        SystemExit: where they had not.
    """
    for name in names:
        if any(settings.get(name) != given[0].get(name) for settings in given):
            raise SystemExit(f"the runs differ in {name}")
