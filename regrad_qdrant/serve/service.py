"""What a server offers: the models that clients may name, who may ask, and the way of one request."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from qdrant_client import models

from regrad_qdrant.answer.query import WITHOUT_DOCUMENTS, Grounded, Mode, Query
from regrad_qdrant.bank.documents import filter_of
from regrad_qdrant.bank.stores.base import TEXT_INDEX
from regrad_qdrant.errors import BankError, DataError, StoreUnavailableError
from regrad_qdrant.serve.job import AnswersJobs, DeadlineError, Job, Source
from regrad_qdrant.serve.protocol import ChatRequest, CompletionRequest, Retrieval

if TYPE_CHECKING:
    from regrad_qdrant.answer.retrieval import Found
    from regrad_qdrant.bank.documents import Hit


@dataclass(frozen=True)
class Offer:
    """What a model's id stands for."""

    mode: Mode
    grounded: Grounded = False


OFFERS: dict[str, Offer] = {
    "regrad": Offer("regrad"),
    "regrad/grounded": Offer("regrad", True),
    "regrad/auto": Offer("regrad", "auto"),
    "regrad+icl": Offer("regrad+icl"),
    "rag": Offer("rag"),
    "direct": Offer("direct"),
}
SYSTEM_TOKENS = 256  # of an answer to a system message of the client's own, where the request does not say
SPAN_TOKENS = 64  # of a grounded answer, at most
WITH_PASSAGES: dict[Mode, Mode] = {"regrad": "regrad+icl", "direct": "rag"}
WITHOUT_PASSAGES: dict[Mode, Mode] = {there: here for here, there in WITH_PASSAGES.items()}


class UnknownModelError(DataError):
    """A request names a model that is not offered."""


@dataclass(frozen=True)
class Client:
    """Who asks: nobody may ask beyond its filter."""

    filter: models.Filter | None = None


@dataclass(frozen=True)
class Keys:
    """The API keys that are let in; none: everybody is.

    Args:
        tenants: a filter for each key that its searches must pass.
    """

    api_key: str | None = None
    tenants: Mapping[str, models.Filter] = field(default_factory=dict)

    def client(self, key: str | None) -> Client | None:
        """Whose key this is; None where it is nobody's."""
        if self.api_key is None and not self.tenants:
            return Client()
        given = (key or "").encode()
        found = None
        for known, client in self._clients():  # all of them are compared, so that the time tells nothing
            if hmac.compare_digest(given, known.encode()):
                found = client
        return found

    def _clients(self) -> list[tuple[str, Client]]:
        own = [] if self.api_key is None else [(self.api_key, Client())]
        return own + [(key, Client(only)) for key, only in self.tenants.items()]


