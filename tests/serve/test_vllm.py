"""Our models inside vLLM, over a fake of its engine that runs the tiny model; the real one is in tests/vllm_engine."""

import asyncio
import json
import time
from types import SimpleNamespace

import fake_vllm
import httpx
import pytest
from conftest import tiny_initialization, tiny_model
from fastapi import FastAPI
from servers import TEXTS, filled

from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.stores.base import PayloadWrite
from regrad_qdrant.errors import BankError, DataError, RecordError
from regrad_qdrant.serve.vllm.endpoint import Endpoint
from regrad_qdrant.serve.vllm.grammar import grammar_of, source_of
from regrad_qdrant.serve.vllm.packed import PackedUpdate
from regrad_qdrant.serve.vllm.settings import Settings
from regrad_qdrant.serve.vllm.worker import _initialization, loading, register

QUESTIONS = ["What is Ida Corvand's work?", "Where does Noor Selowan dive?", "What does Orla Thornaby play?"]


@pytest.fixture(scope="module")
def own(tokenizer, tmp_path_factory):
    """A bank on disk, and the library's own answers from it."""
    folder, model = tmp_path_factory.mktemp("vllm"), tiny_model()
    initialization = tiny_initialization(model)
    initialization.save(folder / "init")
    with filled(folder / "bank", model, tokenizer, initialization) as regrad:
        answers = {(mode, question): regrad.answer(question, mode=mode).text
                   for mode in ("regrad", "rag", "direct") for question in QUESTIONS}  # fmt: skip
        chosen = regrad.answer(QUESTIONS[0], type="choice", choices=["baker", "diver"])
    return SimpleNamespace(folder=folder, answers=answers, chosen=chosen.text)


@pytest.fixture
def environment(own, monkeypatch):
    monkeypatch.setenv("REGRAD_COLLECTION", "docs")
    monkeypatch.setenv("REGRAD_PATH", str(own.folder / "bank"))
    monkeypatch.setenv("REGRAD_INIT", str(own.folder / "init"))
    monkeypatch.delenv("QDRANT_URL", raising=False)
    fake_vllm.install(monkeypatch)
    _initialization.cache_clear()


@pytest.fixture
def running(environment, tokenizer):
    """vLLM's application with our endpoint, and a client of it."""
    app, endpoint = FastAPI(), Endpoint()

    @app.post("/v1/chat/completions")
    async def theirs(body: dict):
        return {"theirs": body["model"]}

    class Models:
        async def show_available_models(self):
            return SimpleNamespace(model_dump=lambda: {"object": "list", "data": [{"id": "base"}]})

    app.state.openai_serving_models = Models()
    engine = fake_vllm.FakeClient(tokenizer)
    endpoint.attach_router(app)
    asyncio.run(endpoint.init_state(engine, app.state, SimpleNamespace(model="tiny")))

    async def call(method, path, **options):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
            return await client.request(method, path, **options)

    def ask(question, model="regrad", **fields):
        body = {"model": model, "messages": [{"role": "user", "content": question}], **fields}
        return asyncio.run(call("POST", "/v1/chat/completions", json=body))

    yield SimpleNamespace(
        ask=ask, call=lambda *a, **o: asyncio.run(call(*a, **o)), engine=engine, service=endpoint.service
    )
    endpoint.service.regrad.bank.store.close()


