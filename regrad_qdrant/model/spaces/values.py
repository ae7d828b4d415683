"""The space `values`: the gradient of B alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.model.space import KeySpace, LoraModule

if TYPE_CHECKING:
    from torch import Tensor


class ValueSpace(KeySpace):
    """Every module's g_Bᵀ (r, d_out): the values that B writes for the keys A x.

    Values of one width stand together, so that they are one matrix: a document's gradients of all layers have few
    directions in common, which is what codecs of low rank code.
    """

    kind = "values"

    def __init__(self, modules: Mapping[str, LoraModule]) -> None:
        super().__init__(modules)
        self.shapes = dict(sorted(self.shapes.items(), key=lambda item: item[1][1]))  # one matrix a width

    def tensors(self, name: str, module: LoraModule) -> dict[str, tuple[int, int]]:
        return {f"{name}.values": (module.rank, module.d_out)}

    def from_gradients(self, name: str, kept: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return {f"{name}.values": kept.mT @ (delta * self.modules[name].scaling)}

    def to_update(self, atom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}.lora_B": atom[f"{name}.values"].mT for name in self.modules}

    def row_update(self, name: str, x: Tensor, keys: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        return (self.modules[name].scaling * keys) @ rows[f"{name}.values"]
