"""What a grounded answer costs beside the free one, alone and in batches, and how much of it is our own work.

Answers differ in length: a free one goes on until the model ends it, a span is short.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from regrad_loaders.bench.figures import Figure, in_turns, milliseconds
from regrad_qdrant.answer import grounding
from regrad_qdrant.answer.decoding import Decoder
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.answer.query import Query

BEAMS = (1, grounding.BEAMS)


def bench_grounding(
    regrad: ReGrad,
    questions: Sequence[str],
    rounds: int,
    sizes: Sequence[int] = (1, 16),
    on_round: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Free and grounded answers in turns, with one beam and with several, to batches of these sizes.

    Args:
        regrad: over a bank that holds the atoms.
    """
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {}
    for size in sizes:
        seconds, shares = _of_size(regrad, questions, rounds, size, on_round)
        for beams in BEAMS:
            name = f"grounding.{beams}_beam{'s' if beams > 1 else ''}_over_free.batch_{size}"
            figures[name] = Figure.ratio(seconds[f"{beams} beams"], seconds["free"])
        figures[f"grounding.own_share.batch_{size}"] = Figure.of(shares, "share")
        details[f"milliseconds of a batch of {size}"] = milliseconds(seconds)
    return figures, details


def _of_size(
    regrad: ReGrad, questions: Sequence[str], rounds: int, size: int, on_round: Callable[[int], None]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every party in each round, and the share of our own work in those with several beams."""
    shares: list[float] = []

    def asked(turn: int, grounded: bool) -> list[Query]:
        chosen = (questions[(turn * size + i) % len(questions)] for i in range(size))
        return [Query(question, grounded=grounded) for question in chosen]

    def free(turn: int) -> None:
        regrad.answer_many(asked(turn, False))

    def grounded(beams: int, turn: int) -> None:
        with _beams(regrad, beams), _own_work() as own:
            started = time.perf_counter()
            regrad.answer_many(asked(turn, True))
            if beams == grounding.BEAMS:
                shares.append(sum(own) / (time.perf_counter() - started))

    work: dict[str, Callable[[int], Any]] = {"free": free}
    work |= {f"{beams} beams": functools.partial(grounded, beams) for beams in BEAMS}
    return in_turns(work, rounds, on_round), shares


@contextmanager
def _beams(regrad: ReGrad, beams: int) -> Iterator[None]:
    before = regrad.decoder
    regrad.decoder = before.with_beams(beams)
    try:
        yield
    finally:
        regrad.decoder = before


@contextmanager
def _own_work() -> Iterator[list[float]]:
    """The seconds of what is done beside the model's passes: reading spans, and growing beams."""
    spent: list[float] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*args)
            finally:
                spent.append(time.perf_counter() - started)

        return run

    with patch.object(Decoder, "task", timed(Decoder.task)), patch.object(grounding, "_grow", timed(grounding._grow)):
        yield spent
