"""int8 and int4, int2, ternary and sign: each number as the nearest of a few levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from regrad_qdrant.atoms.codec import AtomLayout, blocks_of
from regrad_qdrant.atoms.codecs.rotation import rotate, rotate_back
from regrad_qdrant.atoms.codecs.scaled import STEPS_PER_OCTAVE, Scaled

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64  # numbers that share a scale at 4 and 8 bits
ROTATED_BLOCK = 256  # below


class Levels(Scaled):
    """Each number as the nearest of a few levels times the scale of its block; as many to a byte as fit.

    Args:
        name: in the registry and in records.
        levels: rising, and symmetric about zero.
        block: numbers that share a scale.
        rotated: rotate each block first and fit its scale by least squares; else the largest number fits.
    """

    def __init__(self, name: str, levels: Sequence[float], block: int, *, rotated: bool) -> None:
        self.name = name
        self.levels, self.block, self.rotated = tuple(levels), block, rotated
        self.per_byte = int(math.log(256, len(levels)))
        self.block_bytes = math.ceil(block / self.per_byte)

    def code_sizes(self, blocks: int) -> dict[str, int]:
        return {"codes": blocks * self.block_bytes}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        import torch

        blocks = blocks_of(flat, self.block)
        levels = torch.tensor(self.levels, device=flat.device)
        middles = (levels[1:] + levels[:-1]) / 2
        if self.rotated:
            blocks = rotate(blocks)
            energy = blocks.square().sum(dim=2)
            digits = torch.bucketize(blocks / (energy / self.block).sqrt().clamp(min=1e-38).unsqueeze(2), middles)
            steps = self._fitted(energy, (levels[digits] * blocks).sum(dim=2))
        else:
            largest = blocks.abs().amax(dim=2) / self.levels[-1]
            steps = (STEPS_PER_OCTAVE * largest.log2() - 1e-3).ceil()
            digits = torch.bucketize(
                blocks / torch.exp2(steps / STEPS_PER_OCTAVE).clamp(min=1e-38).unsqueeze(2), middles
            )
        return {"codes": self._pack(digits)} | self._pack_scales(steps)

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        scales = self._scales(parts)
        values = _table(self.levels, self.per_byte, scales.device)[parts["codes"].int()]  # (batch, bytes, per byte)
        blocks = values.view(*scales.shape, -1)[..., : self.block] * scales.unsqueeze(2)
        return self._unrotated(blocks).flatten(1)[:, : layout.numel]

    def weighted_sum(self, parts: Mapping[str, Tensor], weights: Tensor, layout: AtomLayout) -> Tensor:
        """Sums table rows, byte by byte, and rotates back once: no atom is unpacked on its own."""
        from torch.nn.functional import embedding_bag

        scales = weights.unsqueeze(1) * self._scales(parts)  # (batch, blocks)
        bags = parts["codes"].int().T.contiguous()  # (bytes, batch)
        of_bytes = scales.T.repeat_interleave(self.block_bytes, dim=0)
        table = _table(self.levels, self.per_byte, scales.device)
        values = embedding_bag(bags, table, mode="sum", per_sample_weights=of_bytes)
        return self._unrotated(values.view(scales.shape[1], -1)[:, : self.block]).flatten()[: layout.numel]

    def _unrotated(self, blocks: Tensor) -> Tensor:
        return rotate_back(blocks) if self.rotated else blocks

    def _pack(self, digits: Tensor) -> Tensor:
        """(batch, blocks, block) to (batch, bytes); the first number of a byte is its lowest digit."""
        import torch
        from torch.nn.functional import pad

        digits = pad(digits, (0, self.block_bytes * self.per_byte - self.block)).unflatten(2, (-1, self.per_byte))
        base = torch.tensor([len(self.levels) ** i for i in range(self.per_byte)], device=digits.device)
        return (digits * base).sum(dim=3).flatten(1).to(torch.uint8)


@cache
def _table(levels: tuple[float, ...], per_byte: int, device: Any) -> Tensor:
    """The numbers that each value of a byte stands for, (256, per byte); a byte that no code makes means zeros."""
    import torch

    values = torch.arange(256)
    digits = torch.stack([values // len(levels) ** i % len(levels) for i in range(per_byte)], dim=1)
    used = values < len(levels) ** per_byte
    rows: Tensor = torch.tensor(levels, dtype=torch.float32)[digits] * used.unsqueeze(1)
    return rows.to(device)
