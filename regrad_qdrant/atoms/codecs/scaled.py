"""What the codecs with one scale a block share: the scales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.codec import AtomLayout, Codec, bytes_of

if TYPE_CHECKING:
    from torch import Tensor

STEPS_PER_OCTAVE = 16  # of a stored scale: within 2.2 %
ZERO = 255  # the scale of a block of zeros


class Scaled(Codec):
    """What the codecs with one scale a block share: the scales, as steps below the atom's largest one.

    A scale is stored in sixteenths of an octave: one byte a block, and the largest of the atom in two.
    """

    block: int

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        blocks = math.ceil(layout.numel / self.block)
        return self.code_sizes(blocks) | {"scales": blocks, "top": 2}

    @abstractmethod
    def code_sizes(self, blocks: int) -> dict[str, int]:
        """The bytes of each part beside the scales."""

    @staticmethod
    def _fitted(energy: Tensor, overlap: Tensor) -> Tensor:
        """The steps of the scales |g|²/⟨g, q⟩, from both (batch, blocks): 0/0 for a block of zeros."""
        return (STEPS_PER_OCTAVE * (energy / overlap).log2()).round().masked_fill(energy == 0, -math.inf)

    @staticmethod
    def _pack_scales(steps: Tensor) -> dict[str, Tensor]:
        """Steps (batch, blocks), 16·log₂(scale) and −inf for a block of zeros, as bytes."""
        import torch

        top = steps.amax(dim=1, keepdim=True).nan_to_num(neginf=0)
        below = (top - steps).clamp(max=ZERO - 1).masked_fill(steps.isneginf(), ZERO)
        return {"scales": below.to(torch.uint8), "top": bytes_of(top.to(torch.int16))}

    @staticmethod
    def _scales(parts: Mapping[str, Tensor]) -> Tensor:
        """(batch, blocks) float32."""
        import torch

        below = parts["scales"]
        scales = torch.exp2((parts["top"].contiguous().view(torch.int16) - below.to(torch.int16)) / STEPS_PER_OCTAVE)
        return scales.masked_fill(below == ZERO, 0.0)
