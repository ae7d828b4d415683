"""The seeded Hadamard rotation that spreads a block's energy evenly over its numbers."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROTATION_SEED = 20260615


@cache
def signs(size: int, device: Any) -> Tensor:
    """The rotation's random signs; Python's generator gives the same bits everywhere."""
    import torch

    bits = random.Random(ROTATION_SEED).getrandbits(size)
    return torch.tensor([1.0 if bits >> i & 1 else -1.0 for i in range(size)], device=device)


def rotate(blocks: Tensor) -> Tensor:
    """Random signs, then the orthonormal Hadamard transform of the last dimension, a power of two."""
    return _hadamard(blocks * signs(blocks.shape[-1], blocks.device))


def rotate_back(blocks: Tensor) -> Tensor:
    return _hadamard(blocks) * signs(blocks.shape[-1], blocks.device)


def _hadamard(blocks: Tensor) -> Tensor:
    import torch

    size = blocks.shape[-1]
    step = 1
    while step < size:
        first, second = blocks.unflatten(-1, (-1, 2, step)).unbind(-2)
        blocks = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return blocks / math.sqrt(size)
