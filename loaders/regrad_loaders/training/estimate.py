"""What a recipe would take on a GPU, from the base model's configuration alone: arithmetic, before any weight is read.

Work is counted in products of matrices, forward and backward. Memory is what autograd keeps: for each token and layer
the numbers that a decoder layer saves, whose count was fitted to what PyTorch was seen to save of a Llama
(`tests/loaders/training/test_estimate.py` counts again); the second order keeps about three times as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import DataError
from regrad_qdrant.model.gradients import BATCH_TOKENS
from regrad_qdrant.model.space import LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regrad_loaders.training.recipe import Recipe

# Numbers that a layer saves of a token: so many × hidden, × intermediate, × heads × tokens of the text.
HIDDEN, INTERMEDIATE, HEADS = 6.4, 4.0, 2.0
SECOND = 3.1  # times as much of the backward pass' graph
WORK_OF_ATOMS = 6.0  # times the forward work of the adapted layers: backward, and backward through both
WORK_OF_ANSWERS = 1.0
QUESTION = 64  # tokens of a question with its answer, without passages
EFFICIENCY = 0.4  # of a GPU's peak that such steps reach; two cores with AVX512_BF16 reach about 0.5 of theirs
BYTES = 3  # of a number that autograd saves, in the mean: bf16, but float32 of norms and softmax (benchmarks/shapes.py)
OPTIMIZER = 16  # bytes of a learned number: itself, its gradient and Adam's two moments in float32
RESERVE = 0.85  # share of a GPU's memory that may be planned with


@dataclass(frozen=True)
class Gpu:
    memory: float  # bytes
    flops: float  # a second, dense bf16, at its peak


GPUS = {
    "h200": Gpu(141e9, 989e12),
    "h100": Gpu(80e9, 989e12),
    "a100": Gpu(80e9, 312e12),
    "l40s": Gpu(48e9, 362e12),
    "l4": Gpu(24e9, 121e12),
    "4090": Gpu(24e9, 165e12),
}


@dataclass(frozen=True)
class Estimate:
    """Of one step, and of the run."""

    parameters: int
    adapted: int  # layers
    atom: int  # numbers
    learned: int  # numbers
    weights: float  # bytes, and so the next ones
    optimizer: float
    of_passage: float  # the second order's graph of one passage
    of_answers: float  # the graph of one batch of questions
    passage_batch: int | None  # None: not even one fits
    peak: float
    flops: float  # of a step
    seconds: float  # of a step
    hours: float  # of all steps

    @property
    def fits(self) -> bool:
        return self.passage_batch is not None


def estimate(recipe: Recipe, config: Any, gpu: str, gpus: int = 1) -> Estimate:
    """What the recipe takes for the model of this configuration.

    Args:
        config: of the base model, as `transformers` has it.
        gpu: a key of `GPUS`.
        gpus: of them. So many of them as the recipe has `shards` hold the base model and an episode together; further
            ones draw episodes of their own, so that a step is of more episodes and takes as long.

    Raises:
        DataError: for a GPU that is not known, or a number of them that is no multiple of the shards.
        InitializationError: if the model has no layers like the recipe's targets.
    """
    from regrad_loaders.training.start import adapted_layers

    if gpu not in GPUS:
        raise DataError(f"GPU {gpu!r} is not one of {', '.join(GPUS)}")
    if gpus % recipe.shards:
        raise DataError(f"the recipe's {recipe.shards} shards need --gpus {recipe.shards}, or a multiple of it")
    text = config.get_text_config()
    model = skeleton(config)
    first, last = recipe.layers
    adapted = adapted_layers(model, recipe.targets, range(first, last + 1))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    of_embeddings = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    products = parameters - of_embeddings
    share = (text.num_hidden_layers - first) / text.num_hidden_layers
    tokens = min(recipe.passage_tokens, recipe.max_length)
    in_prompt = recipe.passages_in_prompt * max(recipe.top_k) * tokens
    questions = recipe.passages * recipe.questions_per_passage
    atom, learned = sizes(recipe, adapted)

    layers = text.num_hidden_layers - first
    of_passage = graph_of_passage(recipe, config)
    in_batch = max(BATCH_TOKENS, QUESTION + in_prompt)
    of_answers = layers * saved(text, QUESTION + in_prompt) * BYTES * in_batch + 4 * in_batch * text.vocab_size / 8
    weights = 2.0 * (parameters - in_layers(model) * (1 - 1 / recipe.shards))
    optimizer = learned * float(OPTIMIZER)
    free = GPUS[gpu].memory * RESERVE - weights - optimizer - of_answers
    fitting = math.floor(free / of_passage) if free > 0 else 0
    batch = min(recipe.passage_batch or recipe.passages, recipe.passages, fitting) if fitting >= 1 else None

    passes = 1 + WORK_OF_ATOMS * share if recipe.atoms else 0.0
    if batch is not None and batch < recipe.passages and recipe.atoms:
        passes += 1 + share  # the atoms once more
    flops = 2 * products * (
        recipe.passages * tokens * passes
        + questions * (QUESTION + in_prompt) * (1 + WORK_OF_ANSWERS * share)
    )  # fmt: skip
    flops *= recipe.accumulate
    seconds = flops / (GPUS[gpu].flops * EFFICIENCY * recipe.shards)
    of_part = of_passage * (batch or 1)
    in_parts = batch is not None and batch < recipe.passages  # then no part's graph is there while answers are learned
    peak = weights + optimizer + (max(of_part, of_answers) if in_parts else of_part + of_answers)
    return Estimate(
        parameters, len(adapted), atom, learned, weights, optimizer, of_passage, of_answers, batch, peak, flops,
        seconds, seconds * recipe.steps / 3600,
    )  # fmt: skip


def graph_of_passage(recipe: Recipe, config: Any, wide: bool = False) -> float:
    """Bytes that one passage's second order keeps.

    Args:
        wide: whether the model computes in float32, as on most processors.
    """
    text = config.get_text_config()
    tokens = min(recipe.passage_tokens, recipe.max_length)
    graph = (text.num_hidden_layers - recipe.layers[0]) * saved(text, tokens) * tokens * (4 if wide else BYTES)
    return float(graph * (SECOND if recipe.order == 2 and recipe.atoms else 1))


def fitting_passages(recipe: Recipe, config: Any, free: float, wide: bool = False) -> int | None:
    """How many passages' second order so many free bytes hold, at least one; None where all of an episode's do.

    Half of what is free is left for the answers and the optimizer.
    """
    fit = free / 2 / graph_of_passage(recipe, config, wide)
    return None if fit >= recipe.passages else max(1, math.floor(fit))


def in_layers(model: Any) -> int:
    """Parameters that processes can hold together."""
    from regrad_loaders.training.sharded import layers_to_share

    return sum(layer.weight.numel() for layer in layers_to_share(model).values())


def skeleton(config: Any) -> nn.Module:
    """The model of a configuration without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def saved(text: Any, tokens: float) -> float:
    """Numbers that autograd saves of one token in one decoder layer, in a text of so many tokens."""
    wide = getattr(text, "intermediate_size", 4 * text.hidden_size)
    return HIDDEN * text.hidden_size + INTERMEDIATE * wide + HEADS * text.num_attention_heads * tokens


def sizes(recipe: Recipe, layers: Mapping[str, nn.Linear]) -> tuple[int, int]:
    """Numbers of an atom, and numbers that training learns."""
    import torch

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    space, rank = SPACES[recipe.space], recipe.rank
    modules = {
        name: LoraModule(
            empty(rank, layer.in_features),
            empty(layer.out_features, rank),
            1.0,
            empty(layer.out_features, recipe.basis_rank) if space.uses_basis else None,
        )
        for name, layer in layers.items()
    }
    learned = sum(
        tensor.numel() for m in modules.values() for tensor in (m.lora_a, m.lora_b, m.basis) if tensor is not None
    )
    return space(modules).numel, learned
