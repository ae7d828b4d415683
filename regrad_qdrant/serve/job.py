"""One request on its way from the search to its answer, and what an engine is, whatever runs its model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from regrad_qdrant.errors import RegradError

if TYPE_CHECKING:
    from regrad_qdrant.answer.query import Answer
    from regrad_qdrant.answer.retrieval import Found, Retrieval
    from regrad_qdrant.answer.running import Sampling
    from regrad_qdrant.bank.bank import GradientBank


class QueueFullError(RegradError):
    """As many requests wait as may."""


class DeadlineError(RegradError):
    """A request was not done in time."""


class StoppedError(RegradError):
    """The engine takes no more requests."""


class Searching(Protocol):
    """What requests are searched with: a `ReGrad`, or whatever else has a bank."""

    @property
    def bank(self) -> GradientBank: ...

    @property
    def retrieval(self) -> Retrieval: ...


Source = TypeVar("Source", bound=Searching)


@dataclass(frozen=True)
class Job(Generic[Source]):
    """One request whose documents are found."""

    regrad: Source
    found: Found
    sampling: Sampling
    search: float  # seconds that its search took
    deadline: float  # of `time.monotonic`
    streams: bool  # whether its client reads the answer piece by piece


@dataclass(frozen=True)
class Outcome:
    """A whole answer, and how it came about."""

    answer: Answer
    completion_tokens: int
    queued: float  # seconds that it waited
    first_token: float  # seconds from there to its first token

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part."""
        timings = self.answer.timings
        return {
            "search": timings.search,
            "queue": self.queued,
            "decode": timings.decode,
            "first_token": self.first_token,
            "generate": timings.generate,
        }


class AnswersJobs(Protocol[Source]):
    """An engine: it has a model, and answers many requests with it."""

    @property
    def alive(self) -> bool: ...

    @property
    def waiting(self) -> int:
        """Requests that are not being answered yet."""

    @property
    def running(self) -> int: ...

    def check_room(self, coming: int = 0) -> None:
        """Refuse a request that would have to wait behind too many.

        Args:
            coming: requests that will wait soon.

        Raises:
            QueueFullError, StoppedError: if it is refused.
        """

    def answer(self, job: Job[Source]) -> AsyncIterator[str | Outcome]:
        """The pieces of a request's answer, and the whole of it at the end. Whoever leaves early ends the work.

        Raises:
            QueueFullError, StoppedError: at once.
            DeadlineError: if it is not done in time.
            RegradError: as `ReGrad.answer`.
        """

    def close(self) -> None:
        """Answer what was accepted, and end."""
