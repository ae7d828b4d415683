"""Write the scores of saved evaluations, and the limits, into the card of a meta-initialization.

    regrad-qdrant demo --json demo.json
    regrad-qdrant eval --corpus … --qa … --split dev --json squad2_dev.json
    python benchmarks/card.py regrad_qdrant/initializations/smollm2-135m-instruct demo.json squad2_dev.json \\
        --limit "English" --limit "short answers: a name, a number, a few words"

Each file stands under its own name with its settings and the F1 of every mode, and the limits instead of those
there before; nothing else of the folder changes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrad_qdrant import MetaInitialization


def scores(result: dict[str, Any], modes: list[str]) -> dict[str, Any]:
    """What of an evaluation goes into the card: of these modes, or of all where none is named."""
    rows = [row for row in result["results"] if row["type"] == "all" and row["mode"] in (modes or [row["mode"]])]
    kept = ("split", "limit", "sample", "skip_sample", "top_k", "init", "icl_init", "codec")
    return {
        "settings": {name: result["settings"][name] for name in kept if name in result["settings"]},
        "questions": rows[0]["n"],
        "f1": {row["mode"]: round(row["f1"], 4) for row in rows},
        "recall_at_k": result["recall_at_k"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the meta-initialization")
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of demo and eval")
    parser.add_argument("--modes", default="", help="comma-separated; by default all")
    parser.add_argument(
        "--limit", action="append", default=[], help="what it was not made for, in a sentence; repeat it"
    )
    arguments = parser.parse_args()
    modes = [mode for mode in arguments.modes.split(",") if mode]
    initialization = MetaInitialization.load(arguments.folder)
    found = {path.stem: scores(json.loads(path.read_text(encoding="utf-8")), modes) for path in arguments.results}
    card = initialization.card | {"scores": initialization.card.get("scores", {}) | found}
    if arguments.limit:
        card["limits"] = arguments.limit
    replace(initialization, card=card).save(arguments.folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