def read_tenants(path: Path) -> dict[str, models.Filter]:
    """A JSON object: for each API key the Qdrant filter that its searches must pass.

    Raises:
        DataError: for a file that can't be read, or a filter that is none or lets everything pass.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the tenants {path}: {error}") from error
    if not isinstance(values, dict) or not values or not all(values):
        raise DataError(f"{path}: tenants are an object with a filter for each API key")
    found = {}
    for i, (key, value) in enumerate(values.items(), 1):
        found[key] = filter_of(value, f"{path}: the filter of tenant {i}")
        if not _restricts(found[key]):
            raise DataError(f"{path}: the filter of tenant {i}, or one inside it, is empty: it lets everything pass")
    return found


def _restricts(only: models.Filter) -> bool:
    """Whether a filter has conditions, and every filter inside it too."""
    conditions: list[Any] = []
    for part in (only.must, only.should, only.must_not, only.min_should and only.min_should.conditions):
        conditions += part if isinstance(part, list) else [] if part is None else [part]
    return bool(conditions) and all(_restricts(one) for one in conditions if isinstance(one, models.Filter))


class Service(Generic[Source]):
    """Answers requests of clients.

    Args:
        regrad: of all modes but `regrad+icl`.
        icl: of that one, or None where it is not offered.
        deadline: seconds that a request may take.
        using: the vectors that are searched where a request names none.
        offers: the models that clients may name.
    """

    def __init__(
        self,
        regrad: Source,
        icl: Source | None,
        engine: AnswersJobs[Source],
        keys: Keys,
        *,
        deadline: float,
        using: str | Sequence[str] | None = None,
        offers: Mapping[str, Offer] = OFFERS,
    ) -> None:
        self.regrad, self.icl, self.engine, self.keys = regrad, icl, engine, keys
        self.deadline = deadline
        self.offers = {name: offer for name, offer in offers.items() if icl or offer.mode != "regrad+icl"}
        self._default_using = using
        self._vectors = regrad.bank.store.vectors()
        self._searching = 0
        for one in (regrad, icl):
            if one is not None:
                one.retrieval.explains = False  # it would tell a tenant which fields others have

    async def hits(self, client: Client, query: str, options: Retrieval) -> list[Hit]:
        """What a search finds, without an answer."""
        asked = Query(query, query_filter=self._filter(client, options))
        return (await self._found(self.regrad, asked, options, time.monotonic() + self.deadline)).hits

    async def job(self, client: Client, request: ChatRequest | CompletionRequest) -> Job[Source]:
        """What a request is answered from: its search is done.

        Raises:
            UnknownModelError, DataError, ValueError: for a request that makes no sense.
            QueueFullError, DeadlineError: as `AnswersJobs.answer`.
            BankError: as the search raises it.
        """
        started, deadline = time.perf_counter(), time.monotonic() + self.deadline
        query = self._query(client, request)
        regrad = self.icl if query.mode == "regrad+icl" and self.icl is not None else self.regrad
        query.prompt([])  # raises what is wrong with it before anything is searched
        found = await self._found(regrad, query, request.regrad, deadline)
        search = time.perf_counter() - started
        return Job(regrad, found, request.sampling, search, deadline, streams=bool(request.stream))

    async def _found(self, regrad: Source, asked: Query, options: Retrieval, deadline: float) -> Found:
        """The documents of one request, in time. What the search refuses of the request's own is the client's fault."""
        using = self._using(options)
        self.engine.check_room(self._searching)
        self._searching += 1
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                [found] = await regrad.retrieval.aretrieve([asked], options.top_k, using, 0)
            return found
        except TimeoutError as error:
            raise DeadlineError("the search was not done in time") from error
        except StoreUnavailableError:
            raise
        except (BankError, TypeError, OverflowError) as error:
            if options.filter is None and options.using is None:
                raise
            raise DataError(f"the search refuses the filter or the vectors: {error}") from error
        finally:
            self._searching -= 1

    def _query(self, client: Client, request: ChatRequest | CompletionRequest) -> Query:
        offer, options = self.offers.get(request.model), request.regrad
        if offer is None:
            raise UnknownModelError(f"there is no model {request.model!r}; there are {', '.join(self.offers)}")
        mode, grounded = offer.mode, offer.grounded
        if options.passages is not None:
            mode = (WITH_PASSAGES if options.passages else WITHOUT_PASSAGES).get(mode, mode)
        if mode == "regrad+icl" and self.icl is None:
            raise DataError("passages beside the gradients need an initialization for that (serve --icl-init)")
        if options.grounded is not None:
            grounded = options.grounded
        if grounded not in {known.grounded for known in self.offers.values()}:
            raise DataError(f"regrad.grounded: {grounded!r} is not offered here")
        system, turns, question = _read(request)
        length = request.length or (SYSTEM_TOKENS if system is not None else None)
        return Query(
            question,
            mode,
            options.type,
            tuple(options.choices),
            self._filter(client, options) if mode not in WITHOUT_DOCUMENTS or grounded else None,
            max_new_tokens=min(length, SPAN_TOKENS) if length and grounded else length,
            grounded=grounded,
            style=options.style,
            system=system,
            turns=turns,
        )

    def _filter(self, client: Client, options: Retrieval) -> models.Filter | None:
        """The client's own filter and the request's: both must pass."""
        own = None if options.filter is None else filter_of(options.filter, "regrad.filter")
        given = [one for one in (client.filter, own) if one is not None]
        return given[0] if len(given) == 1 else models.Filter(must=list(given)) if given else None

    def _using(self, options: Retrieval) -> str | Sequence[str] | None:
        if options.using is None or options.using == []:
            return self._default_using
        for name in [options.using] if isinstance(options.using, str) else options.using:
            if name not in self._vectors and not name.startswith(TEXT_INDEX):
                known = ", ".join([*self._vectors.dense, *self._vectors.sparse])
                raise DataError(f"regrad.using: the collection has no vector {name!r}; it has {known}")
        return options.using


def _read(request: ChatRequest | CompletionRequest) -> tuple[str | None, tuple[tuple[str, str], ...], str]:
    """The system's message, the turns before, and the last message, which is the question."""
    if isinstance(request, CompletionRequest):
        return None, (), request.prompt
    system = [message.text for message in request.messages if message.role in ("system", "developer")]
    spoken = [(message.role, message.text) for message in request.messages if message.role in ("user", "assistant")]
    turns = [(role, text) for role, text in spoken if role == "user" or text.strip()]  # a call of a tool has no text
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise DataError("the last message must be the user's, with a text: it is the question")
    return "\n".join(system) or None, tuple(turns[:-1]), turns[-1][1]
