"""Atom spaces: which tensors a knowledge atom holds, their shapes, and how they map back onto the LoRA tensors.

For a LoRA module y = W x + s·B A x with A (r, d_in) and B (d_out, r):

- `lora` holds g_A and g_B of every module, as the paper does;
- `core` holds C = Uᵀ g_B (p, r) with a meta-learned basis U (d_out, p), and moves B by U·ΔC;
- `tied` is `core` with one C for all modules of a transformer layer: the sum of theirs;
- `values` holds g_B alone, so that what is left of a document's gradient has few directions and codes well.

A space is one small class in a file of `spaces`, and a line of its registry.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from regrad_qdrant.atoms.codec import AtomLayout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoraModule:
    """The plug-in tensors of one adapted linear layer, wherever they live (a file, or a model in use)."""

    lora_a: Tensor  # (r, d_in)
    lora_b: Tensor  # (d_out, r)
    scaling: float  # s = lora_alpha / r
    basis: Tensor | None = None  # (d_out, p), the `core` space alone

    @property
    def rank(self) -> int:
        return int(self.lora_a.shape[0])

    @property
    def d_in(self) -> int:
        return int(self.lora_a.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.lora_b.shape[0])


class AtomSpace(ABC):
    """Maps between gradients, atoms and updates for a set of LoRA modules.

    `modules` are named as in the base model (`model.layers.15.mlp.gate_proj`); an atom's tensors are named
    `<module>.<part>`, or by what the modules that share one have in common. The space holds references to the
    modules' tensors, so it follows them in training.
    """

    kind: ClassVar[str]
    uses_basis: ClassVar[bool] = False  # whether a module needs U

    def __init__(self, modules: Mapping[str, LoraModule]) -> None:
        self.modules = dict(modules)
        self.shapes: dict[str, tuple[int, int]] = {
            tensor: shape
            for name, module in self.modules.items()
            for tensor, shape in self.tensors(name, module).items()
        }

    @property
    def numel(self) -> int:
        """How many numbers one atom holds."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def layout(self) -> AtomLayout:
        """The flat atom as matrices: neighbouring tensors of equal width are one, row below row."""
        matrices: list[tuple[int, int]] = []
        for rows, columns in self.shapes.values():
            if matrices and matrices[-1][1] == columns:
                rows += matrices.pop()[0]
            matrices.append((rows, columns))
        return AtomLayout(tuple(matrices))

    def flatten(self, atoms: Mapping[str, Tensor]) -> Tensor:
        """A batch of atoms, (batch, *shape) a tensor, as (batch, numel) in the order of `shapes`."""
        import torch

        return torch.cat([atoms[name].flatten(1) for name in self.shapes], dim=1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """(…, numel) as views (…, *shape)."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = flat.split(sizes, dim=-1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    @staticmethod
    def accumulate(atoms: dict[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Add one module's part of the atoms; a tensor that several modules share is their sum."""
        for name, part in parts.items():
            atoms[name] = atoms[name] + part if name in atoms else part

    @abstractmethod
    def tensors(self, name: str, module: LoraModule) -> dict[str, tuple[int, int]]:
        """The names and shapes of an atom's tensors that one module takes part in; modules may share one."""

    @abstractmethod
    def keep(self, name: str, x: Tensor) -> Tensor:
        """What of the module's input x (batch, tokens, d_in) must be kept until its output's gradient is known."""

    @abstractmethod
    def from_gradients(self, name: str, kept: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The atoms' part of one module, exact for every row of a batch.

        `delta` (batch, tokens, d_out) is the loss's gradient at the module's output and `kept` what `keep`
        returned for its input. Returns tensors (batch, *shape).
        """

    @abstractmethod
    def to_update(self, atom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The change of the LoRA tensors (`<module>.lora_A`, `<module>.lora_B`) that a change in this space means."""

    @abstractmethod
    def row_update(self, name: str, x: Tensor, keys: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """What a change of this space adds to the module's output, with an own change for every row.

        `x` is (batch, tokens, d_in), `keys` A x (batch, tokens, r), and `rows` holds (batch, *shape) for each of the
        space's tensors; returns (batch, tokens, d_out). Differentiable in everything, twice.
        """


class KeySpace(AtomSpace):
    """A space that moves B alone: of a module's input it needs the keys A x."""

    def keep(self, name: str, x: Tensor) -> Tensor:
        return x @ self.modules[name].lora_a.to(x.dtype).mT  # (batch, tokens, r)
