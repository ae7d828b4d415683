"""Figures of the speed benchmarks: ratios of what ran in turns within one run, each beside its floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regrad_loaders.evaluation.plots import new_figure


@dataclass(frozen=True)
class Figure:
    """One measured number; `low` and `high` are the 10th and 90th percentile of its rounds."""

    value: float
    low: float
    high: float
    unit: str
    floor: float | None = None  # the same number for work that can't be left out
    floor_is: str = ""  # what that work is

    @classmethod
    def of(cls, values: Sequence[float], unit: str, floor: float | None = None, floor_is: str = "") -> Figure:
        """From one value a round."""
        low, high = (percentile(values, share) for share in (0.1, 0.9))
        return cls(median(values), low, high, unit, floor, floor_is)

    @classmethod
    def ratio(
        cls, above: Sequence[float], below: Sequence[float], floor: float | None = None, floor_is: str = ""
    ) -> Figure:
        """Round by round one time over another."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)], "times", floor, floor_is)


def percentile(values: Sequence[float], share: float) -> float:
    """With linear interpolation; `share` from 0 to 1."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def in_turns(
    work: Mapping[str, Callable[[int], Any]], rounds: int, on_round: Callable[[int], None] = lambda _: None
) -> dict[str, list[float]]:
    """Seconds that each party took in each round; parties take turns, and the first one changes from round to round.

    A party gets the number of the round. The machine's own ups and downs meet all parties of a round alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            work[name](turn)
            finish()
            seconds[name].append(time.perf_counter() - started)
        on_round(1)
    return seconds


def finish() -> None:
    """Wait until a GPU has done what it was given, where there is one: a clock that is read before has seen nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The medians, for the reader."""
    return {name: round(1000 * median(values), 3) for name, values in seconds.items()}


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products in `work`, counted by PyTorch; what is element by element is
    left out."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def plot(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A bar for every figure on a logarithmic axis, with its spread, and a mark at its floor.

    Raises:
        DataError: without matplotlib.
    """
    figure = new_figure(9, 1 + 0.35 * len(figures))
    panel = figure.subplots()
    for place, row in enumerate(figures.values()):
        spread = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        panel.barh(place, row["value"], xerr=spread, color="tab:blue", capsize=3)
        if row["floor"] is not None:
            panel.plot([row["floor"]] * 2, [place - 0.4, place + 0.4], color="black")
    panel.set_yticks(range(len(figures)), list(figures))
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="value; the black mark is the floor")
    panel.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
