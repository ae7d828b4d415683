"""What a run writes down: metrics.jsonl, and TensorBoard's events where that is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self


class Log:
    """metrics.jsonl, one object a line, and TensorBoard's events beside it."""

    def __init__(self, out: Path, step: int, is_main: bool) -> None:
        self.is_main = is_main
        if not is_main:
            return
        _forget_after(out / "metrics.jsonl", step)
        self.file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=max(0, step))
        except ImportError:
            self.board = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            self.file.close()
            if self.board is not None:
                self.board.close()

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        if not self.is_main:
            return
        self.file.write(json.dumps(_finite({"kind": kind, **values}), allow_nan=False) + "\n")
        self.file.flush()
        if self.board is None:
            return
        for name, value in _numbers(values.get("sources", values)):
            self.board.add_scalar(f"{kind}/{name}", value, values.get("step", 0))


def is_over(out: Path, steps: int) -> bool:
    """Whether a run of so many steps has ended, by its last one or when its patience did; one without a log has."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return True
    rows = map(json.loads, _lines(path))
    return any(row["kind"] == "end" or row.get("step", 0) >= steps for row in rows)


def _finite(value: Any) -> Any:
    """The same with null for every number that is none, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping by their paths."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{before}{name}", float(value)


def _lines(metrics: Path) -> list[str]:
    """The lines of a log, without one that a run's end cut off."""
    return metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()


def _forget_after(metrics: Path, step: int) -> None:
    """Drop what was logged after a checkpoint's step: those steps are done again. A step of −1 drops all."""
    if metrics.is_file():
        lines = [f"{line}\n" for line in _lines(metrics)]
        partial = metrics.with_name(f"{metrics.name}.partial")
        partial.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step), encoding="utf-8")
        partial.replace(metrics)
