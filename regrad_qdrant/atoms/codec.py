"""Codecs: an atom's numbers to bytes and back.

An atom is coded as one flat vector, its tensors in the order of the space. `CODECS` is the registry; a codec is
one small class, or one line where a class has parameters.

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

import importlib.util
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import UnknownCodecError, WrongShapeError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64  # numbers that share a scale at 4 and 8 bits
ROTATED_BLOCK = 256  # below
STEPS_PER_OCTAVE = 16  # of a stored scale: within 2.2 %
ZERO = 255  # the scale of a block of zeros
ROTATION_SEED = 20260615
SPARE, ITERATIONS = 8, 3  # of the subspace iteration: dimensions beyond the rank, and rounds


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


class Float32(Codec):
    """The numbers as they are: the reference for the others."""

    name = "fp32"

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        return {"values": 4 * layout.numel}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        return {"values": _bytes_of(flat)}

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch

        return parts["values"].view(torch.float32)


class Float16(Codec):
    """Half precision; each atom is scaled by its largest number first, so that small gradients survive."""

    name = "fp16"

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        return {"values": 2 * layout.numel, "norm": 4}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        import torch

        norm = flat.abs().amax(dim=1, keepdim=True)
        norm = norm.masked_fill(norm == 0, 1.0)
        return {"values": _bytes_of((flat / norm).to(torch.float16)), "norm": _bytes_of(norm)}

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch

        return parts["values"].view(torch.float16).float() * parts["norm"].view(torch.float32)


class _Scaled(Codec):
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
        return {"scales": below.to(torch.uint8), "top": _bytes_of(top.to(torch.int16))}

    @staticmethod
    def _scales(parts: Mapping[str, Tensor]) -> Tensor:
        """(batch, blocks) float32."""
        import torch

        below = parts["scales"]
        scales = torch.exp2((parts["top"].contiguous().view(torch.int16) - below.to(torch.int16)) / STEPS_PER_OCTAVE)
        return scales.masked_fill(below == ZERO, 0.0)


class Levels(_Scaled):
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

        blocks = _blocks(flat, self.block)
        levels = torch.tensor(self.levels, device=flat.device)
        middles = (levels[1:] + levels[:-1]) / 2
        if self.rotated:
            blocks = _rotate(blocks)
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
        return _rotate_back(blocks) if self.rotated else blocks

    def _pack(self, digits: Tensor) -> Tensor:
        """(batch, blocks, block) to (batch, bytes); the first number of a byte is its lowest digit."""
        import torch
        from torch.nn.functional import pad

        digits = pad(digits, (0, self.block_bytes * self.per_byte - self.block)).unflatten(2, (-1, self.per_byte))
        base = torch.tensor([len(self.levels) ** i for i in range(self.per_byte)], device=digits.device)
        return (digits * base).sum(dim=3).flatten(1).to(torch.uint8)


class SparseSign(_Scaled):
    """The signs and places of the 16 largest of every 256 numbers, not rotated; the others are zero."""

    name = "sparse"
    block = ROTATED_BLOCK
    kept = 16

    def code_sizes(self, blocks: int) -> dict[str, int]:
        return {"places": blocks * self.kept, "signs": blocks * self.kept // 8}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        import torch

        blocks = _blocks(flat, self.block)
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


class NF4(Codec):
    """4-bit NormalFloat (QLoRA) in blocks of 64, by bitsandbytes (extra `bitsandbytes`)."""

    name = "nf4"

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        blocks = math.ceil(layout.numel / BLOCK)
        return {"codes": blocks * BLOCK // 2, "scales": 4 * blocks}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        codes, scales = [], []
        for row in _blocks(flat, BLOCK).flatten(1):
            packed, state = quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
            codes.append(packed.flatten())
            scales.append(state.absmax.float())
        return {"codes": torch.stack(codes), "scales": _bytes_of(torch.stack(scales))}

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        rows = []
        for codes, scales in zip(parts["codes"], parts["scales"].view(torch.float32), strict=True):
            shape = torch.Size([2 * len(codes)])
            state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
            rows.append(dequantize_4bit(codes.unsqueeze(1), state).flatten()[: layout.numel])
        return torch.stack(rows)


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
            start = torch.stack([_signs(rows, matrices.device).roll(i) for i in range(size)])
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


_SIGN = Levels("sign", (-1.0, 1.0), ROTATED_BLOCK, rotated=True)
_REGISTERED: tuple[Codec, ...] = (
    Float32(),
    Float16(),
    Levels("int8", range(-127, 128), BLOCK, rotated=False),
    Levels("int4", range(-7, 8), BLOCK, rotated=False),
    NF4(),
    # the levels of least squared error for normal numbers of variance 1 (Max, 1960), which rotation makes of them
    Levels("int2", (-1.510, -0.4528, 0.4528, 1.510), ROTATED_BLOCK, rotated=True),
    Levels("ternary", (-1.224, 0.0, 1.224), ROTATED_BLOCK, rotated=True),
    _SIGN,
    SparseSign(),
    *(LowRank(_SIGN, rank) for rank in (2, 4, 8, 16, 32)),
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _REGISTERED}
DEFAULT_CODEC = "sign"  # chosen by the curve: docs/atoms.md


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnknownCodecError: if there is none, or if it needs a package that is not installed.
    """
    if name not in CODECS:
        raise UnknownCodecError(f"codec {name!r} is not one of {', '.join(CODECS)}: a newer regrad-qdrant may know it")
    if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UnknownCodecError("codec 'nf4' needs bitsandbytes: pip install 'regrad-qdrant[bitsandbytes]'")
    return CODECS[name]


@cache
def _table(levels: tuple[float, ...], per_byte: int, device: Any) -> Tensor:
    """The numbers that each value of a byte stands for, (256, per byte); a byte that no code makes means zeros."""
    import torch

    values = torch.arange(256)
    digits = torch.stack([values // len(levels) ** i % len(levels) for i in range(per_byte)], dim=1)
    used = values < len(levels) ** per_byte
    rows: Tensor = torch.tensor(levels, dtype=torch.float32)[digits] * used.unsqueeze(1)
    return rows.to(device)


@cache
def _signs(size: int, device: Any) -> Tensor:
    """The rotation's random signs; Python's generator gives the same bits everywhere."""
    import torch

    bits = random.Random(ROTATION_SEED).getrandbits(size)
    return torch.tensor([1.0 if bits >> i & 1 else -1.0 for i in range(size)], device=device)


def _rotate(blocks: Tensor) -> Tensor:
    """Random signs, then the orthonormal Hadamard transform of the last dimension, a power of two."""
    return _hadamard(blocks * _signs(blocks.shape[-1], blocks.device))


def _rotate_back(blocks: Tensor) -> Tensor:
    return _hadamard(blocks) * _signs(blocks.shape[-1], blocks.device)


def _hadamard(blocks: Tensor) -> Tensor:
    import torch

    size = blocks.shape[-1]
    step = 1
    while step < size:
        first, second = blocks.unflatten(-1, (-1, 2, step)).unbind(-2)
        blocks = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return blocks / math.sqrt(size)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(batch, numel) to (batch, blocks, size), the last block filled up with zeros."""
    from torch.nn.functional import pad

    return pad(flat, (0, -flat.shape[1] % size)).view(len(flat), -1, size)


def _bytes_of(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)
