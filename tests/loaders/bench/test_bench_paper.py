"""The paper's tables as runs: which commands, and that none is run twice."""

import json

import pytest

from regrad_loaders.bench.paper import COMPARED, TABLES, carry_out, runs
from regrad_loaders.evaluation.plan import EVALUATION_MODES
from regrad_qdrant.errors import DataError


@pytest.fixture
def data(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "qa.jsonl").write_text("")
    return tmp_path


def test_every_mode_that_is_compared_is_one():
    assert set(COMPARED) <= set(EVALUATION_MODES)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_runs_of_its_sets(data, table):
    found = runs(table, data, ["one", "two"], 40, data / "out", "small")
    assert len({run.out for run in found}) == len(found) >= 2
    for run in found:
        assert run.command.startswith(
            "regrad-qdrant bench drift --data " if table == "drift" else "regrad-qdrant eval "
        )
        assert "--init small --split dev --sample 40 --json" in run.command
        assert "--dtype" not in run.command
    [first, *_] = runs(table, data, ["one", "two"], 40, data / "out", "small", "bfloat16")
    assert "--dtype bfloat16" in first.command


def test_what_is_wrong_is_named(data):
    with pytest.raises(DataError, match="table 'mine' is not one of main, atoms"):
        runs("mine", data, ["one"], 40, data, "small")
    with pytest.raises(DataError, match="three has no qa.jsonl"):
        runs("main", data, ["three"], 40, data, "small")


def test_a_run_that_is_there_is_not_made_again(data, monkeypatch):
    started = []

    class Done:
        returncode = 0

    def run(arguments, check):
        started.append(arguments)
        out = arguments[arguments.index("--json") + 1]
        with open(out, "w") as file:
            json.dump({}, file)
        with open(out.replace(".json", ".answers.jsonl"), "w") as file:
            file.write("{}")
        return Done()

    monkeypatch.setattr("regrad_loaders.bench.paper.subprocess.run", run)
    said = []
    todo = runs("noise", data, ["one"], 40, data / "out", "small")
    carry_out(todo, said.append)
    carry_out(todo, said.append)
    assert len(started) == len(todo) == 4
    assert [line.endswith("is there") for line in said] == [False] * 8 + [True] * 4
    assert not list((data / "out" / "noise").glob("*.answers.jsonl"))
    Done.returncode = 3
    todo[0].out.unlink()
    with pytest.raises(DataError, match="failed with 3; started again"):
        carry_out(todo, said.append)
