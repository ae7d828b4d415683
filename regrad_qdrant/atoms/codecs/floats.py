"""fp32 and fp16: the numbers as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.codec import AtomLayout, Codec, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


class Float32(Codec):
    """The numbers as they are: the reference for the others."""

    name = "fp32"

    def sizes(self, layout: AtomLayout) -> dict[str, int]:
        return {"values": 4 * layout.numel}

    def quantize(self, flat: Tensor, layout: AtomLayout) -> dict[str, Tensor]:
        return {"values": bytes_of(flat)}

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
        return {"values": bytes_of((flat / norm).to(torch.float16)), "norm": bytes_of(norm)}

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch

        return parts["values"].view(torch.float16).float() * parts["norm"].view(torch.float32)