def text(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("mode", ["regrad", "rag", "direct"])
def test_answers_are_the_librarys(running, own, mode):
    assert [text(running.ask(question, mode)) for question in QUESTIONS] == [own.answers[mode, q] for q in QUESTIONS]
    assert bool(running.engine.loras) == (mode == "regrad")


def test_options_are_chosen_by_their_likelihood_as_the_library_does(running, own):
    fields = {"regrad": {"type": "choice", "choices": ["baker", "diver"]}}
    assert text(running.ask(QUESTIONS[0], **fields)) == own.chosen


def test_a_stream_has_the_same_answer_in_pieces(running, own):
    response = running.ask(QUESTIONS[0], stream=True)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"] for event in events[:-1]]
    said = "".join(choice["delta"].get("content", "") for [choice] in pieces)
    assert said == own.answers["regrad", QUESTIONS[0]]


def test_other_models_are_vllms_and_the_list_has_both(running):
    assert running.ask("q", "base").json() == {"theirs": "base"}
    listed = [model["id"] for model in running.call("GET", "/v1/models").json()["data"]]
    assert listed == ["base", "regrad", "regrad/grounded", "rag", "direct"]
    assert running.call("POST", "/v1/chat/completions", content=b"{no json").status_code == 422  # vLLM's own answer


def test_search_page_readiness_and_metrics_stand_beside_vllms(running):
    found = running.call("POST", "/v1/search", json={"query": QUESTIONS[0]}).json()["data"]
    assert found[0]["id"] == "d0" and found[0]["has_atom"]
    assert running.call("GET", "/ready").json()["documents"] == len(TEXTS)
    assert "<title>" in running.call("GET", "/").text
    assert "regrad_requests" in running.call("GET", "/regrad/metrics").text


def test_a_damaged_atom_never_meets_the_worker(running):
    bank = running.service.regrad.bank
    [hit] = bank.fetch([point_id("d0")])
    broken = Record(hit.record.space, hit.record.sha, hit.record.codec, hit.record.atom[:-8])
    bank.store.set_payload([PayloadWrite(hit.id, {bank.payload_key: broken.to_payload()})])
    response = running.ask(QUESTIONS[0])
    assert "damaged atom" in response.json()["regrad"]["notes"][0]
    bank.store.set_payload([PayloadWrite(hit.id, {bank.payload_key: hit.record.to_payload()})])
    assert running.ask(QUESTIONS[0]).json()["regrad"]["notes"] == []


def test_a_grounded_answer_is_asked_for_by_a_grammar_and_says_where_it_stands(running, monkeypatch):
    answer = running.ask(QUESTIONS[0], "regrad/grounded").json()
    assert "substring_words" in running.engine.params[-1].structured_outputs.grammar
    assert running.engine.params[-1].temperature == 0
    assert answer["regrad"]["source"] is None  # the fake heeds no grammar
    assert running.ask(QUESTIONS[0], regrad={"grounded": "auto"}).status_code == 400


def test_a_span_heeds_no_stop(running, monkeypatch):
    whole = text(running.ask(QUESTIONS[0], "regrad/grounded"))
    assert len(whole) > 1
    assert text(running.ask(QUESTIONS[0], "regrad/grounded", stop=[whole[1]])) == whole


def test_usage_counts_the_tokens_of_an_option(running):
    answer = running.ask(QUESTIONS[0], regrad={"type": "choice", "choices": ["baker", "diver"]}).json()
    assert answer["usage"]["completion_tokens"] > 0


def test_what_vllm_ends_for_want_of_room_says_so(running, tokenizer, monkeypatch):
    async def short(*_, **__):
        for token in tokenizer("Ida is", add_special_tokens=False).input_ids:
            yield output_of(token)
        yield output_of(token, "length")

    def output_of(token, reason=None):
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=[{}], finish_reason=reason)])

    monkeypatch.setattr(running.engine, "generate", short)
    assert running.ask(QUESTIONS[0]).json()["choices"][0]["finish_reason"] == "length"


def test_whoever_leaves_early_ends_the_work_in_vllm_too(running, monkeypatch):
    response = running.ask(QUESTIONS[0], stop=["e", "a", "i", "o", " "])
    assert response.status_code == 200 and running.engine.running == 0


def test_late_ones_are_told_and_a_full_queue_refuses(running, monkeypatch):
    async def hanging(*_, **__):
        await asyncio.sleep(5)
        yield None

    monkeypatch.setattr(running.engine, "generate", hanging)
    monkeypatch.setattr(running.service, "deadline", 0.2)
    assert running.ask(QUESTIONS[0]).status_code == 504
    monkeypatch.setattr(running.service.engine, "limit", 0)
    assert running.ask(QUESTIONS[0]).status_code == 429


def test_a_stream_that_stalls_after_its_beginning_ends_in_time_too(running, tokenizer, monkeypatch):
    async def stalling(*_, **__):
        for token in tokenizer("Ida is a baker", add_special_tokens=False).input_ids:
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token], logprobs=[{}], finish_reason=None)])
        await asyncio.sleep(30)

    monkeypatch.setattr(running.engine, "generate", stalling)
    monkeypatch.setattr(running.service, "deadline", 0.5)
    started = time.monotonic()
    said = running.ask(QUESTIONS[0], stream=True).text
    assert time.monotonic() - started < 10
    assert said.count('"content"') > 1 and "the answer was not done in time" in said
    assert running.service.engine.running == 0


def test_every_request_has_a_lora_of_its_own_name_and_id(running):
    for _ in range(3):
        running.ask(QUESTIONS[0])
    assert len(running.engine.loras) == 3 and min(running.engine.loras) > 1 << 60


