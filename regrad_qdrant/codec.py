"""Codecs: an atom's numbers to bytes and back.

An atom is coded as one flat vector, its tensors in the order of the space. `int8`, `int4` and `nf4` work in
blocks of 64 numbers with one scale each. `CODECS` is the registry; a codec is one small class.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from regrad_qdrant.errors import UnknownCodecError, WrongShapeError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64


class Codec(ABC):
    """Quantizes flat atoms. Parts are named byte strings whose sizes follow from the atom's length alone."""

    name: ClassVar[str]

    @abstractmethod
    def sizes(self, numel: int) -> dict[str, int]:
        """The size in bytes of each part of an atom of `numel` numbers."""

    @abstractmethod
    def quantize(self, flat: Tensor) -> dict[str, Tensor]:
        """Code a batch: (batch, numel) float to one (batch, bytes) uint8 tensor a part."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        """Decode a batch: the parts that `quantize` made to (batch, numel) float32."""

    def encode(self, flat: Tensor) -> list[dict[str, bytes]]:
        """The parts of every atom of a batch (batch, numel).

        Raises:
            ValueError: if a number is not finite.
        """
        import torch

        if not bool(torch.isfinite(flat).all()):
            raise ValueError("an atom with numbers that are not finite can't be coded")
        parts = {name: part.cpu().numpy() for name, part in self.quantize(flat.detach().float()).items()}
        return [{name: part[row].tobytes() for name, part in parts.items()} for row in range(len(flat))]

    def decode(self, parts: Mapping[str, bytes], numel: int) -> Tensor:
        """One atom (numel,) float32.

        Raises:
            WrongShapeError: if a part is missing, unknown or of another size than `numel` numbers need.
        """
        import torch

        expected = self.sizes(numel)
        found = {name: len(part) for name, part in parts.items()}
        if found != expected:
            raise WrongShapeError(f"{self.name}: parts of {found} bytes, expected {expected} for {numel} numbers")
        tensors = {
            name: torch.frombuffer(bytearray(part), dtype=torch.uint8).unsqueeze(0) for name, part in parts.items()
        }
        return self.dequantize(tensors, numel)[0]


class Float32(Codec):
    """The numbers as they are: the reference for the others."""

    name = "fp32"

    def sizes(self, numel: int) -> dict[str, int]:
        return {"values": 4 * numel}

    def quantize(self, flat: Tensor) -> dict[str, Tensor]:
        return {"values": _bytes_of(flat)}

    def dequantize(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        import torch

        return parts["values"].view(torch.float32)


class Float16(Codec):
    """Half precision; each atom is scaled by its largest number first, so that small gradients survive."""

    name = "fp16"

    def sizes(self, numel: int) -> dict[str, int]:
        return {"values": 2 * numel, "norm": 4}

    def quantize(self, flat: Tensor) -> dict[str, Tensor]:
        import torch

        norm = _largest(flat)
        return {"values": _bytes_of((flat / norm).to(torch.float16)), "norm": _bytes_of(norm)}

    def dequantize(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        import torch

        return parts["values"].view(torch.float16).float() * parts["norm"].view(torch.float32)


class _Blockwise(Codec):
    """Symmetric integers of `bits` bits in blocks of 64, scaled so that the block's largest number fits."""

    bits: ClassVar[int]

    def sizes(self, numel: int) -> dict[str, int]:
        blocks = math.ceil(numel / BLOCK)
        return {"codes": blocks * BLOCK * self.bits // 8, "scales": 2 * blocks, "norm": 4}

    def quantize(self, flat: Tensor) -> dict[str, Tensor]:
        import torch

        top = 2 ** (self.bits - 1) - 1
        norm = _largest(flat)
        blocks = _blocks(flat / norm)  # (batch, blocks, 64)
        # fp16 rounds up to the next larger scale where it rounds at all, so the codes stay in range by the clamp
        scales = (blocks.abs().amax(dim=2) / top).to(torch.float16)
        codes = (blocks / scales.float().clamp(min=1e-12).unsqueeze(2)).round().clamp(-top, top).to(torch.int8)
        return {"codes": self._pack(codes.flatten(1)), "scales": _bytes_of(scales), "norm": _bytes_of(norm)}

    def dequantize(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        import torch

        scales = parts["scales"].view(torch.float16).float() * parts["norm"].view(torch.float32)
        codes = self._unpack(parts["codes"]).view(len(scales), -1, BLOCK)
        return (codes * scales.unsqueeze(2)).flatten(1)[:, :numel]

    @staticmethod
    @abstractmethod
    def _pack(codes: Tensor) -> Tensor: ...

    @staticmethod
    @abstractmethod
    def _unpack(packed: Tensor) -> Tensor: ...


class Int8(_Blockwise):
    name = "int8"
    bits = 8

    @staticmethod
    def _pack(codes: Tensor) -> Tensor:
        import torch

        return codes.view(torch.uint8)

    @staticmethod
    def _unpack(packed: Tensor) -> Tensor:
        import torch

        return packed.view(torch.int8)


class Int4(_Blockwise):
    """Two codes a byte, the first in the low half; −7 … 7 are stored as 1 … 15."""

    name = "int4"
    bits = 4

    @staticmethod
    def _pack(codes: Tensor) -> Tensor:
        import torch

        shifted = (codes + 8).to(torch.uint8)
        return shifted[:, 0::2] | (shifted[:, 1::2] << 4)

    @staticmethod
    def _unpack(packed: Tensor) -> Tensor:
        import torch

        return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).to(torch.int8) - 8


class NF4(Codec):
    """4-bit NormalFloat (QLoRA) in blocks of 64, by bitsandbytes (extra `bitsandbytes`)."""

    name = "nf4"

    def sizes(self, numel: int) -> dict[str, int]:
        blocks = math.ceil(numel / BLOCK)
        return {"codes": blocks * BLOCK // 2, "scales": 4 * blocks}

    def quantize(self, flat: Tensor) -> dict[str, Tensor]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        codes, scales = [], []
        for row in _blocks(flat).flatten(1):
            packed, state = quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
            codes.append(packed.flatten())
            scales.append(state.absmax.float())
        return {"codes": torch.stack(codes), "scales": _bytes_of(torch.stack(scales))}

    def dequantize(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        rows = []
        for codes, scales in zip(parts["codes"], parts["scales"].view(torch.float32), strict=True):
            shape = torch.Size([2 * len(codes)])
            state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
            rows.append(dequantize_4bit(codes.unsqueeze(1), state).flatten()[:numel])
        return torch.stack(rows)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(), Float16(), Int8(), Int4(), NF4())}
DEFAULT_CODEC = "int4"


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


def _largest(flat: Tensor) -> Tensor:
    """The largest magnitude of each atom, (batch, 1); 1 for an atom of zeros."""
    norm = flat.abs().amax(dim=1, keepdim=True)
    return norm.masked_fill(norm == 0, 1.0)


def _blocks(flat: Tensor) -> Tensor:
    """(batch, numel) to (batch, blocks, 64), the last block filled up with zeros."""
    from torch.nn.functional import pad

    return pad(flat, (0, -flat.shape[1] % BLOCK)).view(len(flat), -1, BLOCK)


def _bytes_of(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)
