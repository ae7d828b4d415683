"""The paper's tables and figures on one's own model and data, as runs of `regrad-qdrant`: one command a table.

Each run is a command of its own, shown before it starts. What it has measured stands in a JSON file: a run that is
there is not made again, and one that was stopped goes on from the answers that it had.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrad_loaders.training.log import is_over
from regrad_loaders.training.recipe import Recipe
from regrad_qdrant.errors import DataError

SETS = ("nq_open", "phantomwiki", "hotpotqa", "squad2_dev")
DOMAINS = ("medquad", "tatqa", "bioasq", "pubmedqa", "housing_yesno", "nq_open", "squad2_dev")
GIVEN = ("base_model", "data_dir", "layers", "start")  # of a recipe, what `train` may replace
SHARED_FIELD = {"housing_yesno": "state"}  # of a question and of what is retrieved for it
COMPARED = (
    "direct", "rag", "rag-kv", "cpt", "instruction-cpt", "ft-direct", "ft-cpt", "ft-rag", "ft-rag-kv", "ft-rag-64",
    "ft-rag-128", "regrad", "regrad/grounded", "regrad/auto", "regrad+icl",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A table: what `eval`, or another command, is asked for each set."""

    shows: str
    options: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})  # runs of a set, by their ending
    command: tuple[str, ...] = ("eval",)
    sets: tuple[str, ...] = SETS
    recipes: tuple[str, ...] = ()  # of the table's folder: each is trained first and asked
    from_nothing: bool = False  # and not from --init, which is asked beside them


TABLES = {
    "main": Experiment(
        "every baseline beside gradients",
        ("--modes", ",".join(COMPARED), "--against", "regrad,regrad/grounded", "--batch", "8"),
    ),
    "adapters": Experiment(
        "an adapter trained for each document (PRAG), half a minute of training a question",
        ("--modes", "ft-direct,prag,ft-prag,regrad", "--against", "regrad,ft-direct", "--batch", "8"),
        sets=("nq_open", "phantomwiki"),
    ),
    "atoms": Experiment(
        "the number of atoms (5.4)",
        ("--modes", "regrad,regrad/grounded,ft-rag", "--sweep", "1,5,10,20", "--batch", "4"),
    ),
    "noise": Experiment(
        "random documents among those retrieved (appendix B)",
        ("--modes", "regrad,regrad/grounded,ft-rag", "--batch", "4"),
        {f"-{count}": ("--distractors", str(count)) for count in (0, 5, 10, 20)},
    ),
    "protocol": Experiment(
        "the same questions put and scored as the paper does",
        ("--modes", "direct,rag,ft-direct,ft-rag,regrad,random", "--against", "random", "--protocol", "paper"),
    ),
    "drift": Experiment("documents taught step by step (Table 2)", command=("bench", "drift"), sets=("nq_open",)),
    "domains": Experiment(
        "an initialization carried to other domains (5.5)",
        ("--modes", "regrad,regrad/grounded", "--batch", "8"),
        sets=DOMAINS,
        recipes=("longer", "domain", "mixed"),
    ),
    "settings": Experiment(
        "short trainings from nothing, as the paper's authors ran theirs, as we do, and ours with one of theirs",
        ("--modes", "direct,random,regrad", "--against", "random,direct", "--batch", "8"),
        sets=("nq_open", "squad2_dev", "hotpotqa"),
        recipes=("published", "ours", "ours-sum", "ours-raw", "ours-rate"),
        from_nothing=True,
    ),
}


@dataclass(frozen=True)
class Run:
    """One command and the file that it writes."""

    arguments: tuple[str, ...]
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)  # some of those that the file must name
    is_over: bool = True  # of a training, whose file is there from its first evaluation on

    @property
    def command(self) -> str:
        return shlex.join(["regrad-qdrant", *self.arguments])

    def is_made(self) -> bool:
        """Whether the file is there, and will stay as it is.

        Raises:
            DataError: for one of other settings.
        """
        if not self.out.is_file() or not self.is_over:
            return False
        there = json.loads(self.out.read_text(encoding="utf-8"))["settings"] if self.settings else {}
        if differing := sorted(name for name, value in self.settings.items() if there.get(name) != value):
            raise DataError(f"{self.out} was made with another {differing[0]}: remove it, or choose another --out")
        return True


