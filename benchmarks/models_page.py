"""The tables and the plot of docs/models.md: the same questions by several models.

sh benchmarks/models.sh NAME INIT FT_DIRECT FT_RAG
python benchmarks/models_page.py
"""

from __future__ import annotations

import argparse
import json
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
Runs = dict[str, dict[str, Any]]  # of a model, by set
MODELS = {  # the folder of their answers
    "SmolLM2-135M": "smollm2-135m-instruct",
    "Gemma 3 270M": "gemma-3-270m",
    "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b-instruct",
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


def read(folder: Path) -> Runs:
    """A model's runs, all of the same questions.

    Raises:
        SystemExit: for a set that was not asked.
    """
    if missing := [name for name in SETS if not (folder / f"{name}.json").is_file()]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}: sh benchmarks/models.sh {folder.name} …")
    runs = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in SETS}
    alike([run["settings"] for run in runs.values()], ("init", "space", "merge", "codec", "dtype", "sample"))
    return runs


def scores(runs: Runs, mode: str) -> list[float]:
    """F1, in hundredths, set by set."""
    return [100 * row["f1"] for run in runs.values() for row in run["intervals"] if row["mode"] == mode]


def section(runs: dict[str, Runs], cost: Path) -> str:
    """The tables: answers, differences of each model, and what an atom and an answer take."""
    heads = [*SETS.values()]
    found = [(model, mode, scores(of_model, mode)) for model, of_model in runs.items() for mode in MODES]
    rows = [[model, mode, *(f"{value:.1f}" for value in [*of_sets, mean(of_sets)])] for model, mode, of_sets in found]
    parts = [table(["model", "mode", *heads, "average"], rows)]
    parts += [table([model, *heads, "average"], differences(of_model)) for model, of_model in runs.items()]
    parts.append(table(["", *MODELS], [*shares(runs), *costs(cost)]))
    return "\n".join(parts) + "\n"


def shares(runs: dict[str, Runs]) -> list[list[str]]:
    """What gradients reach of the average of a reader with the passages in its prompt, fine-tuned and as it is, a
    column a model: of all sets, and of the four without phantomwiki."""
    rows = []
    for what, count in (("all sets", len(SETS)), ("the first four", 4)):
        for mode, reader in (("regrad", "ft-rag"), ("regrad/grounded", "ft-rag"), ("regrad/grounded", "rag")):
            of = [mean(scores(own, mode)[:count]) / mean(scores(own, reader)[:count]) for own in runs.values()]
            rows.append([f"{mode} ÷ {reader}, {what}", *(f"{share:.2f}" for share in of)])
    return rows


def costs(folder: Path) -> list[list[str]]:
    """What an atom and an answer take, a column a model: ratios, each of one run, for machines differ."""
    figures: list[dict[str, Any]] = []
    for name in MODELS.values():
        files = [file for part in ("gradients", "query") if (file := folder / f"{part}-{name}.json").is_file()]
        figures.append({key: found for file in files for key, found in json.loads(file.read_text())["figures"].items()})
    return [
        [what, *(form.format(of[name]["value"]) if name in of else "" for of in figures)] for what, name, form in COSTS
    ]


def draw(runs: dict[str, Runs], path: Path) -> None:
    """The averages of all sets, a group of bars a mode, a colour a model."""
    figure = new_figure(8, 3.2)
    panel = figure.subplots()
    width = 0.8 / len(runs)
    for number, (model, of_model) in enumerate(runs.items()):
        places = [at + width * (number - (len(runs) - 1) / 2) for at in range(len(MODES))]
        panel.bar(places, [mean(scores(of_model, mode)) for mode in MODES], width=0.95 * width, label=model)
    panel.set(ylabel=f"F1, average of {len(SETS)} sets", xticks=range(len(MODES)))
    panel.set_xticklabels([mode.replace("/", "/\n") for mode in MODES], fontsize=8)
    panel.legend(ncols=len(runs), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(path, dpi=120)


def differences(runs: Runs) -> list[list[str]]:
    """Paired differences of F1 with their 95 % intervals, of each set, and of their average."""
    rows = []
    for mode, minus in PAIRS:
        found = [difference(run, mode, minus) for run in runs.values()]
        rows.append([f"{mode} − {minus}", *map(signed, [*found, pooled(found)])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    arguments = parser.parse_args()
    runs = {model: read(arguments.results / "models" / folder) for model, folder in MODELS.items()}
    said = section(runs, arguments.results / "models" / "cost")
    renew(arguments.page, "<!-- benchmarks/models_page.py -->\n", said)
    draw(runs, arguments.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
