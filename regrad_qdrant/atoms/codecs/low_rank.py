"""sign-rank2 to sign-rank32: the leading singular vectors of an atom's matrices, in another codec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.codec import AtomLayout, Codec
from regrad_qdrant.atoms.codecs.rotation import signs

if TYPE_CHECKING:
    from torch import Tensor

SPARE, ITERATIONS = 8, 3  # of the subspace iteration: dimensions beyond the rank, and rounds


class LowRank(Codec):
    """Each matrix of the atom as the product of two of `rank` rows, its leading singular vectors, in another codec.

    M ≈ Σ σᵢ uᵢvᵢᵀ takes rank × (rows + columns) numbers, √σᵢ uᵢ and √σᵢ vᵢ. A matrix that has no more numbers than
    that is coded whole.
    """

    def __init__(self, factors: Codec, rank: int) -> None:
        self.name = f"{factors.name}-rank{rank}"
        self.factors, self.rank = factors, rank

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        return self.factors.sizes(self._coded(layout))

    def truncated(self, flat: Tensor, layout: AtomLayout) -> Tensor:
        """The truncated product; its gradient is that along the matrices of this rank, singular vectors turning."""
        return self._product(self._split(flat, layout))

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        return self._quantized(self._split(flat, layout), layout)

    def straight_through(self, flat: Tensor, layout: AtomLayout) -> Tensor:
        """As the others; to what the truncation leaves out no gradient flows."""
        split = self._split(flat, layout)  # for both: the singular vectors are most of the work
        kept = self._product(split)
        decoded = self.dequantize(self._quantized(split, layout), layout).to(flat.dtype)
        return kept + (decoded - kept.detach())

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch

        matrices = [right if left is None else left.mT @ right for left, right in self._factors(parts, layout)]
        return torch.cat([matrix.flatten(1) for matrix in matrices], dim=1)

    def weighted_sum(self, parts: Mapping[str, Tensor], weights: Tensor, layout: AtomLayout) -> Tensor:
        """All atoms' factors side by side, one product a matrix: no atom is unpacked on its own."""
        import torch

        sums = []
        for left, right in self._factors(parts, layout):
            weighted = weights.view(-1, 1, 1) * right
            sums.append(weighted.sum(0) if left is None else left.flatten(0, 1).mT @ weighted.flatten(0, 1))
        return torch.cat([matrix.flatten() for matrix in sums])

    def _smaller(self, rows: int, columns: int) -> bool:
        """Whether the factors are smaller than the matrix."""
        return self.rank * (rows + columns) < rows * columns

    def _coded(self, layout: AtomLayout) -> AtomLayout:
        """The layout of what the other codec sees."""
        coded: list[tuple[int, int]] = []
        for rows, columns in layout.matrices:
            factored = self._smaller(rows, columns)
            coded += [(self.rank, rows), (self.rank, columns)] if factored else [(rows, columns)]
        return AtomLayout(tuple(coded))

    def _split(self, flat: Tensor, layout: AtomLayout) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """The matrices (batch, rows, columns), each with its exact factors unless it is coded whole."""
        parts = flat.split([rows * columns for rows, columns in layout.matrices], dim=1)
        matrices = [part.unflatten(1, shape) for part, shape in zip(parts, layout.matrices, strict=True)]
        return [(matrix, self._of(matrix.float()) if self._smaller(*matrix.shape[1:]) else None) for matrix in matrices]

    @staticmethod
    def _product(split: Sequence[tuple[Tensor, tuple[Tensor, Tensor] | None]]) -> Tensor:
        """The matrices along their factors, (batch, numel)."""
        import torch
        from torch.nn.functional import normalize

        parts = []
        for matrix, factors in split:
            if factors is not None:
                left, right = (normalize(factor, dim=2, eps=1e-30).to(matrix.dtype) for factor in factors)
                along = left.mT @ (left @ matrix)  # U Uᵀ M
                matrix = along + (matrix - along) @ right.mT @ right  # + (M − U Uᵀ M) V Vᵀ, which is zero
            parts.append(matrix.flatten(1))
        return torch.cat(parts, dim=1)

    def _quantized(
        self, split: Sequence[tuple[Tensor, tuple[Tensor, Tensor] | None]], layout: AtomLayout
    ) -> dict[str, Tensor]:
        import torch

        numbers = [part for matrix, factors in split for part in factors or (matrix.detach().float(),)]
        return self.factors.quantize(torch.cat([part.flatten(1) for part in numbers], dim=1), self._coded(layout))

    def _factors(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> list[tuple[Tensor | None, Tensor]]:
        """The decoded factors (batch, rank, rows) and (batch, rank, columns); None and the matrix where coded whole."""
        coded = self._coded(layout)
        numbers = self.factors.dequantize(parts, coded).split([math.prod(shape) for shape in coded.matrices], dim=1)
        tensors = iter([part.unflatten(1, shape) for part, shape in zip(numbers, coded.matrices, strict=True)])
        return [(next(tensors) if self._smaller(*shape) else None, next(tensors)) for shape in layout.matrices]

    def _of(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """√σᵢ uᵢ (batch, rank, rows) and √σᵢ vᵢ (batch, rank, columns), by subspace iteration from a fixed start."""
        import torch

        with torch.no_grad():
            if matrices.shape[1] > matrices.shape[2]:
                right, left = self._of(matrices.mT)
                return left, right
            scale = matrices.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1)
            matrices = matrices / scale
            rows = matrices.shape[1]
            size = min(self.rank + SPARE, rows)
            start = torch.stack([signs(rows, matrices.device).roll(i) for i in range(size)])
            right = (start @ matrices).mT  # (batch, columns, size)
            for _ in range(ITERATIONS):
                left = torch.linalg.qr(matrices @ right).Q  # (batch, rows, size)
                right = matrices.mT @ left
            right = right.mT
            energies, turned = torch.linalg.eigh(right @ right.mT)  # rising
            roots = energies[:, -self.rank :].flip(1).clamp(min=0).pow(0.25).unsqueeze(2)  # √σ
            turned = turned[:, :, -self.rank :].flip(2).mT
            left, right = turned @ left.mT, turned @ right
            return left * (roots * scale.sqrt()), right * (scale.sqrt() / roots.clamp(min=1e-6))
