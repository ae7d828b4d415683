"""The table of docs/scale.md: what a bank of so many documents takes. Arithmetic, of the assumptions that it states.

python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from tables import table

SECTION = re.compile(r"(<!-- benchmarks/scale\.py -->\n).*?(<!-- end -->)", re.DOTALL)
TOKENS = 200  # of a document
ATOM = 7_700  # bytes in the payload: 46,080 numbers of one bit
TEXT = 1_000  # bytes
VECTOR = 4_096  # bytes: 1,024 dimensions of float32, in RAM beside the index
GRAPH = 128 + 2 * 16 * 4  # bytes of HNSW links and the like for a vector
SHARD = 50e6  # points of a shard that are still handled with ease
PASSES = 3.0  # forward passes that a gradient costs: one forward, two backward, of which frozen weights save some
TFLOPS = 400e12  # that an H100 does in bf16 in practice, of 989 at its peak
DISK, RAM, GPU = 0.10, 4.0, 2.5  # dollars: a GB of disk a month, a GB of RAM a month, a GPU an hour


@dataclass(frozen=True)
class Model:
    """What a model's documents cost."""

    name: str
    parameters: float
    kv_bytes: int  # of keys and values for each token, in bf16

    @property
    def atoms_per_second(self) -> float:
        """On one GPU, at most: the products alone."""
        return TFLOPS / (2 * self.parameters * PASSES * TOKENS)


MODELS = (
    Model("1B", 1.24e9, 2 * 16 * 8 * 64 * 2),  # Llama-3.2-1B: 16 layers, 8 key-value heads of 64
    Model("8B", 8.03e9, 2 * 32 * 8 * 128 * 2),  # Llama-3.1-8B: 32 layers, 8 of 128
)


def rows() -> list[list[str]]:
    found = []
    for count in (1e6, 10e6, 100e6, 1e9):
        for model in MODELS:
            seconds = count / model.atoms_per_second
            atoms, embeddings = count * ATOM, count * (VECTOR + GRAPH)
            keys = count * TOKENS * model.kv_bytes
            found.append(
                [
                    f"{count / 1e6:,.0f} M", model.name, f"{seconds / 3600:,.1f}", f"{seconds / 3600 * GPU:,.0f} $",
                    _size(atoms), f"{atoms / 1e9 * DISK:,.0f} $", _size(count * TEXT), _size(embeddings),
                    f"{embeddings / 1e9 * RAM:,.0f} $", f"{max(1, round(count / SHARD))}", _size(keys),
                    f"{keys / 1e9 * DISK:,.0f} $",
                ]
            )  # fmt: skip
    return found


def _size(count: float) -> str:
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.0f} GB"


def section() -> str:
    heads = [
        "documents", "model", "GPU-hours", "once", "atoms", "a month", "texts", "vectors, RAM", "a month", "shards",
        "keys and values instead", "a month",
    ]  # fmt: skip
    return f"{table(heads, rows())}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    said = section()
    arguments.page.write_text(SECTION.sub(lambda found: found[1] + said + found[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
