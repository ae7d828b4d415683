"""The section "Under load" of docs/serving.md, from the JSON of `regrad-qdrant bench serving`.

regrad-qdrant bench serving --json benchmarks/serving.json
python benchmarks/serving_page.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import renew, table


def section(result: dict[str, Any]) -> str:
    """The section's text: the command, a line for each number of clients, and what they are measured against."""
    details = result["details"]["serving"]
    library = details["answer_many"]["questions_per_second"]
    rows = []
    for load in details["loads"]:
        first, end = (f"{low:.2f}, {high:.2f}" for low, high in (load["first_token"], load["end"]))
        share = f"{load['requests_per_second'] / library:.2f}" if load["model"] == "regrad" else ""
        rows.append(
            [
                str(load["clients"]), load["model"], str(load["answered"]), str(load["lost"]), str(load["wrong"]),
                f"{load['requests_per_second']:.1f}", share, f"{load['tokens_per_second']:.0f}", first, end,
            ]
        )  # fmt: skip
    heads = ["clients", "model", "answered", "lost", "wrong", "a second", "÷ answer_many", "tokens a second"]
    heads += ["first token, s: p50, p99", "end, s: p50, p99"]
    figures = "; ".join(f"{name}: {figure['value']:.2f}" for name, figure in result["figures"].items())
    return (
        f"    {result['settings']['command']}\n\n"
        "Every client asks again as soon as it has its answer, over a socket of the same machine. Each question asks\n"
        "for a fact that only its own document has; an answer that is not the library's own counts as wrong.\n\n"
        f"{table(heads, rows)}\n{figures}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=Path("benchmarks/serving.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/serving.md"))
    arguments = parser.parse_args()
    said = section(json.loads(arguments.result.read_text(encoding="utf-8")))
    renew(arguments.page, "## Under load\n\n", said, "\n## ")


if __name__ == "__main__":
    main()
