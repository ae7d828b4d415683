"""The spaces `core` and `tied`: what a basis U sees of the gradient of B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.space import KeySpace, LoraModule

if TYPE_CHECKING:
    from torch import Tensor


class CoreSpace(KeySpace):
    """C = Uᵀ g_B: p × r numbers a module, in the basis U that meta-training learns."""

    kind = "core"
    uses_basis = True

    def tensors(self, name: str, module: LoraModule) -> dict[str, tuple[int, int]]:
        return {self.core_of(name): (int(self._basis(module, module.lora_b).shape[1]), module.rank)}

    def core_of(self, name: str) -> str:
        """The atom's tensor that belongs to a module."""
        return f"{name}.core"

    def from_gradients(self, name: str, kept: Tensor, delta: Tensor) -> dict[str, Tensor]:
        module = self.modules[name]
        projected = delta @ (module.scaling * self._basis(module, delta))  # s·Uᵀδ: (batch, tokens, p)
        return {self.core_of(name): projected.mT @ kept}

    def to_update(self, atom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cores = {name: atom[self.core_of(name)] for name in self.modules}
        return {f"{name}.lora_B": self._basis(self.modules[name], core) @ core for name, core in cores.items()}

    def row_update(self, name: str, x: Tensor, keys: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        module = self.modules[name]
        return (module.scaling * (keys @ rows[self.core_of(name)].mT)) @ self._basis(module, x).mT

    @staticmethod
    def _basis(module: LoraModule, like: Tensor) -> Tensor:
        if module.basis is None:
            raise InitializationError("the core space needs a basis U for every module; this initialization has none")
        return module.basis.to(like)  # the model may have moved since


class TiedSpace(CoreSpace):
    """One core a transformer layer: its modules share C, so the atom holds the sum of their gradients by it."""

    kind = "tied"

    def core_of(self, name: str) -> str:
        layer = re.match(r".*\.\d+(?=\.)", name)
        return f"{layer[0] if layer else name}.core"
