"""The tables and the plot of docs/models.md: the same questions by two models.

sh benchmarks/models.sh
python benchmarks/models_page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from tables import alike, renew, table

from regrad_loaders.evaluation.plots import new_figure

SETS = {
    "nq_open": "Natural Questions",
    "squad2_dev": "SQuAD",
    "hotpotqa": "HotpotQA",
    "squadshifts_wiki": "SQuAD's new Wikipedia",
    "phantomwiki": "phantomwiki",
}
MODELS = {  # where their answers are, the first that has a mode; and the initialization
    "SmolLM2-135M": (("default", "grounded", "."), "smollm2-135m-instruct"),
    "Qwen2.5-Coder-0.5B": (("models",), "qwen2.5-coder-0.5b-instruct"),
}
MODES = ("direct", "rag", "random", "regrad", "random/grounded", "regrad/grounded")
PAIRS = (("regrad", "random"), ("regrad", "direct"), ("regrad", "rag"), ("regrad/grounded", "random/grounded"))


def scores(folders: list[Path], name: str) -> dict[str, float]:
    """F1 by mode, in hundredths, of one set: of the first file that has it."""
    found: dict[str, float] = {}
    for folder in folders:
        if (path := folder / f"{name}.json").is_file():
            for row in json.loads(path.read_text(encoding="utf-8"))["intervals"]:
                found.setdefault(row["mode"], 100 * row["f1"])
    return found


def section(results: Path) -> str:
    """The tables: answers, the second model's differences, and what an atom and an answer take."""
    sets = [name for name in SETS if (results / "models" / f"{name}.json").is_file()]
    rows = [
        [model, mode, *("" if value is None else f"{value:.1f}" for value in values), average]
        for model, mode, values, average in answers(results, sets)
    ]
    heads = [SETS[name] for name in sets]
    parts = [
        table(["model", "mode", *heads, "average"], rows),
        table(["Qwen2.5-Coder-0.5B", *heads], differences(results, sets)),
        table(["", *MODELS], costs(results / "models" / "cost")),
    ]
    return "\n".join(parts) + "\n"


def answers(results: Path, sets: list[str]) -> Iterator[tuple[str, str, list[float | None], str]]:
    """Of each model and mode the F1 of every set, where it is known, and their average, where all are."""
    for model, (folders, _) in MODELS.items():
        by_set = {name: scores([results / folder for folder in folders], name) for name in sets}
        for mode in MODES:
            values = [by_set[name].get(mode) for name in sets]
            known = [value for value in values if value is not None]
            yield model, mode, values, f"{mean(known):.1f}" if len(known) == len(sets) else ""


def costs(folder: Path) -> list[list[str]]:
    """What an atom and an answer take, a column a model."""
    columns = []
    for _, init in MODELS.values():
        made, asked = (json.loads((folder / f"{part}-{init}.json").read_text()) for part in ("gradients", "query"))
        ms, query = asked["details"]["query"]["ms"], asked["figures"]
        columns.append({
            "ms of computing an atom, in float32": f"{made['details']['gradients']['ms_a_document']['batched']:.0f}",
            "÷ the bare passes, float32": f"{made['figures']['gradients.time_over_float32_floor']['value']:.2f}",
            **{f"ms an answer of 20 tokens, `{mode}`": f"{ms[mode]:.0f}" for mode in ("direct", "rag", "regrad")},
            "our own share of an answer": f"{query['query.own_share']['value']:.1%}",
        })  # fmt: skip
    return [[what, *(column[what] for column in columns)] for what in columns[0]]


def draw(results: Path, path: Path) -> None:
    """The averages, a group of bars a mode, a colour a model."""
    sets = [name for name in SETS if (results / "models" / f"{name}.json").is_file()]
    figure = new_figure(7, 3.2)
    panel = figure.subplots()
    found = list(answers(results, sets))
    for number, model in enumerate(MODELS):
        bars = {mode: float(average) for of, mode, _, average in found if of == model and average}
        places = [MODES.index(mode) + 0.38 * (number - 0.5) for mode in bars]
        panel.bar(places, list(bars.values()), width=0.36, label=model)
    panel.set(ylabel=f"F1, average of {len(sets)} sets", xticks=range(len(MODES)))
    panel.set_xticklabels(MODES, fontsize=8)
    panel.legend()
    figure.savefig(path, dpi=120)


def differences(results: Path, sets: list[str]) -> list[list[str]]:
    """Paired differences of F1 with their 95 % intervals."""
    found: dict[tuple[str, str], list[str]] = {pair: [] for pair in PAIRS}
    runs: list[dict[str, Any]] = [
        json.loads((results / "models" / f"{name}.json").read_text(encoding="utf-8")) for name in sets
    ]
    alike([run["settings"] for run in runs], ("init", "space", "merge", "codec", "dtype", "sample", "modes"))
    for result in runs:
        by_pair = {(row["mode"], row["minus"]): row for row in result["differences"]}
        for pair in PAIRS:
            row = by_pair[pair]
            low, high = (100 * end for end in row["f1_interval"])
            found[pair].append(f"{100 * row['f1']:.1f} ({low:.1f} … {high:.1f})")
    return [[f"{mode} − {minus}", *values] for (mode, minus), values in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    arguments = parser.parse_args()
    renew(arguments.page, "<!-- benchmarks/models_page.py -->\n", section(arguments.results))
    draw(arguments.results, arguments.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
