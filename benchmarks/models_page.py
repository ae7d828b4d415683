"""The tables of docs/models.md: the same questions by two models.

sh benchmarks/models.sh
python benchmarks/models_page.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from tables import renew, table

SETS = {
    "nq_open": "Natural Questions",
    "squad2_dev": "SQuAD",
    "hotpotqa": "HotpotQA",
    "squadshifts_wiki": "SQuAD's new Wikipedia",
    "phantomwiki": "phantomwiki",
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
    """Both tables."""
    sets = [name for name in SETS if (results / "models" / f"{name}.json").is_file()]
    models = {
        "SmolLM2-135M": [results / "default", results / "grounded", results],  # the first that has a mode
        "Qwen2.5-Coder-0.5B": [results / "models"],
    }
    rows = []
    for model, folders in models.items():
        by_set = {name: scores(folders, name) for name in sets}
        for mode in MODES:
            values = [by_set[name].get(mode) for name in sets]
            known = [value for value in values if value is not None]
            average = f"{mean(known):.1f}" if len(known) == len(sets) else ""
            rows.append([model, mode, *("" if value is None else f"{value:.1f}" for value in values), average])
    heads = ["model", "mode", *(SETS[name] for name in sets), "average"]
    return f"{table(heads, rows)}\n{table(['Qwen2.5-Coder-0.5B', *heads[2:-1]], differences(results, sets))}\n"


def differences(results: Path, sets: list[str]) -> list[list[str]]:
    """Paired differences of F1 with their 95 % intervals."""
    found: dict[tuple[str, str], list[str]] = {pair: [] for pair in PAIRS}
    for name in sets:
        result: dict[str, Any] = json.loads((results / "models" / f"{name}.json").read_text(encoding="utf-8"))
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


if __name__ == "__main__":
    main()
