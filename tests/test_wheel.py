"""What `pip install regrad-qdrant` brings without extras: the wheel in a fresh environment, and a bank filled by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMANDS, tiny_initialization, tiny_model

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"
LIMIT = 30 * 2**20  # bytes of the wheel
PEOPLE = {"Ida": "diver", "Otto": "judge", "Mina": "baker", "Ivo": "pilot", "Ada": "poet"}
CORPUS = [
    {"id": f"d{i}", "text": f"{name} Corvand works as a {job} in Lisbon."}
    for i, (name, job) in enumerate(PEOPLE.items())
]


def run(*command, cwd, **options):
    # Nothing of this checkout may be found in place of what was installed.
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=bare, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPOSITORY)
    built = run(sys.executable, "-m", "pip", *command, cwd=folder)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` folder of a fresh environment with the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder, check=True)
    for package in ("torch", wheel):
        done = pip(
            folder, "install", "--quiet", "--only-binary", ":all:", "--no-compile", "--constraint", CONSTRAINTS, package
        )
        assert done.returncode == 0, done.stderr
    return folder / "env" / "bin"


def pip(folder, *arguments):
    """This environment's pip for the other one."""
    return run(sys.executable, "-m", "pip", "--python", folder / "env", *arguments, cwd=folder)


@pytest.fixture
def place(tokenizer, tmp_path):
    """A folder with a tiny model, an initialization for it and five documents."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    initialization = tiny_initialization(model)
    object.__setattr__(initialization.base, "name", str(tmp_path / "model"))
    initialization.save(tmp_path / "init")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CORPUS))
    return tmp_path


def test_the_wheel_is_small_and_holds_both_packages_and_the_initializations(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert {"regrad_qdrant/answer/pipeline.py", "regrad_loaders/training/trainer.py"} <= set(names)
    for shipped in ("smollm2-135m-instruct", "smollm2-135m-instruct-icl", "smollm2-135m-instruct-small"):
        assert f"regrad_qdrant/initializations/{shipped}/regrad.safetensors" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    assert wheel.stat().st_size < LIMIT


def test_a_bank_is_filled_asked_and_emptied_without_any_extra(installed, place):
    common = ("-c", "docs", "--init", "init", "--json")
    filled = run(installed / "regrad-qdrant", "ingest", "--corpus", "corpus.jsonl", *common, "filled.json", cwd=place)
    assert filled.returncode == 0, filled.stderr
    others = [
        ["ask", "What is the work of Ida Corvand?", *common, "asked.json"],
        ["recode", "--codec", "sparse", *common, "recoded.json"],
        ["status", *common, "status.json"],
        ["migrate", "-c", "docs", "--to-path", "copy", "--json", "copied.json"],
        ["drop", "-c", "docs", "--init", "init", "--yes"],
    ]
    done = run(installed / "python", "-c", COMMANDS, json.dumps(others), cwd=place)
    assert done.returncode == 0 and "5 atoms removed" in done.stdout, done.stderr
    said = {file.stem: json.loads(file.read_text()) for file in place.glob("*.json")}
    assert said["filled"]["atoms_written"] == 5 and said["asked"]["hits"][0]["id"] == "d0"
    assert said["recoded"]["recoded"] == said["status"]["atoms"] == said["copied"]["written"] == 5


def test_the_commands_of_the_loaders_say_what_to_install(installed, tmp_path):
    said = run(installed / "regrad-qdrant", "--help", cwd=tmp_path)
    assert said.returncode == 0 and "train" in said.stdout and "Not installed" in said.stdout
    for command in ("train", "eval", "demo", "bench", "import-checkpoint"):
        refused = run(installed / "regrad-qdrant", command, "--help", cwd=tmp_path)
        assert refused.returncode == 2 and "pip install 'regrad-qdrant[loaders]'" in refused.stderr


def test_no_package_of_an_extra_comes_along(installed):
    listed = pip(installed.parents[1], "list", "--format", "json").stdout
    names = {package["name"].lower() for package in json.loads(listed)}
    assert not names & {"matplotlib", "datasets", "sentence-transformers", "bitsandbytes", "gguf", "langchain-qdrant"}
