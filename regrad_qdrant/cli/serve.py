"""The command that keeps a model resident for many clients: `regrad-qdrant serve`."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import errors
from regrad_qdrant.cli.options import (
    DEFAULT_ICL_INIT,
    DEFAULT_INIT,
    BankPath,
    Collection,
    Dense,
    Device,
    Dtype,
    Init,
    Key,
    Merge,
    Model,
    Sidecar,
    TextPath,
    Url,
    Using,
    bank_of,
    check_merge,
    check_vector,
    existing_store,
    load,
    regrad_of,
)
from regrad_qdrant.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.model.initialization import MetaInitialization

WORKERS = (
    "one process serves all clients: each further one would hold the model again, and split the batches that make it "
    "fast. For more than one GPU, start one server on each (CUDA_VISIBLE_DEVICES, --port) behind a load balancer"
)


def _check_free(host: str, port: int) -> None:
    """Refuse an address where nothing can listen, before the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise DataError(f"can't listen at {host}:{port} ({error.strerror}): choose another --port or --host") from error


def serve(
    collection: Collection,
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 is every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    icl_init: Annotated[
        str | None,
        typer.Option(
            "--icl-init",
            help=f"Meta-initialization of the model regrad+icl, such as {DEFAULT_ICL_INIT}; its atoms must be in the "
            "collection under a key of their own (--icl-payload-key). By default that model is not offered.",
        ),
    ] = None,
    icl_payload_key: Annotated[
        str | None, typer.Option("--icl-payload-key", help="The payload key that holds the atoms of --icl-init.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="REGRAD_API_KEY", help="What clients must send; by default nothing."),
    ] = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            "--tenants", help="JSON object of API keys, each with the Qdrant filter that its searches must pass."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests that run together, at most.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that wait, at most; others get a 429.")] = 256,
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds that a request may take.")] = 60.0,
    drain: Annotated[int, typer.Option("--drain", min=1, help="Seconds for what runs when the server is ended.")] = 30,
    workers: Annotated[int, typer.Option("--workers", hidden=True)] = 1,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines of JSON.")] = False,
    log_questions: Annotated[bool, typer.Option("--log-questions", help="Log what is asked, too.")] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    using: Using = None,
    dense: Dense = None,
    merge: Merge = None,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    text_path: TextPath = None,
) -> None:
    """Answer many clients from one resident model, by OpenAI's protocol."""
    from regrad_qdrant.model.initialization import MetaInitialization

    try:
        import uvicorn

        from regrad_qdrant.serve.app import make_app
        from regrad_qdrant.serve.engine import Engine
        from regrad_qdrant.serve.lines import log_handler
        from regrad_qdrant.serve.metrics import Metrics
        from regrad_qdrant.serve.service import Keys, Service, read_tenants
    except ImportError as error:
        raise MissingExtraError(f"serve needs more packages: pip install 'regrad-qdrant[serve]' ({error})") from error
    if workers != 1:
        raise DataError(f"--workers {workers}: {WORKERS}")
    if api_key == "":
        raise DataError("the API key is empty: leave --api-key and REGRAD_API_KEY out, or give one")
    keys = Keys(api_key, read_tenants(tenants) if tenants else {})
    if icl_init is not None and icl_payload_key is None:
        raise DataError(
            "--icl-init needs --icl-payload-key: its atoms stand beside those of --init, under their own key"
        )
    check_merge(merge)
    _check_free(host, port)
    checked = existing_store(collection, url, path)
    check_vector(checked, using, dense)
    checked.close()
    initialization, base, tokenizer = load(init, model, device, dtype)
    with ExitStack() as stack:
        store = existing_store(collection, url, path)

        def answering(which: MetaInitialization, key: str, beside: ReGrad | None) -> ReGrad:
            bank = stack.enter_context(bank_of(store, which, key, dense, text_path, using, sidecar))
            return stack.enter_context(regrad_of(base, tokenizer, bank, which, merge, beside=beside))

        regrad, icl = answering(initialization, payload_key, None), None
        if icl_init is not None and icl_payload_key is not None:
            other = MetaInitialization.load(icl_init)
            other.check_model(base)
            icl = answering(other, icl_payload_key, regrad)
        metrics = Metrics()
        engine = Engine(batch=batch, queue=queue, on_batch=metrics.batch)
        metrics.watch(engine)
        app = make_app(
            Service(regrad, icl, engine, keys, deadline=deadline, using=using), metrics, log_questions=log_questions
        )
        logging.getLogger("regrad_qdrant").addHandler(log_handler(as_json=log_json))
        logging.getLogger("regrad_qdrant").setLevel(logging.INFO)
        shown = f"http://{host if host != '0.0.0.0' else 'localhost'}:{port}"
        errors.print(f"{shown}/ is the page, {shown}/v1 what clients of OpenAI take", highlight=False)
        if host not in ("127.0.0.1", "localhost", "::1") and not (keys.api_key or keys.tenants):
            errors.print("warning: anyone who reaches this address may ask: --api-key, --tenants", style="yellow")
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=drain)
