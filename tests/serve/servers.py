"""A server on a socket of this machine, over the tiny model and an embedded bank."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from conftest import tiny_initialization, tiny_model

from regrad_qdrant import Document, GradientBank, ReGrad
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.serve.app import make_app
from regrad_qdrant.serve.app import served as served_app
from regrad_qdrant.serve.engine import Engine
from regrad_qdrant.serve.metrics import Metrics
from regrad_qdrant.serve.service import Keys, Service

TEXTS = (
    "Ida Corvand works as a baker in Aalborg.",
    "Noor Selowan works as a diver in Malmö.",
    "Orla Thornaby plays the harp.",
    "Galen Zimuken likes plum cake.",
)


class Running:
    """A server, and what it serves."""

    def __init__(self, regrad, icl, keys=None, **options):
        self.regrad, self.icl = regrad, icl
        self.metrics = Metrics()
        deadline = options.pop("deadline", 60.0)
        self.engine = Engine(on_batch=self.metrics.batch, **options)
        self.metrics.watch(self.engine)
        self.app = make_app(Service(regrad, icl, self.engine, keys or Keys(), deadline=deadline), self.metrics)
        self._serving = served_app(self.app, drain=20)

    def start(self):
        self.url = self._serving.__enter__()

    def stop(self):
        self._serving.__exit__(None, None, None)


@contextmanager
def filled(folder, model, tokenizer, initialization):
    """A ReGrad over an embedded bank below the folder, that holds the texts and their atoms."""
    with GradientBank.open(folder, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text, "team": "ab"[i % 2]}) for i, text in enumerate(TEXTS))
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            attach_atoms(bank, regrad.gradients, "int8")
            yield regrad


@pytest.fixture(scope="session")
def served(tokenizer, tmp_path_factory):
    """Two ReGrads of one model over one bank: of all modes, and of regrad+icl."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("served")
    first, second = tiny_initialization(model), tiny_initialization(tiny_model(), rank=3)
    with GradientBank.open(folder, "docs", first.fingerprint) as bank:
        bank.create()
        payloads = [{"id": f"d{i}", "text": text, "team": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
        payloads[0]["url"] = "https://example.org/ida"
        bank.add(Document(payload["id"], payload) for payload in payloads)
        with ReGrad(model, tokenizer, bank, first, on_damaged="refuse") as regrad:
            attach_atoms(bank, regrad.gradients, "int8")
            other = GradientBank(bank.store, "docs", second.fingerprint, payload_key="regrad_icl")
            with ReGrad(model, tokenizer, other, second, check_model=False, beside=regrad) as icl:
                attach_atoms(other, icl.gradients, "int8")
                yield regrad, icl


@contextmanager
def running_server(served, **options):
    """A server from its start to its end."""
    running = Running(*served, **options)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def server(served):
    """A server that anyone may ask."""
    with running_server(served) as running:
        yield running


@pytest.fixture
def start(served):
    """Starts servers of a test's own."""

    def start(**options):
        return running_server(served, **options)

    return start
