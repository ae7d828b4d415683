"""The tables of docs/scale.md: what a bank of so many documents takes, and what training for a model takes. Arithmetic,
of the assumptions that they state.

python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from tables import renew, table

RECIPE = Path("loaders/recipes/core.yaml")
# Of each model what its own configuration says: hidden, intermediate, layers, heads, the head's width, whether the
# embeddings are tied, and the vocabulary.
SHAPES = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 64, True, 128_256),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 128, True, 128_256),
    "Llama-3.1-8B": (4096, 14_336, 32, 32, 128, False, 128_256),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 128, True, 151_936),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 128, True, 151_936),
    "Qwen3-4B": (2560, 9728, 36, 32, 128, True, 151_936),
    "Qwen3-8B": (4096, 12_288, 36, 32, 128, False, 151_936),
}
MACHINES = {  # a GPU, how many, and how many of them hold the base model together
    "one of 24 GB (l4)": ("l4", 1, 1),
    "four of 24 GB that share the model": ("l4", 4, 4),
    "one of 80 GB (h100)": ("h100", 1, 1),
}
TOKENS = 200  # of a document
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
    atom: int  # bytes in the payload: numbers of one bit, as `training` counts them

    @property
    def atoms_per_second(self) -> float:
        """On one GPU, at most: the products alone."""
        return TFLOPS / (2 * self.parameters * PASSES * TOKENS)


MODELS = (
    Model("1B", 1.24e9, 2 * 16 * 8 * 64 * 2, 4_373),  # Llama-3.2-1B: 16 layers, 8 key-value heads of 64
    Model("8B", 8.03e9, 2 * 32 * 8 * 128 * 2, 8_597),  # Llama-3.1-8B: 32 layers, 8 of 128
)


def rows() -> list[list[str]]:
    found = []
    for count in (1e6, 10e6, 100e6, 1e9):
        for model in MODELS:
            seconds = count / model.atoms_per_second
            atoms, embeddings = count * model.atom, count * (VECTOR + GRAPH)
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


def training() -> str:
    """A line a model: memory, passages at once and hours of the recipe on each machine."""
    from transformers import LlamaConfig, Qwen3Config

    from regrad_loaders.training.estimate import estimate
    from regrad_loaders.training.recipe import Recipe

    found = []
    for name, (hidden, wide, layers, heads, width, tied, vocabulary) in SHAPES.items():
        kind = Qwen3Config if name.startswith("Qwen") else LlamaConfig
        config = kind(
            hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=width, tie_word_embeddings=tied, vocab_size=vocabulary,
        )  # fmt: skip
        recipe = Recipe.load(RECIPE).fitted_to(config)
        cells = []
        for gpu, count, shards in MACHINES.values():
            of = estimate(replace(recipe, shards=shards), config, gpu, count)
            at_once = f"{of.passage_batch} of {recipe.passages}"
            cells.append(
                f"{of.peak / 1e9:.0f} GB, {at_once}, {max(1, round(60 * of.hours))} min" if of.fits else "does not fit"
            )
            size = f"{of.atom * 0.167 / 1e3:.0f} KB"  # one bit a number, in base64
        found.append([name, f"{recipe.layers[0]}–{recipe.layers[1]}", f"{of.atom:,}", size, *cells])
    return table(["model", "layers", "numbers of an atom", "an atom", *MACHINES], found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"))
    arguments = parser.parse_args()
    renew(arguments.page, "<!-- benchmarks/scale.py -->\n", section())
    renew(arguments.page, "<!-- training -->\n", training())


if __name__ == "__main__":
    main()
