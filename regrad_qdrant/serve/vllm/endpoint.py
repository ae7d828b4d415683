"""The half that runs in vLLM's API process: our models beside vLLM's own, behind the same routes.

A request that names one of ours is answered by the application of `regrad-qdrant serve`, with vLLM's engine in place of
the resident model; any other goes to vLLM as it came.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse

from regrad_qdrant.answer.generation import ends_with
from regrad_qdrant.serve.app import MOST_BYTES, make_app, model_object
from regrad_qdrant.serve.metrics import Metrics
from regrad_qdrant.serve.service import OFFERS, Keys, Service, read_tenants
from regrad_qdrant.serve.vllm.engine import VllmEngine
from regrad_qdrant.serve.vllm.settings import Settings
from regrad_qdrant.serve.vllm.updates import Updates

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("regrad_qdrant.serve")
GENERATING = ("/v1/chat/completions", "/v1/completions")  # whose body names the model
OURS = {"/v1/search": "/v1/search", "/ready": "/ready", "/": "/", "/regrad/metrics": "/metrics"}  # there, and here
# `auto` weighs a free answer and a span of the beam search against each other: here there is no beam search.
OFFERED = {name: offer for name, offer in OFFERS.items() if offer.grounded != "auto"}


class Endpoint:
    """Entry point `vllm.endpoint_plugins`: vLLM makes one, has it attach its routes, and gives it the engine."""

    name = "regrad"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.app: FastAPI | None = None
        self.offers: tuple[str, ...] = ()
        self.service: Service[Updates] | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Stand before vLLM's own routes, and add our models to the list of its."""
        app.add_middleware(Beside, endpoint=self)

        async def models(request: Request) -> JSONResponse:
            own = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
            return JSONResponse(own | {"data": [*own["data"], *map(model_object, self.offers)]})

        app.add_api_route("/v1/models", models, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the bank and make the application.

        Raises:
            RegradError: for settings that make no sense, or a collection that is not there: vLLM does not start.
        """
        if engine_client is None:
            return
        settings = Settings.of()
        tokenizer = engine_client.get_tokenizer()
        made = await asyncio.to_thread(_opened, settings, tokenizer)
        initialization = made[0].initialization
        log.info(
            "regrad: initialization %s for the base model %s; vLLM serves %s, which must be that model",
            settings.init, initialization.base.name, getattr(args, "model", "another"),
        )  # fmt: skip
        generation = engine_client.model_config.try_get_generation_config()
        engine = VllmEngine(engine_client, ends_with(generation.get("eos_token_id"), tokenizer), queue=settings.queue)
        metrics = Metrics()
        metrics.watch(engine)
        keys = Keys(None, read_tenants(settings.tenants) if settings.tenants else {})
        self.service = Service(
            made[0],
            made[1] if len(made) > 1 else None,
            engine,
            keys,
            deadline=settings.deadline,
            using=settings.using or None,
            offers=OFFERED,
        )
        self.app, self.offers = make_app(self.service, metrics), tuple(self.service.offers)


class Beside:
    """Hands requests for our models to our application, and all others on."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint) -> None:
        self._theirs, self._endpoint = app, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ours = self._endpoint.app
        if scope["type"] != "http" or ours is None:
            await self._theirs(scope, receive, send)
        elif scope["path"] in OURS:
            await ours(dict(scope) | {"path": OURS[scope["path"]]}, receive, send)
        elif scope["path"] in GENERATING and scope["method"] == "POST":
            messages = await _body(receive)
            again = _replayed(messages, receive)
            mine = _model(messages) in self._endpoint.offers
            await (ours if mine else self._theirs)(scope, again, send)
        else:
            await self._theirs(scope, receive, send)


async def _body(receive: Receive) -> list[Message]:
    """The messages of a request's body; of one that is too large for ours only the beginning."""
    messages: list[Message] = []
    size, more = 0, True
    while more and size <= MOST_BYTES:
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        more = messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False)
    return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that begins with messages that were read already."""
    left = iter(messages)

    async def again() -> Message:
        return next(left, None) or await receive()

    return again


def _model(messages: list[Message]) -> str | None:
    """The model that a request's body names."""
    try:
        body = json.loads(b"".join(message.get("body", b"") for message in messages))
    except ValueError:
        return None
    named = body.get("model") if isinstance(body, dict) else None
    return named if isinstance(named, str) else None


def _opened(settings: Settings, tokenizer: Any) -> list[Updates]:
    """The bank in each initialization's space."""
    from regrad_qdrant.bank.assembly import assembled
    from regrad_qdrant.bank.stores.opening import open_store
    from regrad_qdrant.errors import BankError
    from regrad_qdrant.model.initialization import MetaInitialization

    store = open_store(settings.collection, url=settings.url, api_key=settings.api_key, path=settings.path)
    if not store.exists():
        raise BankError(f"there is no collection {settings.collection!r}: make it with regrad-qdrant ingest")

    def updates(name: str, payload_key: str) -> Updates:
        made = MetaInitialization.load(name)
        bank = assembled(
            store,
            made.fingerprint,
            payload_key=payload_key,
            dense=settings.dense,
            text_path=settings.text_path,
            using=settings.using,
            sidecar=settings.sidecar,
        )
        return Updates(made, tokenizer, bank)

    found = [updates(settings.init, settings.payload_key)]
    if settings.icl_init is not None and settings.icl_payload_key is not None:
        found.append(updates(settings.icl_init, settings.icl_payload_key))
    return found
