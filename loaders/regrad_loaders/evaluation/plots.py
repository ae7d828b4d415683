"""The figures that benches and evaluations draw on."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