def runs(
    table: str,
    data: Path,
    sets: Sequence[str] | None,
    sample: int,
    out: Path,
    init: str,
    dtype: str = "auto",
    more: Sequence[str] = (),
) -> list[Run]:
    """The runs of a table, set by set, after the trainings that it needs.

    Args:
        sets: None are the table's own.
        more: options of every run beside its own. They are not compared with those of a file that is there.

    Raises:
        DataError: for a table that is none, a set without its files, a recipe that is missing, or a training that was
            of another recipe.
    """
    if table not in TABLES:
        raise DataError(f"table {table!r} is not one of {', '.join(TABLES)}")
    experiment, found, trainings = TABLES[table], [], []
    names = sets or experiment.sets
    variants: dict[str, Sequence[str]] = {} if experiment.from_nothing else dict(experiment.variants)
    typed = () if dtype == "auto" else ("--dtype", dtype)
    begins = None if experiment.from_nothing else init
    for name in experiment.recipes:
        trainings.append(_training(out / table / f"{name}.yaml", f"{table}-{name}", data, begins, typed))
        variants[f"-{name}"] = ("--init", str(trainings[-1].out.parent))
    for number, name in enumerate(names):
        folder = data / name
        if not (folder / "qa.jsonl").is_file():
            raise DataError(f"{folder} has no qa.jsonl: --data DIR holds the sets, --sets names them")
        for ending, options in variants.items():
            file = out / table / f"{name}{ending}.json"
            shared = ["--split", "dev", "--sample", str(sample), "--json", str(file), *typed]
            asked_of = init if "--init" not in options else options[options.index("--init") + 1]
            made_with = {"init": asked_of, "sample": sample} | ({} if dtype == "auto" else {"dtype": dtype})
            if "--init" not in options:
                shared += ["--init", init]
            if experiment.command == ("eval",):
                asked = ["--corpus", str(folder / "corpus.jsonl"), "--qa", str(folder / "qa.jsonl")]
                shared += ["--resume", str(file.with_suffix(".answers.jsonl"))]
                if name in SHARED_FIELD:
                    shared += ["--filter-field", SHARED_FIELD[name]]
            else:
                asked = ["--data", str(folder), "--other", str(data / _other(names, number))]
            given = (*experiment.command, *asked, *experiment.options, *options, *shared, *more)
            found.append(Run(given, file, made_with))
    asked_for = {run.settings["init"] for run in found if not run.out.is_file()}
    return [*(training for training in trainings if str(training.out.parent) in asked_for), *found]


def _training(recipe: Path, name: str, data: Path, begins: str | None, options: Sequence[str]) -> Run:
    """The run of a recipe from an initialization, or what is left of it."""
    if not recipe.is_file():
        raise DataError(f"{recipe} is not there: the recipes of this table are in benchmarks/paper of the repository")
    folder = Path("runs") / name
    made, over = folder / "initialization" / "regrad.json", True
    if made.is_file():
        there = json.loads(made.read_text(encoding="utf-8"))["card"].get("recipe") or {}
        read = Recipe.load(recipe)
        wanted, over = json.loads(json.dumps(read.as_dict())), is_over(folder, read.steps)
        if any(there.get(name) != value for name, value in wanted.items() if name not in GIVEN):
            raise DataError(f"{made} was trained with another recipe than {recipe}: remove the folder {folder}")
        if begins is not None and there.get("start") != begins:
            raise DataError(
                f"{made} was trained from {there.get('start')}, not from {begins}: remove the folder {folder}"
            )
    resumed = ["--resume"] if (folder / "checkpoint.pt").is_file() else []
    begun = () if begins is None else ("--init", begins)
    asked = ("train", "--recipe", str(recipe), "--data-dir", str(data), "--out", str(folder))
    return Run((*asked, *begun, *options, *resumed), made, is_over=over)


def _other(names: Sequence[str], number: int) -> str:
    """A set beside the one that is taught, of which nothing should be forgotten."""
    others = [name for name in (*names[number + 1 :], *names[:number], *SETS) if name != names[number]]
    return others[0]


def carry_out(todo: Sequence[Run], say: Callable[[str], None]) -> None:
    """Run what has not been run.

    Raises:
        DataError: where a run fails; what it said stands above. Before the first, for a file of other settings.
    """
    made = {run.out: run.is_made() for run in todo}
    for run in todo:
        if made[run.out]:
            say(f"{run.out} is there")
            continue
        run.out.parent.mkdir(parents=True, exist_ok=True)
        say(run.command)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "regrad_qdrant", *run.arguments], check=False)
        if done.returncode:
            raise DataError(f"it failed with {done.returncode}; started again, the table goes on from there")
        run.out.with_suffix(".answers.jsonl").unlink(missing_ok=True)
        say(f"{run.out} after {(time.perf_counter() - started) / 60:.1f} minutes")
