"""The server as clients see it: OpenAI's own, LangChain's and LlamaIndex's, and what each fault gets."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import transformers
from conftest import TINY, tiny_initialization
from openai import NotFoundError, OpenAI
from qdrant_client import models
from servers import TEXTS, filled, running_server, served, server, start  # noqa: F401 # fixtures

from regrad_qdrant import Query
from regrad_qdrant.serve.service import Keys

QUESTION = "What is the job of Ida Corvand?"
OFFERS = ["regrad", "regrad/grounded", "regrad/auto", "regrad+icl", "rag", "direct"]


@pytest.fixture
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def own_answer(server, model, question=QUESTION, **asked):
    """What the library itself says."""
    mode, _, grounded = model.partition("/")
    regrad = server.icl if mode == "regrad+icl" else server.regrad
    way = {"": False, "grounded": True, "auto": "auto"}[grounded]
    return regrad.answer_many([Query(question, mode, grounded=way, **asked)])[0]


def chat(url, question=QUESTION, *, key=None, timeout=60, **body):
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"messages": [{"role": "user", "content": question}]} | body)  # as ASCII, halves of letters too
    return httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=timeout)


@pytest.mark.parametrize("model", OFFERS)
def test_openais_client_gets_the_librarys_own_answer(server, client, model):
    own = own_answer(server, model)
    said = client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}])
    assert said.choices[0].message.content == own.text
    assert said.choices[0].finish_reason == own.finish
    assert said.usage.prompt_tokens == own.prompt_tokens and said.usage.completion_tokens > 0
    assert said.model == model and said.id.startswith("chatcmpl-")


@pytest.mark.parametrize("model", OFFERS)
def test_a_stream_has_the_same_text_piece_by_piece(server, client, model):
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    own = own_answer(server, model)
    assert text == own.text
    assert chunks[-1].usage.prompt_tokens == own.prompt_tokens and not chunks[-1].choices
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]][0] in ("stop", "length")
    if model in ("regrad", "direct"):
        assert len(chunks) > 5


def test_a_stream_ends_as_openais_does(server):
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": QUESTION}], "stream": True}, timeout=60,
    ) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["regrad"]["mode"] == "regrad"


def test_plain_completions_ask_the_same_question(server, client):
    own = own_answer(server, "regrad").text
    assert client.completions.create(model="regrad", prompt=QUESTION).choices[0].text == own
    chunks = client.completions.create(model="regrad", prompt=QUESTION, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == own


def test_langchains_client_gets_it_too(server):
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="regrad", temperature=0)
    own = own_answer(server, "regrad").text
    assert llm.invoke(QUESTION).content == own
    assert "".join(piece.content for piece in llm.stream(QUESTION)) == own


def test_llama_indexs_client_gets_it_too(server):
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model="regrad", api_base=f"{server.url}/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=24
    )
    assert llm.complete(QUESTION).text == own_answer(server, "regrad").text


def test_the_models_are_the_modes(server, client):
    assert [model.id for model in client.models.list()] == OFFERS
    assert client.models.retrieve("regrad/grounded").id == "regrad/grounded"
    with pytest.raises(NotFoundError, match="there is no model"):
        client.models.retrieve("gpt-5")


def test_what_openai_lets_be_null_is_what_was_not_given(server):
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stream", "seed", "stop", "max_tokens"))
    assert chat(server.url, **nothing).json()["choices"] == chat(server.url).json()["choices"]


def test_a_list_of_one_prompt_is_a_prompt(server, client):
    own = own_answer(server, "regrad").text
    assert client.completions.create(model="regrad", prompt=[QUESTION]).choices[0].text == own


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1]], []])
def test_several_prompts_are_refused(server, prompt):
    error = httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt})
    assert error.status_code == 400 and error.json()["error"]["param"] == "prompt"
    assert error.json()["error"]["message"] == "prompt: one text is answered a request, neither several nor token ids"


def test_an_answer_that_there_is_no_room_for_has_openais_code(server):
    error = chat(server.url, model="direct", max_tokens=5000).json()["error"]
    assert error["code"] == "context_length_exceeded" and "at most" in error["message"]


def test_a_temperature_next_to_nothing_is_greedy(server):
    assert chat(server.url, temperature=1e-300).json()["choices"] == chat(server.url).json()["choices"]


def test_an_answer_says_what_it_came_from(server):
    body = chat(server.url, model="regrad/grounded", regrad={"top_k": 2}).json()
    own = own_answer(server, "regrad/grounded")
    told = body["regrad"]
    assert told["documents"][0]["id"] == "d0" and told["documents"][0]["text"].startswith("Ida Corvand")
    assert told["documents"][0]["weight"] == pytest.approx(own.weights[own.hits[0].id])
    source = told["source"]
    text = {one["id"]: one["text"] for one in told["documents"]}[source["document_id"]]
    assert text[source["start"] : source["end"]] == body["choices"][0]["message"]["content"]
    [cited] = body["choices"][0]["message"]["annotations"]
    assert cited["url_citation"]["url"] == "https://example.org/ida" and cited["url_citation"]["title"] == "d0"
    assert set(told["seconds"]) == {"search", "queue", "decode", "first_token", "generate"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_documents_can_be_listed_in_the_text(server, client, stream):
    asked = {"model": "regrad", "messages": [{"role": "user", "content": QUESTION}], "stream": stream}
    said = client.chat.completions.create(**asked, extra_body={"regrad": {"sources": True, "top_k": 1}})
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in said) if stream else said.choices[0].message.content
    )
    assert text.endswith("\n\nSources:\n1. [d0](https://example.org/ida)")


def test_a_search_alone(server):
    body = {"query": QUESTION, "regrad": {"top_k": 1}}
    [found] = httpx.post(f"{server.url}/v1/search", json=body).json()["data"]
    assert found["id"] == "d0" and found["score"] > 0


def test_a_filter_of_qdrants(server):
    only = {"must": [{"key": "team", "match": {"value": "b"}}]}
    body = chat(server.url, regrad={"filter": only, "top_k": 4}).json()
    assert body["regrad"]["documents"] == []  # Ida is of the other team
    assert body["regrad"]["notes"] == ["nothing was retrieved: the answer comes from the model alone"]
    body = chat(server.url, "Who works as a diver?", regrad={"filter": only, "top_k": 4}).json()
    assert [one["id"] for one in body["regrad"]["documents"]] == ["d1"]


def test_passages_beside_the_gradients(server):
    plain, shown = (chat(server.url, regrad={"passages": passages}).json() for passages in (False, True))
    assert shown["regrad"]["mode"] == "regrad+icl" and plain["regrad"]["mode"] == "regrad"
    assert shown["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


def test_turns_and_a_system_message_reach_the_prompt(server):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who is Ida?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "Nobody knows."},
        {"role": "assistant", "content": "A baker."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    said = chat(server.url, messages=messages, model="direct", max_tokens=24).json()
    turns = (("user", "Who is Ida?"), ("assistant", "A baker."))
    own = own_answer(server, "direct", system="Be kind.", turns=turns)
    assert said["choices"][0]["message"]["content"] == own.text
    assert said["usage"]["prompt_tokens"] == own.prompt_tokens


def test_questions_with_options(server):
    asked = {"type": "choice", "choices": ["baker", "diver"]}
    said = chat(server.url, regrad=asked).json()["choices"][0]["message"]["content"]
    assert said == own_answer(server, "regrad", type="choice", choices=("baker", "diver")).text


def test_many_clients_at_once_get_each_their_own(server):
    names = ["Ida Corvand", "Noor Selowan", "Orla Thornaby", "Galen Zimuken"]
    asked = [(f"Who is {name}, {i}?", f"d{n}") for i in range(8) for n, name in enumerate(names)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: chat(server.url, one[0], regrad={"top_k": 1}).json(), asked))
    for (question, document), answer in zip(asked, answers, strict=True):
        assert [one["id"] for one in answer["regrad"]["documents"]] == [document]
        single = server.regrad.answer(question, top_k=1).text
        assert answer["choices"][0]["message"]["content"] == single


@pytest.mark.parametrize("asked", [{"model": "regrad/grounded"}, {"regrad": {"type": "yesno"}}], ids=["span", "option"])
def test_more_than_a_batch_of_those_that_are_answered_at_once(start, served, monkeypatch, asked):
    answered, waiting = type(served[0]).answered, threading.Event()

    def together(regrad, found, search):  # the first waits until the others have come
        waiting.wait(20)
        return answered(regrad, found, search)

    monkeypatch.setattr(type(served[0]), "answered", together)
    with start(batch=2) as running:
        futures = in_threads(7, lambda: chat(running.url, **asked))
        until(lambda: running.engine.waiting >= 5)
        waiting.set()
        said = {future.result().json()["choices"][0]["message"]["content"] for future in futures}
    [one] = said
    assert one in ("yes", "no") or any(one in text for text in TEXTS)


def test_metrics_count_and_tell_nothing_of_what_was_asked(server):
    chat(server.url, "Who is the secret Ida Corvand?")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'regrad_requests_total{model="regrad",route="/v1/chat/completions",status="200"}' in text
    assert "regrad_waiting_requests 0.0" in text and 'regrad_part_seconds_count{part="decode"}' in text
    assert "secret" not in text and "Corvand" not in text


def test_health_readiness_and_the_page(server):
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{server.url}/ready").json()["documents"] == 4
    page = httpx.get(server.url).text
    assert "<title>regrad-qdrant</title>" in page
    assert "http://" not in page and "https://" not in page  # no other host


REFUSED = {
    "an unknown model": ({"model": "gpt-5"}, 404, "there is no model 'gpt-5'"),
    "no question": ({"messages": [{"role": "user", "content": " "}]}, 400, "the last message must be the user's"),
    "an answer last": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message must be"),
    "no message": ({"messages": []}, 400, "messages"),
    "a role of its own": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    "a field of regrad's that is none": ({"regrad": {"topk": 3}}, 400, "regrad.topk"),
    "a filter that is none": ({"regrad": {"filter": {"must": "x"}}}, 400, "regrad.filter is no filter"),
    "a vector that is not there": ({"regrad": {"using": "nope"}}, 400, "the collection has no vector 'nope'"),
    "a choice of none": ({"regrad": {"type": "choice"}}, 400, "choices go with type"),
    "several answers": ({"n": 2}, 400, "n:"),
    "a prompt beyond the context": ({"max_tokens": 5000}, 400, "of the model's context"),
    "a long question, grounded": (
        {"model": "regrad/grounded", "messages": [{"role": "user", "content": "Ida " * 900}]},
        400,
        "model's context",
    ),
    "a stop that is no text": ({"stop": [1]}, 400, "stop: "),
    "half a letter": ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "no valid Unicode"),
    "half a letter before": (
        {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "user", "content": "x"}]},
        400,
        "no valid Unicode",
    ),
    "a filter that the engine refuses": (
        {"regrad": {"filter": {"must": [{"has_id": [-1]}]}}},
        400,
        "the search refuses the filter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_openais_shape(server, name):
    body, status, message = REFUSED[name]
    response = chat(server.url, **body)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_json_that_is_none_and_a_body_too_large(server):
    url = f"{server.url}/v1/chat/completions"
    broken = httpx.post(url, content=b'{"messages": [', headers={"content-type": "application/json"})
    error = broken.json()["error"]
    assert broken.status_code == 400 and error["param"] is None
    assert "the body is no JSON" in error["message"] and "at character 14" in error["message"]
    large = httpx.post(url, json={"messages": [{"role": "user", "content": "x" * 10_000_000}]})
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"

    def parts():
        for _ in range(20):
            yield b"x" * 100_000

    assert httpx.post(url, content=parts()).status_code == 413  # of which the length is not said before
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_a_request_id_of_ones_own_comes_back(server):
    assert httpx.get(f"{server.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert httpx.get(f"{server.url}/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_only_those_with_a_key_may_ask(start):
    with start(keys=Keys("secret")) as running:
        for key in (None, "wrong", "secrets"):
            response = chat(running.url, key=key)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert chat(running.url, key="secret").status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.post(f"{running.url}/v1/search", json={"query": "x"}).status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200


def of_team(team):
    return models.Filter(must=[models.FieldCondition(key="team", match=models.MatchValue(value=team))])


TRIES = [
    None,
    {"must": [{"key": "team", "match": {"value": "a"}}]},
    {"should": [{"key": "team", "match": {"value": "a"}}, {"key": "team", "match": {"value": "b"}}]},
    {"must_not": [{"key": "team", "match": {"value": "b"}}]},
    {"min_should": {"conditions": [{"key": "team", "match": {"value": "a"}}], "min_count": 0}},
]


@pytest.mark.parametrize("only", TRIES, ids=["nothing", "must", "should", "must not", "min should"])
@pytest.mark.parametrize("model", ["regrad", "regrad+icl", "rag", "regrad/grounded", "direct"])
def test_a_tenant_never_sees_beyond_its_own(start, tenants_server, only, model):
    options = {"top_k": 10} | ({"filter": only} if only else {}) | ({"grounded": True} if model == "direct" else {})
    question = "Who works as a baker or a diver, likes plum cake or plays the harp?"
    answer = chat(tenants_server.url, question, key="key-b", model=model, regrad=options).json()
    may = {"d1", "d3"} if only is None or "should" in only or "min_should" in only else set()
    assert {one["id"] for one in answer["regrad"]["documents"]} == may
    found = httpx.post(
        f"{tenants_server.url}/v1/search", json={"query": question, "regrad": options},
        headers={"authorization": "Bearer key-b"},
    ).json()  # fmt: skip
    assert {one["id"] for one in found["data"]} == may


@pytest.fixture(scope="module")
def tenants_server(served):
    with running_server(served, keys=Keys(None, {"key-a": of_team("a"), "key-b": of_team("b")})) as running:
        yield running


def test_two_tenants_see_different_documents(tenants_server):
    asked = {"query": "Who works as a baker or a diver?", "regrad": {"top_k": 10}}
    found = {
        key: httpx.post(f"{tenants_server.url}/v1/search", json=asked, headers={"authorization": f"Bearer {key}"})
        for key in ("key-a", "key-b")
    }
    assert [{one["id"] for one in found[key].json()["data"]} for key in found] == [{"d0"}, {"d1"}]


@pytest.fixture
def slow(served, monkeypatch):
    """Every token takes a while."""
    from regrad_qdrant.answer.running import RunningBatch

    step = RunningBatch.step
    monkeypatch.setattr(RunningBatch, "step", lambda batch: (time.sleep(0.1), step(batch))[1])


def in_threads(count, work):
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(work) for _ in range(count)]
    return futures


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_says_when_to_try_again(start, slow):
    with start(batch=1, queue=1) as running:
        first = in_threads(1, lambda: chat(running.url))
        until(lambda: running.engine.running == 1)
        second = in_threads(1, lambda: chat(running.url))
        until(lambda: running.engine.waiting == 1)
        refused = chat(running.url)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full"
        assert [future.result().status_code for future in (*first, *second)] == [200, 200]


def test_an_answer_that_is_late_is_a_504_and_frees_its_row(start, slow):
    with start(deadline=0.3) as running:
        late = chat(running.url)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        until(lambda: running.engine.running == 0)


def test_a_search_that_hangs_is_late_too_and_counts_as_waiting(start, served, monkeypatch):
    search, released = type(served[0].bank).search_many, threading.Event()

    def hanging(*given, **options):
        released.wait(20)
        return search(*given, **options)

    monkeypatch.setattr(type(served[0].bank), "search_many", hanging)
    with start(deadline=1.0, queue=1) as running:
        late = in_threads(1, lambda: chat(running.url))
        time.sleep(0.3)
        assert chat(running.url).status_code == 429
        assert late[0].result().status_code == 504
        assert httpx.get(f"{running.url}/health").status_code == 200
        released.set()


def test_nobody_waits_for_ever_for_an_engine_that_says_nothing(start, monkeypatch):
    from regrad_qdrant.serve import engine

    monkeypatch.setattr(engine, "GRACE", 0.2)
    monkeypatch.setattr(engine.Engine, "_take", lambda _: time.sleep(0.05) or True)
    with start(deadline=0.3) as running:
        assert chat(running.url).status_code == 504
        monkeypatch.undo()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(start, slow, stream):
    with start() as running:
        if stream:
            body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
            with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
                assert running.engine.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                chat(running.url, timeout=0.5)
        until(lambda: running.engine.running == 0, 1.5)
        assert chat(running.url).status_code == 200


def test_a_damaged_atom_fails_its_own_request_alone(server, served, monkeypatch):
    from regrad_qdrant.errors import CorruptRecordError

    regrad = served[0]
    decode = regrad.adapter.decode
    damaged = regrad.bank.search("Noor Selowan", 1)[0].record

    def refusing(records, weights=None):
        if any(record.payload == damaged.payload if hasattr(record, "payload") else record == damaged
               for record in records):  # fmt: skip
            raise CorruptRecordError("the atom is damaged")
        return decode(records, weights)

    monkeypatch.setattr(regrad.adapter, "decode", refusing)
    questions = [QUESTION, "Who is Noor Selowan?", "What does Orla Thornaby play?"] * 3
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda question: chat(server.url, question, regrad={"top_k": 1}), questions))
    assert [response.status_code for response in found] == [200, 500, 200] * 3
    assert found[1].json()["error"]["code"] == "CorruptRecordError"


def test_a_bank_that_is_away_is_a_503_and_comes_back(server, served, monkeypatch):
    from regrad_qdrant.errors import StoreUnavailableError

    def away(*_args, **_options):
        raise StoreUnavailableError("no route to host")

    store = served[0].bank.store
    with monkeypatch.context() as patched:
        patched.setattr(type(store), "count", away)
        patched.setattr(type(served[0].bank), "search_many", away)
        response = chat(server.url)
        assert response.status_code == 503 and response.headers["retry-after"] and "no route" not in response.text
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert chat(server.url, model="direct").status_code == 200
    assert chat(server.url).status_code == 200


def test_a_fault_of_the_models_own_is_told_and_the_server_goes_on(server, monkeypatch):
    from regrad_qdrant.answer.running import RunningBatch

    with monkeypatch.context() as patched:
        patched.setattr(RunningBatch, "step", lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
        failed = chat(server.url)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
        assert "memory" not in failed.text
    assert chat(server.url).status_code == 200


class Panic(BaseException):
    """As those of libraries in Rust."""


def test_a_panic_below_us_is_the_requests_own(start, served, monkeypatch):
    answered = type(served[0]).answered

    def panicking(regrad, found, search):
        if any(one.asked.question == "Panic?" for one in found):
            raise Panic("no luck")
        return answered(regrad, found, search)

    monkeypatch.setattr(type(served[0]), "answered", panicking)
    with start(batch=4) as running:
        asked = {question: in_threads(1, lambda question=question: chat(running.url, question, model="regrad/grounded"))
                 for question in ("Panic?", QUESTION)}  # fmt: skip
        statuses = {question: future.result().status_code for question, [future] in asked.items()}
    assert statuses == {"Panic?": 500, QUESTION: 200}


def test_rows_that_share_a_recurrent_state_end_one_by_one(tokenizer, tmp_path):
    config = transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention", "conv"])
    model = transformers.Lfm2ForCausalLM(config).eval().requires_grad_(False)
    initialization = tiny_initialization(model, targets=["w1", "w2", "w3"])
    lengths = (2, 9, 5, 3, 12, 7)  # the first alone, while it lasts; then the others together
    with filled(tmp_path, model, tokenizer, initialization) as regrad:
        with running_server((regrad, None)) as running, ThreadPoolExecutor(len(lengths)) as threads:
            answers = list(threads.map(lambda most: chat(running.url, max_tokens=most), lengths))
        assert [answer.status_code for answer in answers] == [200] * len(lengths)
        for answer, most in zip(answers, lengths, strict=True):
            said = answer.json()["choices"][0]["message"]["content"]
            assert said == regrad.answer(QUESTION, max_new_tokens=most).text


def test_a_server_that_is_ended_answers_what_it_has_accepted(start, slow):
    with start(batch=2) as running:
        asked = in_threads(6, lambda: chat(running.url))
        until(lambda: running.engine.running == 2 and running.engine.waiting == 4)
        ending = threading.Thread(target=running.stop)
        ending.start()
        assert [future.result().status_code for future in asked] == [200] * 6
        ending.join()
    with pytest.raises(httpx.ConnectError):
        chat(running.url)
