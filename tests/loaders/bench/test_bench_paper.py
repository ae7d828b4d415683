"""The paper's tables as runs: which commands, and that none is run twice."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from regrad_loaders.bench.paper import COMPARED, TABLES, carry_out, runs
from regrad_loaders.evaluation.plan import EVALUATION_MODES
from regrad_loaders.training.recipe import Recipe
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
    for recipe in TABLES[table].recipes:
        path = data / "out" / table / f"{recipe}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = runs(table, data, ["one", "two"], 40, data / "out", "small")
    assert len({run.out for run in found}) == len(found) >= 2
    asked = found[len(TABLES[table].recipes) :]
    for run in asked:
        assert run.command.startswith(
            "regrad-qdrant bench drift --data " if table == "drift" else "regrad-qdrant eval "
        )
        assert "--split dev --sample 40 --json" in run.command
        assert run.command.count("--init ") == 1
        assert "--dtype" not in run.command
    assert ("--init small" in asked[0].command) is not TABLES[table].from_nothing
    [first, *_] = runs(table, data, ["one", "two"], 40, data / "out", "small", "bfloat16")
    assert "--dtype bfloat16" in first.command


def test_trainings_from_nothing_have_no_start(data):
    recipes = TABLES["settings"].recipes
    for recipe in recipes:
        path = data / "out" / "settings" / f"{recipe}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = runs("settings", data, ["one"], 40, data / "out", "small")
    trainings, asked = found[: len(recipes)], found[len(recipes) :]
    assert not [run for run in trainings if "--init" in run.command]
    assert [run.out.stem for run in asked] == [f"one-{recipe}" for recipe in recipes]
    assert f"--init runs/settings-{recipes[-1]}/initialization" in asked[-1].command


def test_what_every_run_is_given_beside_its_own_options(data):
    found = runs("main", data, ["one", "two"], 40, data / "out", "small", more=("--ft-rag", "mine"))
    assert all(run.command.endswith("--ft-rag mine") for run in found)


def test_a_training_is_not_made_for_results_that_are_there_nor_taken_for_one_of_another_recipe(data, monkeypatch):
    monkeypatch.chdir(data)
    folder = data / "out" / "domains"
    folder.mkdir(parents=True)
    for name in TABLES["domains"].recipes:
        there = Path(__file__).parents[3] / "benchmarks" / "paper" / "domains" / f"{name}.yaml"
        (folder / f"{name}.yaml").write_bytes(there.read_bytes())
        (folder / f"one-{name}.json").touch()
    (folder / "one-longer.json").unlink()
    found = runs("domains", data, ["one"], 40, data / "out", "small")
    assert [run.out.parts[1] for run in found if run.out.name == "regrad.json"] == ["domains-longer"]
    made = data / "runs" / "domains-longer" / "initialization" / "regrad.json"
    made.parent.mkdir(parents=True)
    same = Recipe.load(folder / "longer.yaml").as_dict() | {"start": "small", "data_dir": "elsewhere"}  # as given
    for recipe, error in ((same, None), (same | {"learning_rate": 7.0}, DataError)):
        made.write_text(json.dumps({"card": {"recipe": recipe}}))
        with pytest.raises(error, match="with another recipe") if error else nullcontext():
            runs("domains", data, ["one"], 40, data / "out", "small")
    made.write_text(json.dumps({"card": {"recipe": same}}))
    with pytest.raises(DataError, match="was trained from small, not from another: remove the folder"):
        runs("domains", data, ["one"], 40, data / "out", "another")
    log = made.parents[1] / "metrics.jsonl"
    for rows, is_over in (([{"kind": "step", "step": 3}], False), ([{"kind": "end", "step": 3}], True)):
        log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        [training] = [
            run
            for run in runs("domains", data, ["one"], 40, data / "out", "small")
            if run.out == made.relative_to(data)
        ]
        assert training.is_made() is is_over  # the best so far of a run that was stopped is not what it comes to


def test_initializations_are_trained_before_they_are_asked(data, monkeypatch):
    monkeypatch.chdir(data)
    with pytest.raises(DataError, match=r"longer\.yaml is not there: the recipes of this table"):
        runs("domains", data, ["one"], 40, data / "out", "small")
    for recipe in TABLES["domains"].recipes:
        path = data / "out" / "domains" / f"{recipe}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = runs("domains", data, ["one"], 40, data / "out", "small")
    longer, domain, mixed, *asked = found
    assert longer.command == (
        f"regrad-qdrant train --recipe {data}/out/domains/longer.yaml --data-dir {data} "
        "--out runs/domains-longer --init small"
    )
    assert [run.out.stem for run in asked] == ["one", "one-longer", "one-domain", "one-mixed"]
    assert "--init runs/domains-mixed/initialization" in asked[-1].command
    (data / "runs" / "domains-domain").mkdir(parents=True)
    (data / "runs" / "domains-domain" / "checkpoint.pt").touch()
    assert [run.command.endswith("--resume") for run in runs("domains", data, ["one"], 40, data / "out", "small")[:3]] \
        == [False, True, False]  # fmt: skip


def test_recipes_of_the_repository_are_whole():
    for table, experiment in TABLES.items():
        for name in experiment.recipes:
            recipe = Recipe.load(Path(__file__).parents[3] / "benchmarks" / "paper" / table / f"{name}.yaml")
            assert recipe.name == name
            assert sum(source.weight for source in recipe.data) == pytest.approx(1)


def test_a_set_is_filtered_and_another_is_what_stays(data):
    (data / "housing_yesno").mkdir()
    (data / "housing_yesno" / "qa.jsonl").touch()
    [run, one] = runs("main", data, ["housing_yesno", "one"], 40, data / "out", "small")
    assert "--filter-field state" in run.command and "--filter-field" not in one.command
    first, last = runs("drift", data, ["one", "two"], 40, data / "out", "small")
    assert f"--data {data}/one --other {data}/two" in first.command
    assert f"--data {data}/two --other {data}/one" in last.command
    [alone] = runs("drift", data, ["one"], 40, data / "out", "small")
    assert f"--other {data}/nq_open" in alone.command


def test_what_is_wrong_is_named(data):
    with pytest.raises(DataError, match="table 'mine' is not one of main, adapters"):
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
            json.dump({"settings": {"init": "small", "sample": 40, "dtype": "auto"}}, file)
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
    with pytest.raises(DataError, match=r"one-0\.json was made with another sample: remove it"):
        carry_out(runs("noise", data, ["one"], 80, data / "out", "small"), said.append)
    Done.returncode = 3
    todo[0].out.unlink()
    with pytest.raises(DataError, match="failed with 3; started again"):
        carry_out(todo, said.append)
