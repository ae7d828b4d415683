"""The space `lora`: the gradients of A and B as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.model.space import AtomSpace, LoraModule

if TYPE_CHECKING:
    from torch import Tensor


class LoraSpace(AtomSpace):
    """The whole gradient of A and B (paper, section 3): faithful and large."""

    kind = "lora"

    def tensors(self, name: str, module: LoraModule) -> dict[str, tuple[int, int]]:
        return {f"{name}.lora_A": (module.rank, module.d_in), f"{name}.lora_B": (module.d_out, module.rank)}

    def keep(self, name: str, x: Tensor) -> Tensor:
        return x

    def from_gradients(self, name: str, kept: Tensor, delta: Tensor) -> dict[str, Tensor]:
        module = self.modules[name]
        delta = delta * module.scaling
        a, b = module.lora_a.to(kept.dtype), module.lora_b.to(delta.dtype)
        return {
            f"{name}.lora_A": (delta @ b).mT @ kept,  # g_A = s·Σ_t (Bᵀδ_t) x_tᵀ
            f"{name}.lora_B": delta.mT @ (kept @ a.mT),  # g_B = s·Σ_t δ_t (A x_t)ᵀ
        }

    def to_update(self, atom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(atom)

    def row_update(self, name: str, x: Tensor, keys: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        module = self.modules[name]
        delta_a, delta_b = rows[f"{name}.lora_A"], rows[f"{name}.lora_B"]
        moved = x @ delta_a.mT  # ΔA x
        return module.scaling * ((keys + moved) @ delta_b.mT + moved @ module.lora_b.mT)
