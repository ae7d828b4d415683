"""The mean of two meta-initializations, one of which was trained on from the other: it keeps more of what each knows
than either does of the other's (Wortsman et al. 2022, model soups and robust fine-tuning).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.space import LoraModule


def mean_of(first: MetaInitialization, second: MetaInitialization, share: float = 0.5) -> MetaInitialization:
    """φ₀ and U as the means of both; of α and τ, which training moves by factors, the geometric means.

    Args:
        share: of the second in the mean.

    Raises:
        InitializationError: if the two have other spaces, scales or shapes, step sizes of other signs, or a step size
            for every number.
    """
    if first.kind != second.kind or _shapes(first) != _shapes(second):
        raise InitializationError(
            "only initializations of one space, on the same layers in the same ranks, have a mean"
        )
    if first.has_full_step_sizes or second.has_full_step_sizes:
        raise InitializationError("with a step size for every number two initializations can't be averaged")
    if any(float(size) * float(second.step_sizes[name]) <= 0 for name, size in first.step_sizes.items()):
        raise InitializationError("step sizes of different signs have no mean: these two do not go the same way")
    modules = {name: _mean(module, second.modules[name], share) for name, module in first.modules.items()}
    step_sizes: dict[str, float | Tensor] = {
        name: _geometric(float(size), float(second.step_sizes[name]), share) for name, size in first.step_sizes.items()
    }
    temperature = _geometric(first.merge.temperature, second.merge.temperature, share)
    merge = replace(first.merge, temperature=temperature)
    return replace(first, modules=modules, step_sizes=step_sizes, merge=merge, card={})


def _mean(one: LoraModule, other: LoraModule, share: float) -> LoraModule:
    basis = None if one.basis is None or other.basis is None else torch.lerp(one.basis, other.basis, share)
    lora_a, lora_b = torch.lerp(one.lora_a, other.lora_a, share), torch.lerp(one.lora_b, other.lora_b, share)
    return replace(one, lora_a=lora_a, lora_b=lora_b, basis=basis)


def _geometric(one: float, other: float, share: float) -> float:
    size = math.exp((1 - share) * math.log(abs(one)) + share * math.log(abs(other)))
    return math.copysign(size, one)  # released checkpoints have negative step sizes


def _shapes(initialization: MetaInitialization) -> dict[str, tuple[float, ...]]:
    """Of each module its scale s, rank and widths, and the shapes of its atom's tensors."""
    ranks = {name: (m.scaling, m.rank, m.d_in, m.d_out) for name, m in initialization.modules.items()}
    return ranks | dict(initialization.space.shapes)
