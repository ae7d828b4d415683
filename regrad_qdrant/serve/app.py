"""The routes: OpenAI's, a search, health and metrics, and the page.

Annotations are no texts here: FastAPI reads them.
"""

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regrad_qdrant import __version__
from regrad_qdrant.errors import (
    ContextLengthError,
    DataError,
    RegradError,
    StoreUnavailableError,
    UnindexedFilterError,
)
from regrad_qdrant.serve.job import DeadlineError, Outcome, QueueFullError, StoppedError
from regrad_qdrant.serve.metrics import Metrics
from regrad_qdrant.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    SearchRequest,
    Shape,
    document,
    event,
    listed,
)
from regrad_qdrant.serve.service import Client, Service, UnknownModelError

Result = TypeVar("Result")
log = logging.getLogger("regrad_qdrant.serve")
MOST_BYTES = 1 << 20  # of a request's body
PROBE = 5.0  # seconds that the bank has to say that it is there
RETRY_AFTER = "1"  # seconds
PAGE = Path(__file__).with_name("page.html")
GONE = 499  # what is logged of a client that did not wait for its answer


class Refusal(Exception):
    """What a client is told, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, code: str | None = None, *, retry: bool = False, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry, self.param = status, code, retry, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, {"retry-after": RETRY_AFTER} if self.retry else None)


def refusal_of(error: Exception) -> Refusal:
    """What an error is to the client that met it."""
    said = str(error)
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnknownModelError):
        return Refusal(404, said, "model_not_found")
    if isinstance(error, QueueFullError):
        return Refusal(429, f"{said}: try again", "queue_full", retry=True)
    if isinstance(error, DeadlineError):
        return Refusal(504, said, "deadline_exceeded")
    if isinstance(error, StoppedError):
        return Refusal(503, said, "stopping", retry=True)
    if isinstance(error, StoreUnavailableError):
        log.warning("the bank can't be reached: %s", said)
        return Refusal(503, "the documents can't be searched now", "store_unavailable", retry=True)
    if isinstance(error, ContextLengthError):
        return Refusal(400, said, "context_length_exceeded")
    if isinstance(error, DataError | UnindexedFilterError | ValueError):
        return Refusal(400, said)
    if isinstance(error, RegradError):
        log.error("%s", said)
        return Refusal(500, "the answer could not be given; the server's log says why", type(error).__name__)
    log.error("a fault of the server's own", exc_info=error)
    return Refusal(500, "a fault of the server's own; its log says more", "internal_error")


def make_app(service: Service[Any], metrics: Metrics, *, log_questions: bool = False) -> FastAPI:
    """The application; it owns the service's engine, and ends it when it is shut down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)

    probe = _Probe(service)
    app = FastAPI(title="regrad-qdrant", version=__version__, lifespan=lifespan)
    app.add_middleware(_Outermost, metrics=metrics)
    bearer = HTTPBearer(auto_error=False)

    def client_of(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Client:
        client = service.keys.client(given.credentials if given else None)
        if client is None:
            raise Refusal(401, "the API key is missing or wrong: Authorization: Bearer KEY", "invalid_api_key")
        return client

    Asking = Annotated[Client, Depends(client_of)]

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return Refusal(400, f"the body is no JSON: {reason} at character {first['loc'][-1]}").response()
        where = ".".join(str(part) for part in first["loc"][1:] if not _names_a_type(part))
        return Refusal(400, ": ".join(filter(None, (where, str(first["msg"])))), param=where or None).response()

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        response = Refusal(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Refusal)
    async def told(_: Request, error: Refusal) -> JSONResponse:
        return error.response()

    async def answered(request: Request, asked: ChatRequest | CompletionRequest, client: Client) -> Response:
        request.state.model = asked.model if asked.model in service.offers else "unknown"
        if log_questions:
            request.state.question = asked.prompt if isinstance(asked, CompletionRequest) else asked.messages[-1].text
        shape = Shape(request.state.id, asked.model, chat=isinstance(asked, ChatRequest))
        try:
            job = await _while_there(request, service.job(client, asked))
            if asked.stream:
                pieces = service.engine.answer(job)
                first = await _while_there(request, anext(pieces))
                stream = _streamed(first, pieces, shape, asked, metrics, request.state)
                return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            outcome = await _while_there(request, _whole(service.engine.answer(job)))
        except Exception as error:
            raise refusal_of(error) from error
        metrics.answered(outcome)
        request.state.tokens = outcome.completion_tokens
        text = outcome.answer.text + (listed(outcome.answer.hits) if asked.regrad.sources else "")
        return JSONResponse(shape.whole(outcome, text))

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(request: Request, asked: ChatRequest, client: Asking) -> Response:
        """Answer the last message; the turns before stay in the prompt."""
        return await answered(request, asked, client)

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(request: Request, asked: CompletionRequest, client: Asking) -> Response:
        """Answer the prompt, which is the question."""
        return await answered(request, asked, client)

    @app.get("/v1/models", responses=ERRORS)
    async def models(client: Asking) -> dict[str, Any]:
        """One model for each mode."""
        return {"object": "list", "data": [model_object(name) for name in service.offers]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str, client: Asking) -> dict[str, Any]:
        """One of them."""
        if name not in service.offers:
            raise refusal_of(UnknownModelError(f"there is no model {name!r}; there are {', '.join(service.offers)}"))
        return model_object(name)

    @app.post("/v1/search", responses=ERRORS)
    async def search(request: Request, asked: SearchRequest, client: Asking) -> Any:
        """The documents that a question finds, without an answer."""
        try:
            hits = await _while_there(request, service.hits(client, asked.query, asked.regrad))
        except Exception as error:
            raise refusal_of(error) from error
        return {"object": "list", "data": [document(hit) | {"has_atom": hit.record is not None} for hit in hits]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok", "version": __version__}

    @app.get("/ready", responses={503: {"description": "The bank can't be reached."}})
    async def ready() -> dict[str, Any]:
        """Whether questions can be answered now."""
        if not service.engine.alive:
            raise Refusal(503, "the engine has ended", "stopping")
        try:
            count = await probe.count()
        except Exception as error:
            raise refusal_of(StoreUnavailableError(str(error))) from error
        return {"status": "ready", "documents": count, "models": list(service.offers)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html")

    return app


@contextmanager
def served(app: FastAPI, port: int = 0, drain: int = 30) -> Iterator[str]:
    """The application's address, while a thread of this process serves it.

    Args:
        port: 0 is one that is free.
        drain: seconds for what is being answered when the block ends.
    """
    import uvicorn

    settings = uvicorn.Config(
        app, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=drain, ws="none"
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, name="regrad-serve", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RegradError(f"the server could not listen on port {port}")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


_SAYS = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": _SAYS}
    for status, what in {
        400: "The request makes no sense.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "The queue is full.",
        503: "The documents can't be searched now.",
        504: "The answer was not done in time.",
    }.items()
}
ERRORS[422] = ERRORS[400]  # what FastAPI would document; a bad request is 400 here, as OpenAI's is


def model_object(name: str) -> dict[str, Any]:
    """A model as `/v1/models` lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "regrad-qdrant"}


class _Probe:
    """Asks the bank whether it is there, on a thread of its own: one request at a time, however long it takes."""

    def __init__(self, service: Service[Any]) -> None:
        self._store = service.regrad.bank.store
        self._thread = ThreadPoolExecutor(1, "regrad-probe")
        self._asked: Future[int] | None = None

    async def count(self) -> int:
        """The points of the collection.

        Raises:
            TimeoutError: where the bank does not say so in time.
        """
        if self._asked is None or self._asked.done():
            self._asked = self._thread.submit(self._store.count)
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._asked)), PROBE)


async def _whole(pieces: AsyncIterator[str | Outcome]) -> Outcome:
    async for piece in pieces:
        if isinstance(piece, Outcome):
            return piece
    raise RegradError("the answer has no end")


async def _streamed(
    first: str | Outcome,
    pieces: AsyncIterator[str | Outcome],
    shape: Shape,
    asked: ChatRequest | CompletionRequest,
    metrics: Metrics,
    state: Any,
) -> AsyncIterator[str]:
    """The events of a stream; what goes wrong after its first piece is an event too.

    Args:
        state: of the request, which its line in the log is written from.
    """
    try:
        yield event(shape.chunk("", first=True))
        piece = first
        while not isinstance(piece, Outcome):
            yield event(shape.chunk(piece))
            piece = await anext(pieces)
        metrics.answered(piece)
        state.tokens = piece.completion_tokens
        if asked.regrad.sources and piece.answer.hits:
            yield event(shape.chunk(listed(piece.answer.hits)))
        yield event(shape.last(piece))
        if asked.with_usage:
            yield event(shape.usage(piece))
    except Exception as error:
        yield event(refusal_of(error).body)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined] # a generator
    yield event("[DONE]")


def _names_a_type(part: str | int) -> bool:
    """Whether a part of pydantic's path is no field, but which of several types was tried."""
    return isinstance(part, str) and (part in ("str", "bool") or "[" in part)


async def _while_there(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is given up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(GONE, "the client went away")
        return working.result()
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


class _Outermost:
    """Around everything: the request's id, the bound of its body, its line in the log, and its counters."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state["id"] = _own_id(headers.get(b"x-request-id", b"")) or uuid.uuid4().hex
        started, status, read = time.perf_counter(), 500, 0
        length = headers.get(b"content-length", b"0")
        too_large = length.isdigit() and int(length) > MOST_BYTES

        async def bounded() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                too_large = True
                return {"type": "http.disconnect"}
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", state["id"].encode())]
            await send(message)

        async def said(message: Message) -> None:
            if not too_large:
                await named(message)

        try:
            if not too_large:
                await self.app(scope, bounded, said)
            if too_large:
                refusal = Refusal(413, f"a request may have {MOST_BYTES:,} bytes", "request_too_large")
                await refusal.response()(scope, receive, named)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - started
            self.metrics.request(route, state.get("model", ""), status, seconds)
            fields = {"id": state["id"], "method": scope["method"], "route": route, "status": status}
            told = {name: state[name] for name in ("model", "tokens", "question") if name in state}
            log.info("request", extra={"fields": fields | {"seconds": round(seconds, 4)} | told})


def _own_id(given: bytes) -> str:
    """A client's own request id, where it is one that a header and a log can hold."""
    text = given.decode("latin-1")
    return text if text.isascii() and text.replace("-", "").replace("_", "").isalnum() and len(text) <= 64 else ""
