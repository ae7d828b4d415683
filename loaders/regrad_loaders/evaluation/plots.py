"""The figures that benches and evaluations draw on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regrad_loaders.evaluation.results import Evaluation
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        DataError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("a plot needs matplotlib: pip install 'regrad-qdrant[loaders]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot(evaluation: Evaluation, path: Path) -> None:
    """A bar for each mode's F1, with its 95 % interval.

    Raises:
        DataError: without matplotlib.
    """
    rows = evaluation.intervals()
    count = len(evaluation.predictions) // len(rows)
    figure = new_figure(1.2 + 0.9 * len(rows), 3.6)
    panel = figure.subplots()
    values = [100 * row["f1"] for row in rows]
    spread = [[100 * abs(row["f1"] - row["f1_interval"][end]) for row in rows] for end in (0, 1)]
    names = [f"{row['mode']}\n{value:.1f}" for row, value in zip(rows, values, strict=True)]
    panel.bar(names, values, yerr=spread, capsize=4, color="#5b7fa6")
    panel.set(ylabel="F1", title=f"{count} questions, 95 % intervals")
    figure.savefig(path, dpi=120)
