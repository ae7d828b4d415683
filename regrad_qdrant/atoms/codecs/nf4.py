"""nf4: 4-bit NormalFloat, by bitsandbytes (extra `bitsandbytes`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.atoms.codec import AtomLayout, Codec, blocks_of, bytes_of
from regrad_qdrant.atoms.codecs.levels import BLOCK

if TYPE_CHECKING:
    from torch import Tensor


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
        for row in blocks_of(flat, BLOCK).flatten(1):
            packed, state = quantize_4bit(row, blocksize=BLOCK, quant_type="nf4")
            codes.append(packed.flatten())
            scales.append(state.absmax.float())
        return {"codes": torch.stack(codes), "scales": bytes_of(torch.stack(scales))}

    def dequantize(self, parts: Mapping[str, Tensor], layout: AtomLayout) -> Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        rows = []
        for codes, scales in zip(parts["codes"], parts["scales"].view(torch.float32), strict=True):
            shape = torch.Size([2 * len(codes)])
            state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
            rows.append(dequantize_4bit(codes.unsqueeze(1), state).flatten()[: layout.numel])
        return torch.stack(rows)