def test_tenants_ask_within_their_filter(own, environment, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tenants.json").write_text(
        json.dumps({"key-b": {"must": [{"key": "team", "match": {"value": "b"}}]}}), encoding="utf-8"
    )
    monkeypatch.setenv("REGRAD_TENANTS", str(tmp_path / "tenants.json"))
    endpoint = Endpoint()
    asyncio.run(endpoint.init_state(fake_vllm.FakeClient(tokenizer), None, SimpleNamespace()))

    async def search(key):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(endpoint.app), base_url="http://vllm") as client:
            return await client.post(
                "/v1/search", json={"query": QUESTIONS[0]}, headers={"authorization": f"Bearer {key}"}
            )

    assert asyncio.run(search("wrong")).status_code == 401
    assert {hit["id"] for hit in asyncio.run(search("key-b")).json()["data"]} <= {"d1", "d3"}
    endpoint.service.regrad.bank.store.close()


def test_an_update_survives_the_way_to_the_worker():
    record = Record("s", "t", "sign", "YWJj")
    update = PackedUpdate("s", [record], [0.25])
    again = PackedUpdate.read(update.path)
    assert (again.space, [r.atom for r in again.records], again.shares) == ("s", ["YWJj"], [0.25])
    for broken in ("regrad:", "regrad:{}", 'regrad:{"space": "s", "atoms": [1], "shares": [1]}'):
        with pytest.raises(RecordError, match="holds no update"):
            PackedUpdate.read(broken)


def test_the_worker_loads_files_as_ever_and_refuses_what_it_does_not_know(environment):
    manager = fake_vllm.WorkerLoRAManager()
    load = loading(fake_vllm.WorkerLoRAManager._load_adapter)
    with pytest.raises(FileNotFoundError, match="/some/folder"):
        load(manager, fake_vllm.LoRARequest("a", 1, "/some/folder"))
    with pytest.raises(RecordError, match="space other"):
        load(manager, fake_vllm.LoRARequest("a", 1, PackedUpdate("other", [], []).path))
    known = PackedUpdate(next(iter(_spaces())), [], [])
    first, second = (load(manager, fake_vllm.LoRARequest("a", i, known.path)) for i in (1, 2))
    name = next(iter(first.tensors))
    assert first.tensors[name].data_ptr() != second.tensors[name].data_ptr()  # vLLM scales them in place
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        load(fake_vllm.WorkerLoRAManager(1), fake_vllm.LoRARequest("a", 1, known.path))


def _spaces():
    from regrad_qdrant import MetaInitialization

    return [MetaInitialization.load(name).fingerprint for name in Settings.of().initializations]


def test_vllm_stays_as_it_is_where_no_collection_is_named(environment, monkeypatch):
    manager = fake_vllm.WorkerLoRAManager
    plain = manager._load_adapter
    monkeypatch.delenv("REGRAD_COLLECTION")
    register()
    assert manager._load_adapter is plain
    monkeypatch.setenv("REGRAD_COLLECTION", "docs")
    monkeypatch.setattr(manager, "_load_adapter", plain)  # put back afterwards
    register()
    wrapped = manager._load_adapter
    register()  # vLLM calls it several times
    assert wrapped is manager._load_adapter is not plain


def test_settings_that_make_no_sense_are_refused(environment, tokenizer, monkeypatch):
    assert Settings.of({"REGRAD_COLLECTION": "d", "REGRAD_USING": "dense,bm25"}).using == ("dense", "bm25")
    for given, said in (
        ({}, "REGRAD_COLLECTION"),
        ({"REGRAD_COLLECTION": "d", "REGRAD_ICL_INIT": "x"}, "belong together"),
        ({"REGRAD_COLLECTION": "d", "REGRAD_QUEUE": "many"}, "are numbers"),
    ):
        with pytest.raises(DataError, match=said):
            Settings.of(given)
    monkeypatch.setenv("REGRAD_COLLECTION", "nowhere")
    with pytest.raises(BankError, match="there is no collection 'nowhere'"):
        asyncio.run(Endpoint().init_state(fake_vllm.FakeClient(tokenizer), None, SimpleNamespace()))


def test_a_grammar_has_the_words_of_every_text_and_a_source_their_place():
    assert grammar_of(["", " — "]) is None
    grammar = grammar_of(['Say "hi"\n\tto Ida.', ""])
    assert '"substring_words": "Say \\"hi\\" to Ida."' in grammar
    hits = [SimpleNamespace(text="Noor dives.", document_id="a"), SimpleNamespace(text="Ida\n bakes.", document_id="b")]
    found = source_of("Ida bakes", hits)
    assert (found.document_id, found.start, found.end) == ("b", 0, 10)
    assert source_of("Orla", hits) is None and source_of("", hits) is None
