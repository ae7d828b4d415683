"""Codecs: an atom's numbers to bytes and back.

An atom is coded as one flat vector, its tensors in the order of the space. A codec is one small class in a file of
`codecs`, or one line of its registry where a class has parameters:

    fp32, fp16                  the numbers as they are
    int8, int4                  blocks of 64, scaled by their largest number
    int2, ternary, sign         rotated blocks of 256: 2, 1.6 and 1 bit a number
    sparse                      the sign and place of the 16 largest of 256: 0.6 bits a number
    nf4                         4-bit NormalFloat, by bitsandbytes
    sign-rank2, 4, 8, 16, 32    the leading singular vectors of the atom's matrices, in the codec sign

Below four bits, what counts is the sum of the retrieved atoms. A seeded Hadamard rotation spreads each block's
energy evenly, so that a few levels fit all its numbers; the block's scale s comes from the least-squares fit of
the levels to the numbers, q ≈ g/s, so that ⟨s·q, g⟩ = |g|²: along the atom itself nothing is lost, and the rest
is noise that is independent from atom to atom and averages out (the unbiased scale of DRIVE, arXiv 2105.08339).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import WrongShapeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AtomLayout:
    """How a flat atom divides into matrices (rows, columns), one after the other, each row by row."""

    matrices: tuple[tuple[int, int], ...]

    @classmethod
    def flat(cls, numel: int) -> AtomLayout:
        """Of numbers without further structure."""
        return cls(((1, numel),))

    @property
    def numel(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)


class Codec(ABC):
    """Codes flat atoms. Parts are named byte strings whose sizes follow from the atom's layout alone."""

    name: str

    @abstractmethod
    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        """The size in bytes of each part of an atom of this layout."""

    def size(self, layout: AtomLayout) -> int:
        """The size in bytes of a coded atom, before it is compressed and packed."""
        return sum(self.sizes(layout).values())

    def straight_through(self, flat: Tensor, layout: AtomLayout) -> Tensor:
        """The atoms (batch, numel) as they come back; gradients pass straight through the rounding."""
        decoded = self.dequantize(self.quantize(flat.detach().float(), layout), layout).to(flat.dtype)
        return flat + (decoded - flat.detach())

    @abstractmethod
    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        """Code a batch: (batch, numel) float to one (batch, bytes) uint8 tensor a part."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        """Decode a batch: the parts that `quantize` made to (batch, numel) float32."""

    def weighted_sum(self, parts: Mapping[str, Tensor], weights: Tensor, layout: AtomLayout) -> Tensor:
        """Σ wᵢ·gᵢ of a batch, (numel,) float32; `weights` is (batch,) float32."""
        return weights @ self.dequantize(parts, layout)

    def encode(self, flat: Tensor, layout: AtomLayout) -> list[dict[str, bytes]]:
        """The parts of every atom of a batch (batch, numel).

        Raises:
            ValueError: if a number is not finite.
        """
        import torch

        if not bool(torch.isfinite(flat).all()):
            raise ValueError("an atom with numbers that are not finite can't be coded")
        parts = {name: part.cpu().numpy() for name, part in self.quantize(flat.detach().float(), layout).items()}
        return [{name: part[row].tobytes() for name, part in parts.items()} for row in range(len(flat))]

    def decode(self, parts: Mapping[str, bytes], layout: AtomLayout) -> Tensor:
        """One atom (numel,) float32.

        Raises:
            WrongShapeError: if a part is missing, unknown or of another size than the layout needs.
        """
        return self.dequantize(self._stacked([parts], layout), layout)[0]

    def decode_sum(
        self, atoms: Sequence[Mapping[str, bytes]], weights: Sequence[float], layout: AtomLayout, device: Any = None
    ) -> Tensor:
        """Σ wᵢ·gᵢ of the parts of several atoms, (numel,) float32 on `device`.

        Raises:
            WrongShapeError: as `decode`.
        """
        import torch

        parts = {name: part.to(device) for name, part in self._stacked(atoms, layout).items()}
        return self.weighted_sum(parts, torch.tensor(weights, dtype=torch.float32, device=device), layout)

    def _stacked(self, atoms: Sequence[Mapping[str, bytes]], layout: AtomLayout) -> dict[str, Tensor]:
        """The parts of several atoms, one (atoms, bytes) uint8 tensor a part."""
        import torch

        expected = self.sizes(layout)
        for parts in atoms:
            found = {name: len(part) for name, part in parts.items()}
            if found != expected:
                raise WrongShapeError(
                    f"{self.name}: parts of {found} bytes, expected {expected} for {layout.numel} numbers"
                )
        joined = {name: bytearray(b"".join(parts[name] for parts in atoms)) for name in expected}
        return {name: torch.frombuffer(data, dtype=torch.uint8).view(len(atoms), -1) for name, data in joined.items()}


def blocks_of(flat: Tensor, size: int) -> Tensor:
    """(batch, numel) to (batch, blocks, size), the last block filled up with zeros."""
    from torch.nn.functional import pad

    return pad(flat, (0, -flat.shape[1] % size)).view(len(flat), -1, size)


def bytes_of(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)
