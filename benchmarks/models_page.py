"""The tables and the plot of docs/models.md: the same questions by several models.

sh benchmarks/models.sh NAME
python benchmarks/models_page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from tables import alike, difference, renew, signed, table

from regrad_loaders.data.scores import pooled
from regrad_loaders.evaluation.plots import new_figure

SETS = {
    "nq_open": "Natural Questions",
    "squad2_dev": "SQuAD",
    "hotpotqa": "HotpotQA",
    "squadshifts_wiki": "SQuAD's new Wikipedia",
    "phantomwiki": "phantomwiki",
}
Runs = dict[str, dict[str, Any]]  # by set
SMALLEST = "SmolLM2-135M"
MODELS = {  # where their answers are, the first that has a mode; and the name
    SMALLEST: (("default", "grounded", "."), "smollm2-135m-instruct"),
    "Gemma 3 270M": (("models/gemma-3-270m",), "gemma-3-270m"),
    "Qwen2.5-Coder-0.5B": (("models/qwen2.5-coder-0.5b-instruct",), "qwen2.5-coder-0.5b-instruct"),
}
RIVALS = ("random", "direct", "ft-direct", "rag", "ft-rag")
MODES = (
    "direct", "rag", "ft-direct", "ft-rag", "random", "regrad", "random/grounded", "regrad/grounded", "ft-rag/grounded",
)  # fmt: skip
PAIRS = (
    *(("regrad", rival) for rival in RIVALS),
    *(("regrad/grounded", rival) for rival in ("random/grounded", "rag")),
)

COSTS = (
    ("time of an atom ÷ the bare passes, float32", "gradients.time_over_float32_floor", "{:.2f}"),
    ("time of an answer of 20 tokens, regrad ÷ direct", "query.regrad_over_direct", "{:.2f}"),
    ("regrad ÷ rag", "query.regrad_over_rag", "{:.2f}"),
    ("our own share of an answer", "query.own_share", "{:.1%}"),
)


def read(results: Path, model: str) -> list[Runs]:
    """The runs of a model's folders, set by set."""
    paths = [[results / folder / f"{name}.json" for name in SETS] for folder in MODELS[model][0]]
    return [{path.stem: json.loads(path.read_text(encoding="utf-8")) for path in of if path.is_file()} for of in paths]


def scores(folders: list[Runs], name: str) -> dict[str, float]:
    """F1 by mode, in hundredths, of one set: of the first run that has it."""
    found: dict[str, float] = {}
    for runs in folders:
        for row in runs[name]["intervals"] if name in runs else ():
            found.setdefault(row["mode"], 100 * row["f1"])
    return found


def common(runs: dict[str, list[Runs]]) -> list[str]:
    """The sets that every model was asked, over which all averages are."""
    return [name for name in SETS if all(any(name in folder for folder in folders) for folders in runs.values())]


def section(runs: dict[str, list[Runs]], cost: Path) -> str:
    """The tables: answers, differences of each model but the smallest, and what an atom and an answer take."""
    shown = [name for name in SETS if any(name in own for model, (own, *_) in runs.items() if model != SMALLEST)]
    averaged = [f"average of {len(sets)}"] if len(sets := common(runs)) > 1 else []
    rows = [
        [
            model,
            mode,
            *("" if value is None else f"{value:.1f}" for value in [*values, *([of_all] if averaged else [])]),
        ]
        for model, mode, values, of_all in answers(runs, shown)
        if any(value is not None for value in values)
    ]
    heads = [SETS[name] for name in shown]
    parts = [table(["model", "mode", *heads, *averaged], rows)]
    for model, (own, *_) in runs.items():
        if model != SMALLEST:
            parts.append(table([model, *heads, "average of these"], differences(own, shown)))
    parts.append(table(["", *MODELS], [*shares(runs), *costs(cost)]))
    return "\n".join(parts) + "\n"


