"""`regrad-qdrant serve` as a process: it starts, answers, and ends when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from conftest import tiny_initialization, tiny_model
from qdrant_client import models
from servers import filled

from regrad_qdrant.cli import app as cli
from regrad_qdrant.errors import DataError
from regrad_qdrant.serve.service import Keys, read_tenants


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A bank, its initialization, and the model that this names."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    initialization = tiny_initialization(model)
    object.__setattr__(initialization.base, "name", str(tmp_path / "model"))
    initialization.save(tmp_path / "init")
    with filled(tmp_path / "bank", model, tokenizer, initialization):
        pass
    return tmp_path


def command(folder, *options):
    environment = {name: value for name, value in os.environ.items() if name != "QDRANT_URL"}
    given = ["serve", "--collection", "docs", "--path", "bank", "--init", "init", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "regrad_qdrant", *given],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_it_answers_until_it_is_ended(folder):
    port = free_port()
    process = command(folder, "--port", str(port), "--log-json", "--api-key", "secret")
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"{url}/ready").json()["documents"] == 4
            break
        except httpx.ConnectError:
            assert process.poll() is None and time.monotonic() < until, process.stderr.read()
            time.sleep(0.1)
    body = {"messages": [{"role": "user", "content": "What is Ida's job?"}]}
    said = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer secret"}, timeout=60)
    assert said.json()["regrad"]["documents"][0]["id"] == "d0"
    streamed = body | {"stream": True}
    httpx.post(f"{url}/v1/chat/completions", json=streamed, headers={"authorization": "Bearer secret"}, timeout=60)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again when it is done
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line.get("route") == "/v1/chat/completions"]
    assert [(line["status"], line["model"]) for line in asked] == [(200, "regrad")] * 2
    assert {line["tokens"] for line in asked} == {said.json()["usage"]["completion_tokens"]}  # of a stream too
    assert "Ida" not in errors and "secret" not in errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "one process serves all clients"),
        (["--icl-init", "init"], "--icl-payload-key"),
        (["--api-key", ""], "the API key is empty"),
        (["--tenants", "nowhere.json"], "can't read the tenants"),
        (["--merge", "mean"], "merge rule 'mean'"),
        (["--port", "TAKEN"], "can't listen at 127.0.0.1"),
    ],
)
def test_what_it_does_not_do_it_says_before_anything_is_loaded(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [str(taken.getsockname()[1]) if option == "TAKEN" else option for option in options]
        monkeypatch.setattr(sys, "argv", ["regrad-qdrant", "serve", "--collection", "docs", *given])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    ["[]", "{}", '{"": {"must": []}}', '{"key": {"must": "x"}}', '{"key": {}}', '{"key": {"must": [{}]}}', "nope"],
)
def test_tenants_that_let_everybody_see_everything_are_refused(tmp_path, value):
    (tmp_path / "tenants.json").write_text(value)
    with pytest.raises(DataError, match="tenant"):
        read_tenants(tmp_path / "tenants.json")


def test_each_key_is_its_own_client(tmp_path):
    only = {"must": [{"key": "team", "match": {"value": "a"}}]}
    (tmp_path / "tenants.json").write_text(json.dumps({"key-a": only}))
    keys = Keys("main", read_tenants(tmp_path / "tenants.json"))
    assert keys.client("main").filter is None
    assert keys.client("key-a").filter == models.Filter.model_validate(only)
    assert keys.client("key-b") is None and keys.client(None) is None and keys.client("") is None
    assert Keys().client(None).filter is None
