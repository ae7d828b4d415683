"""What the command line shows: reports and progress bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from regrad_qdrant.bank.ingest import IngestReport

console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
errors = Console(stderr=True, emoji=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields the function that advances it by a count, and by bytes where there
    are any."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    started, done, written = time.perf_counter(), 0, 0
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int, size: int = 0) -> None:
            nonlocal done, written
            done += count
            written += size
            rate = f"{done / (time.perf_counter() - started):.1f}/s" + (f", {decimal(written)}" if written else "")
            bar.update(task, advance=count, rate=rate)

        yield advance


def print_report(report: IngestReport) -> None:
    counts = {
        "points added": report.points_added,
        "updated": report.points_updated,
        "atoms written": report.atoms_written,
        "present": report.present,
        "truncated": report.truncated,
        "in windows": report.windowed,
        "too long": report.too_long,
        "changed meanwhile": report.passed_over,
        "without text": report.without_text,
        "skipped": len(report.skipped),
    }
    always = ("points added", "updated", "atoms written", "present")
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what in always)
    written = f"; {decimal(report.bytes_written)} written" if report.bytes_written else ""
    console.print(f"{said}; {report.documents_per_second:.1f} documents/s{written}", highlight=False)
    for key, reason in list(report.skipped.items())[:20]:
        errors.print(f"skipped {key}: {reason}", style="yellow", markup=False, soft_wrap=True)
