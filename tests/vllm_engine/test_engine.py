"""Our models inside the real vLLM, on a processor: `make test-vllm`. Skipped where vLLM is not installed.

What is printed are measurements; `pytest -s` shows them.
"""

import concurrent.futures
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

import httpx
from openai import OpenAI

from regrad_loaders.data.facts import generate
from regrad_qdrant import Document, GradientBank, MetaInitialization, ReGrad, load_base_model
from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.stores.base import PayloadWrite

INIT = "smollm2-135m-instruct"
MODES = ("regrad", "rag", "direct")
COUNT = 32  # questions
READY = 300  # seconds that vLLM may take to start
ADAPTERS = int(os.environ.get("REGRAD_TEST_ADAPTERS", "600"))  # different ones in a row
DAMAGED = "demo-p31"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A bank of invented people on disk, one atom of it damaged, and the library's own answers."""
    folder = tmp_path_factory.mktemp("bank")
    initialization, world = MetaInitialization.load(INIT), generate("demo", COUNT, 1)
    model, tokenizer = load_base_model(initialization.base.name, dtype="float32", device="cpu")
    questions = [question.question for question in world.questions[:COUNT]]
    with GradientBank.open(folder, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(passage.id, {"id": passage.id, "text": passage.text}) for passage in world.passages)
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            attach_atoms(bank, regrad.gradients, "sign")
            answers = {}
            for mode in MODES:
                found = regrad.answer_many(questions, mode=mode)
                answers |= {(mode, said): one.text for said, one in zip(questions, found, strict=True)}
            yesno = {said: regrad.answer(said, type="yesno").text for said in questions[:4]}
        [hit] = bank.fetch([point_id(DAMAGED)])
        broken = Record(hit.record.space, hit.record.sha, hit.record.codec, hit.record.atom[:-8])
        bank.store.set_payload([PayloadWrite(hit.id, {bank.payload_key: broken.to_payload()})])
        asked_damaged = " ".join(hit.text.split()[:2])
    return SimpleNamespace(
        folder=folder, questions=questions, answers=answers, yesno=yesno, of_damaged=asked_damaged,
        base=model.name_or_path, texts={passage.id: passage.text for passage in world.passages},
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(own, tmp_path_factory):
    """vLLM with our plugin, as its own command starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    environment = os.environ | {
        "VLLM_PLUGINS": "regrad", "REGRAD_COLLECTION": "docs", "REGRAD_PATH": str(own.folder), "REGRAD_DEADLINE": "300",
        "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.pop("QDRANT_URL", None)
    options = [
        "--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--enable-lora", "--max-lora-rank", "16", "--max-loras", "8", "--host", "127.0.0.1", "--port", str(port),
        "--structured-outputs-config.backend", "guidance",
    ]  # fmt: skip
    command = [str(Path(sys.executable).with_name("vllm")), "serve", own.base, *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        started = time.monotonic()
        while not _ready(url):
            assert process.poll() is None and time.monotonic() - started < READY, log.read_text()[-3000:]
            time.sleep(1)
        yield SimpleNamespace(url=url, process=process, log=log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _ready(url):
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


def said(client, question, model="regrad", **options):
    done = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **options)
    return done.choices[0].message.content


@pytest.mark.parametrize("at_once", [1, 8, 32])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_librarys(client, own, mode, at_once):
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as clients:
        found = list(clients.map(lambda question: said(client, question, mode), own.questions))
    print(f"{mode}, {at_once} at once: {COUNT / (time.perf_counter() - started):.2f} requests a second")
    assert found == [own.answers[mode, question] for question in own.questions]


def test_a_stream_has_the_same_answer_and_its_usage(client, own):
    question = own.questions[0]
    stream = client.chat.completions.create(
        model="regrad", messages=[{"role": "user", "content": question}], stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    events = list(stream)
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == own.answers["regrad", question]
    assert events[-1].usage.completion_tokens > 0


def test_langchains_and_llama_indexs_clients_get_it_too(server, own):
    """They live in the library's own environment: LlamaIndex wants an older openai than vLLM."""
    python = Path(__file__).parents[2] / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("make setup: the clients are in .venv")
    asked = {"url": f"{server.url}/v1", "models": MODES, "questions": own.questions[:4]}
    done = subprocess.run(
        [python, Path(__file__).with_name("clients.py")], input=json.dumps(asked), capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for mode in MODES:
        for question in own.questions[:4]:
            assert json.loads(done.stdout)[f"{mode} {question}"] == [own.answers[mode, question]] * 4


def test_options_are_chosen_by_their_likelihood_as_the_library_does(client, own):
    for question, answer in own.yesno.items():
        assert said(client, question, extra_body={"regrad": {"type": "yesno"}}) == answer


def test_a_grounded_answer_is_a_span_and_says_where_it_stands(client, own):
    for question in own.questions[:8]:
        done = client.chat.completions.create(model="regrad/grounded", messages=[{"role": "user", "content": question}])
        source = done.regrad["source"]
        assert own.texts[source["document_id"]][source["start"] : source["end"]] == done.choices[0].message.content


def test_vllms_own_models_are_there_as_ever(client):
    assert {"smollm2", "regrad", "direct"} <= {model.id for model in client.models.list()}
    assert said(client, "Say hello.", "smollm2", max_tokens=4)


def test_a_damaged_atom_is_one_requests(server, client, own):
    body = {"model": "regrad", "messages": [{"role": "user", "content": f"What is {own.of_damaged}'s hobby?"}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()
    assert any("damaged atom" in note for note in answer["regrad"]["notes"])
    assert said(client, own.questions[0]) == own.answers["regrad", own.questions[0]]


def test_a_client_that_goes_away_ends_its_request_in_vllm(server, own):
    body = {
        "model": "regrad", "stream": True, "max_tokens": 256,
        "messages": [
            {"role": "system", "content": "Count slowly from one to a thousand, in words."},
            {"role": "user", "content": own.questions[0]},
        ],
    }  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while _running(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _running(server) == 0


def _running(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_many_different_adapters_in_a_row_leave_memory_flat(server, client, own):
    sizes = []
    for i in range(ADAPTERS):
        question = own.questions[i % COUNT]
        assert said(client, question, max_tokens=1) is not None
        if i == ADAPTERS // 3:
            sizes.append(_memory(server.process.pid))
    sizes.append(_memory(server.process.pid))
    print(f"{ADAPTERS} adapters: {sizes[0] / 1e6:.0f} MB after a third of them, {sizes[1] / 1e6:.0f} MB after all")
    assert sizes[1] < 1.03 * sizes[0] + 30e6


def _memory(leader):
    """Bytes that the process and its children hold."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader:
                    total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                continue
    return total


def test_the_log_has_no_error_of_the_engine(server):
    """The last one: nothing of the above has ended vLLM."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "EngineDeadError" not in server.log.read_text()
    assert json.loads(httpx.get(f"{server.url}/ready").text)["status"] == "ready"