def answers(
    runs: dict[str, list[Runs]], sets: list[str]
) -> Iterator[tuple[str, str, list[float | None], float | None]]:
    """Of each model and mode the F1 of every set, where it is known, and the average of those that all were asked."""
    averaged = common(runs)
    for model, folders in runs.items():
        by_set = {name: scores(folders, name) for name in sets}
        of_averaged = [by_set[name] for name in averaged]
        for mode in MODES:
            yield model, mode, [by_set[name].get(mode) for name in sets], average(of_averaged, mode)


def shares(runs: dict[str, list[Runs]]) -> list[list[str]]:
    """What gradients reach of the average of a reader with the passages in its prompt, fine-tuned and as it is, a
    column a model: of the sets that all were asked, and of the four without phantomwiki."""
    every = common(runs)
    of_sets = {f"all {len(every)} sets" if len(every) > 1 else SETS[every[0]]: every, "four sets": [*SETS][:4]}
    rows = []
    for what, sets in of_sets.items():
        found = {model: [scores(folders, name) for name in sets] for model, folders in runs.items()}
        for mode, reader in (("regrad", "ft-rag"), ("regrad/grounded", "ft-rag"), ("regrad/grounded", "rag")):
            of = [(average(of_model, mode), average(of_model, reader)) for of_model in found.values()]
            shown = [f"{own / read:.2f}" if own and read else "" for own, read in of]
            rows.append([f"{mode} ÷ {reader}, {what}", *shown])
    return rows


def average(of_sets: list[dict[str, float]], mode: str) -> float | None:
    """F1 over all of these sets; None where one lacks the mode."""
    known = [found[mode] for found in of_sets if mode in found]
    return mean(known) if len(known) == len(of_sets) else None


def costs(folder: Path) -> list[list[str]]:
    """What an atom and an answer take, a column a model: ratios, each of one run, for machines differ."""
    figures: list[dict[str, Any]] = []
    for _, name in MODELS.values():
        files = [file for part in ("gradients", "query") if (file := folder / f"{part}-{name}.json").is_file()]
        figures.append({key: found for file in files for key, found in json.loads(file.read_text())["figures"].items()})
    return [
        [what, *(form.format(of[name]["value"]) if name in of else "" for of in figures)] for what, name, form in COSTS
    ]


def draw(runs: dict[str, list[Runs]], path: Path) -> None:
    """The averages of the sets that all were asked, a group of bars a mode, a colour a model."""
    figure = new_figure(8, 3.2)
    panel = figure.subplots()
    sets = common(runs)
    found, width = list(answers(runs, sets)), 0.8 / len(runs)
    for number, model in enumerate(runs):
        bars = {mode: of_all for of, mode, _, of_all in found if of == model and of_all is not None}
        places = [MODES.index(mode) + width * (number - (len(runs) - 1) / 2) for mode in bars]
        panel.bar(places, list(bars.values()), width=0.95 * width, label=model)
    panel.set(ylabel=f"F1, {', '.join(SETS[name] for name in sets)}", xticks=range(len(MODES)))
    panel.set_xticklabels([mode.replace("/", "/\n") for mode in MODES], fontsize=8)
    panel.legend(ncols=len(runs), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=120)


def differences(runs: Runs, shown: list[str]) -> list[list[str]]:
    """Paired differences of F1 with their 95 % intervals, of each set that has both modes and of their average."""
    alike([run["settings"] for run in runs.values()], ("init", "space", "merge", "codec", "dtype", "sample"))
    rows = []
    for mode, minus in PAIRS:
        found = {
            name: difference(run, mode, minus)
            for name, run in runs.items()
            if {mode, minus} <= set(run["settings"]["modes"])
        }
        if found:
            each = [signed(found[name]) if name in found else "" for name in shown]
            rows.append([f"{mode} − {minus}", *each, signed(pooled([*found.values()]))])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    arguments = parser.parse_args()
    runs = {model: read(arguments.results, model) for model in MODELS}
    said = section(runs, arguments.results / "models" / "cost")
    renew(arguments.page, "<!-- benchmarks/models_page.py -->\n", said)
    draw(runs, arguments.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
