"""A client whose requests get lost, come late or are refused, over the in-process engine."""

import random

import grpc
import httpx
import pytest
from conftest import tiny_initialization, tiny_model
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from regrad_loaders.data.facts import generate
from regrad_qdrant import Adapter, GradientBank
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.bank.stores import failures
from regrad_qdrant.bank.stores.base import PayloadWrite, Point, VectorNames
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.errors import BankError, StoreUnavailableError

PASSAGES = generate("train", 30, 1).passages


def answered(status):
    return UnexpectedResponse(status, "reason", b"what the server said", httpx.Headers())


class GrpcError(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "what the server said"


class FaultyClient:
    """Fails a share of the requests, half of them after they were carried out."""

    def __init__(self, share, faults, seed=0):
        self.client, self.share, self.faults = QdrantClient(":memory:"), share, faults
        self.rng, self.requests = random.Random(seed), 0

    def __getattr__(self, name):
        method = getattr(self.client, name)
        if not callable(method):
            return method

        def request(*arguments, **options):
            self.requests += 1
            if self.rng.random() >= self.share:
                return method(*arguments, **options)
            if self.rng.random() < 0.5:
                method(*arguments, **options)
            raise self.rng.choice(self.faults)

        return request


TRANSIENT = [
    ResponseHandlingException(httpx.ConnectError("dropped")),
    ResponseHandlingException(httpx.ReadTimeout("late")),
    ResponseHandlingException(ValueError("cut short")),
    ResourceExhaustedResponse("slow down", 0),
    answered(408),
    answered(429),
    answered(500),
    answered(503),
    GrpcError(grpc.StatusCode.UNAVAILABLE),
    GrpcError(grpc.StatusCode.DEADLINE_EXCEEDED),
]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(failures, "FIRST_WAIT", 1e-4)
    monkeypatch.setattr(failures, "LONGEST_WAIT", 1e-3)


def ingested(client, tokenizer):
    """Every point's payload after an ingestion."""
    model = tiny_model()
    initialization = tiny_initialization(model)
    adapter = Adapter(model, initialization)
    gradients = adapter.gradients(tokenizer)
    store = ClientStore(client, "docs")
    bank = GradientBank(store, "docs", initialization.fingerprint, max_request_bytes=3000)
    add_corpus(bank, PASSAGES, gradients)
    report = attach_atoms(bank, gradients, "int8", batch_tokens=200)
    assert report.atoms_written == len(PASSAGES) and not report.skipped
    return {point.id: point.payload for point in store.scroll(None, 100, None, True)[0]}


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.parametrize("in_process", [True, False])
def test_an_ingestion_through_faults_ends_as_an_undisturbed_one(tokenizer, monkeypatch, in_process):
    monkeypatch.setattr(ClientStore, "in_process", in_process)
    faulty = FaultyClient(0.2, TRANSIENT)
    assert ingested(faulty, tokenizer) == ingested(FaultyClient(0.0, TRANSIENT), tokenizer)
    assert faulty.requests > 30


def test_a_server_that_says_when_to_come_back_is_obeyed(monkeypatch):
    waited = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    client = FaultyClient(1.0, [ResourceExhaustedResponse("slow down", 7)])
    client.client.create_collection("docs", {})
    with pytest.raises(BankError, match="rate limit"):
        ClientStore(client, "docs").count()
    assert waited == [7.0] * (failures.ATTEMPTS - 1)


REFUSALS = [
    (answered(400), "answered 400: what the server said"),
    (answered(401), "refused the API key"),
    (answered(403), "this API key may not do that.*write access"),
    (answered(404), "answered 404"),
    (GrpcError(grpc.StatusCode.INVALID_ARGUMENT), "INVALID_ARGUMENT: what the server said"),
    (GrpcError(grpc.StatusCode.UNAUTHENTICATED), "refused the API key"),
    (GrpcError(grpc.StatusCode.PERMISSION_DENIED), "this API key may not do that.*write access"),
]


@pytest.mark.parametrize(("fault", "message"), REFUSALS)
def test_a_refusal_is_not_repeated_and_says_what_the_server_said(fault, message):
    client = FaultyClient(1.0, [fault])
    client.client.create_collection("docs", {})
    with pytest.raises(BankError, match=message):
        ClientStore(client, "docs").count()
    assert client.requests == 1


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_does_not_pass_is_given_up_after_a_bounded_number_of_attempts(fault):
    client = FaultyClient(1.0, [fault])
    client.client.create_collection("docs", {})
    with pytest.raises(StoreUnavailableError):
        ClientStore(client, "docs").count()
    assert client.requests == failures.ATTEMPTS


def test_in_strict_mode_texts_are_compared_before_writing(monkeypatch):
    """A collection that refuses filters on fields without an index, as Qdrant Cloud's do."""
    monkeypatch.setattr(ClientStore, "in_process", False)
    client = FaultyClient(0.0, [])
    store = ClientStore(client, "docs")
    store.create(VectorNames())
    store.upsert([Point(i, {}, {"text": f"text {i}"}) for i in range(3)])
    update = client.client.batch_update_points

    def strict(name, operations, **options):
        if any(operation.set_payload.filter is not None for operation in operations):
            raise UnexpectedResponse(400, "", b"Bad request: Index required but not found for text", httpx.Headers())
        return update(name, operations, **options)

    monkeypatch.setattr(client.client, "batch_update_points", strict)
    same = [PayloadWrite(i, {"regrad": i}, {"text": f"text {i}"}) for i in range(2)]
    store.set_payload([*same, PayloadWrite(2, {"regrad": 2}, {"text": "another"}), PayloadWrite(9, {"regrad": 9})])
    found = {point.id: point.payload.get("regrad") for point in store.scroll(None, 10, None, True)[0]}
    assert found == {0: 0, 1: 1, 2: None}
