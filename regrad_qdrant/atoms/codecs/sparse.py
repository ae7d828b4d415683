"""sparse: the signs and places of the largest numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.codec import AtomLayout, blocks_of
from regrad_qdrant.atoms.codecs.levels import ROTATED_BLOCK
from regrad_qdrant.atoms.codecs.scaled import Scaled

if TYPE_CHECKING:
    from torch import Tensor


class SparseSign(Scaled):
    """The signs and places of the 16 largest of every 256 numbers, not rotated; the others are zero."""

    name = "sparse"
    block = ROTATED_BLOCK
    kept = 16

    def code_sizes(self, blocks: int) -> dict[str, int]:
        return {"places": blocks * self.kept, "signs": blocks * self.kept // 8}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        import torch

        blocks = blocks_of(flat, self.block)
        places = blocks.abs().topk(self.kept, dim=2).indices.sort(dim=2).values
        largest = blocks.gather(2, places)
        energy = blocks.square().sum(dim=2)
        steps = self._fitted(energy, largest.abs().sum(dim=2))
        bits = (largest > 0).flatten(1).unflatten(1, (-1, 8)) << torch.arange(8, device=flat.device)
        signs = bits.sum(dim=2).to(torch.uint8)
        return {"places": places.flatten(1).to(torch.uint8), "signs": signs} | self._pack_scales(steps)

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch

        places, values = self._entries(parts)
        blocks = torch.zeros(*values.shape[:2], self.block, device=values.device)
        return blocks.scatter(2, places, values).flatten(1)[:, : layout.numel]

    def weighted_sum(self, parts: Mapping[str, Tensor], weights: Tensor, layout: AtomLayout) -> Tensor:
        import torch

        places, values = self._entries(parts)
        blocks = values.shape[1]
        starts = self.block * torch.arange(blocks, device=values.device).unsqueeze(1)
        total = torch.zeros(blocks * self.block, device=values.device)
        weighted = weights.view(-1, 1, 1) * values
        return total.index_add_(0, (places + starts).flatten(), weighted.flatten())[: layout.numel]

    def _entries(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The places within their blocks and the values of what is not zero, (batch, blocks, kept) each."""
        import torch

        scales = self._scales(parts)
        signs = (parts["signs"].unsqueeze(2) >> torch.arange(8, device=scales.device)) & 1
        values = (2.0 * signs.view(*scales.shape, self.kept) - 1) * scales.unsqueeze(2)
        return parts["places"].view(*scales.shape, self.kept).long(), values
