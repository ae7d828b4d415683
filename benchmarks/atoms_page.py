"""Write docs/atoms.md and its plot from saved runs of `regrad-qdrant bench atoms`.

    python benchmarks/atoms_page.py benchmarks/atoms.json benchmarks/atoms_small.json

The commands that made the runs stand in the page itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from tables import table

from regrad_loaders.bench.atoms import BASELINE, plot, read_cells
from regrad_loaders.data.scores import Interval

PAGE = """# What an atom costs, and what its answers are worth

{introduction}

## F1 and bytes

{curves}
![The curve](atoms.png)

## Times

{times}

## Larger models, computed

On the layers that the paper adapts, at its LoRA ranks. Not trained: the shapes and the codec decide. A record is the
atom with its fingerprint, hash and base64, as it stands in the payload.

{extrapolation}

## Choosing another

- **Codec**: `regrad-qdrant ingest --codec int4`, and `regrad-qdrant recode --codec sign` brings an existing bank to a
  coarser one without the model. A bank may hold several codecs at once.
- **Space**: `rank`, `basis_rank`, `layers`, `targets` and `space` of a recipe. Another space is another initialization,
  so the bank is ingested anew.
- **Small out of large**: a recipe whose `start` names an initialization of larger ranks begins with that one, narrowed
  to the principal directions of its atoms (`loaders/recipes/smollm2-135m-instruct-core.yaml` is one).
- **Step sizes alone**: `regrad-qdrant train --refit-step-sizes --recipe … --init …` fits α and τ to the recipe's
  codecs. The fingerprint stays, so every stored atom stays valid.

The codecs: `fp32`, `fp16`; `int8`, `int4` (blocks of 64, scaled by their largest number); `int2`, `ternary`, `sign` (2,
1.6 and 1 bit, after a seeded Hadamard rotation of blocks of 256, scales by least squares); `sparse` (the signs and
places of the 16 largest of 256 numbers, 0.6 bits); `nf4` with bitsandbytes; `sign-rank2` to `sign-rank32` (the leading
singular vectors of the atom's matrices, in signs).
"""


def command(settings: dict[str, Any]) -> str:
    """The command line of a run, from its recorded settings."""
    words = ["regrad-qdrant", "bench", "atoms"]
    words += [word for name in settings["sets"] for word in ("--set", name)]
    words += [word for name in settings["inits"] for word in ("--init", name)]
    words += ["--codecs", ",".join(settings["codecs"]), "--top-k", ",".join(map(str, settings["top_k"]))]
    words += ["--split", settings["split"], "--limit", str(settings["limit"])]
    return shlex.join(words)


def curves(run: dict[str, Any]) -> str:
    """One table an initialization and set: a row a codec."""
    parts = []
    ks = run["settings"]["top_k"]
    keys = dict.fromkeys((cell["init"], cell["task"]) for cell in run["curve"])
    for init, task in keys:
        here = [cell for cell in run["curve"] if (cell["init"], cell["task"]) == (init, task)]
        rows = []
        for codec in dict.fromkeys(cell["codec"] for cell in here):
            line = [cell for cell in here if cell["codec"] == codec]
            at_three = next((cell for cell in line if cell["top_k"] == 3), line[0])
            rows.append(
                [codec, f"{line[0]['bytes_per_atom']:,}", *(f"{100 * cell['f1']['mean']:.1f}" for cell in line)]
                + [Interval(**at_three["loss_to_fp32"]).in_percent(), f"{at_three['cosine']:.3f}"]
            )
        head = ["codec", "bytes", *(f"k = {k}" for k in ks), "loss to fp32, k = 3 (95 %)", "cosine of the sum"]
        parts.append(f"**{init}** ({here[0]['space']}, {here[0]['numel']:,} numbers), {task}:\n\n{table(head, rows)}")
    return "\n".join(parts)


def times(run: dict[str, Any]) -> str:
    head = ["initialization", "codec", "encode one", "of its gradient", "decode and sum three", "of one answer"]
    rows = [
        [
            time["init"], time["codec"], f"{time['encode']:.2f} ms", f"{100 * time['encode_share']:.2f} %",
            f"{time['decode_sum']:.2f} ms", f"{100 * time['decode_share']:.2f} %",
        ]
        for time in {(time["init"], time["codec"]): time for time in run["times"]}.values()
    ]  # fmt: skip
    return table(head, rows)


def extrapolation(run: dict[str, Any]) -> str:
    rows = []
    for row in run["extrapolation"]:
        shape = [row["model"], row["space"], f"{row['numbers']:,}", row["codec"]]
        rows.append([*shape, f"{row['bytes_per_atom']:,}", f"{row['gb_per_million']:.1f}"])
    return table(["model", "space", "numbers", "codec", "bytes an atom", "GB a million documents"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files; the first one's times and sizes are shown")
    parser.add_argument("--out", type=Path, default=Path("docs/atoms.md"))
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.runs]
    introduction = "Generated by `python benchmarks/atoms_page.py` from:\n\n" + "\n".join(
        f"    {command(run['settings'])}" for run in runs
    )
    introduction += (
        "\n\nF1 from 0 to 100, retrieved gradients alone, no text in the prompt. A loss is that of the same questions"
        " with fp32 atoms of the same space, with its 95 % interval; here over all sets and k.\n\n"
    )
    rows = [row for run in runs for row in run["losses"]]
    cells = [
        [row["init"], row["codec"], f"{row['bytes_per_atom']:,}", Interval(**row["loss_to_fp32"]).in_percent()]
        for row in rows
    ]
    introduction += table(["initialization", "codec", "bytes an atom in the payload", "loss to fp32, F1"], cells)
    smallest = {init: codec for run in runs for init, codec in run["smallest"].items()}
    introduction += "\nThe smallest that loses at most 1 F1 at the upper end of its interval: "
    found = {init: f"`{codec}`" if codec != BASELINE else "none of those run" for init, codec in smallest.items()}
    introduction += ", ".join(f"{init}: {codec}" for init, codec in found.items()) + "."
    page = PAGE.format(
        introduction=introduction,
        curves="\n".join(curves(run) for run in runs),
        times=times(runs[0]),
        extrapolation=extrapolation(runs[0]),
    )
    arguments.out.write_text(page, encoding="utf-8")
    plot([cell for run in runs for cell in read_cells(run)], 3, arguments.out.with_suffix(".png"))
    print(f"{arguments.out}: {len(page.splitlines())} lines")


if __name__ == "__main__":
    main()
