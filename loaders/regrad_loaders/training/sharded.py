"""A base model that several processes hold together: each has some rows of every linear layer's weight.

Its weights are frozen, so all that a layer owes to training is its product with the input and with the gradient, and
the derivatives of both: each is the other. A process computes its rows' part and the parts are put together, which is
tensor parallelism (Shoeybi et al. 2019, column-parallel layers) that can be differentiated as often as one likes; the
hooks of FSDP gather weights for one backward pass, and second order has two. All processes of a group compute the same
episode, on the same tensors of the plug-in.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from regrad_qdrant.errors import DataError


class Share:
    """One process's place in a group of `size` that hold a model together: the processes of like number // size.

    Raises:
        DataError: where the processes can't be put into groups of that size.
    """

    def __init__(self, process: int, processes: int, size: int) -> None:
        if processes % size:
            raise DataError(
                f"{processes} processes can't hold base models {size} at a time: shards must divide their number "
                f"(accelerate launch --num_processes {size})"
            )
        groups = [distributed.new_group(list(range(at, at + size))) for at in range(0, processes, size)]
        self.size, self.number = size, process % size
        self.group = groups[process // size]

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor's dimension, whose length is a multiple of `size`."""
        return tensor.chunk(self.size, dim)[self.number]

    def together(self, part: Tensor) -> Tensor:
        """All processes' parts (…, rows), one behind the other (…, size × rows)."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, -1)

    def added(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts."""
        distributed.all_reduce(part, group=self.group)
        return part

    def smallest(self, value: int | None, device: torch.device) -> int | None:
        """The smallest of all processes' values; None, which sets no bound, where all have None."""
        found = torch.tensor(value or torch.iinfo(torch.int64).max, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self.group)
        smallest = int(found)
        return None if smallest == torch.iinfo(torch.int64).max else smallest


class _Product(torch.autograd.Function):
    """x Wᵀ from x (…, d_in), W's rows lying in several processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, share: Share) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.share = share
        return share.together(x @ rows.T.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return cast("Tensor", _Transposed.apply(gradient, rows, ctx.share)), None, None


class _Transposed(torch.autograd.Function):
    """y W from y (…, d_out), W's rows lying in several processes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, share: Share) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.share = share
        return share.added(share.of(y, -1) @ rows.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return cast("Tensor", _Product.apply(gradient, rows, ctx.share)), None, None


class ShardedLinear(nn.Linear):
    """A frozen linear layer of which a process holds some rows of W (d_out / size, d_in), and the whole bias."""

    def __init__(self, plain: nn.Linear, share: Share) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.share = share
        padded = nn.functional.pad(plain.weight.detach(), (0, 0, 0, -plain.out_features % share.size))
        self.weight = nn.Parameter(share.of(padded, 0).clone(), requires_grad=False)
        self.bias = plain.bias

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        result = cast("Tensor", _Product.apply(input.to(dtype), self.weight, self.share))[..., : self.out_features]
        return result if self.bias is None else result + self.bias.to(dtype)


def layers_to_share(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by their names, but for the language-model head, which is tied to the input embedding in many
    models and read in chunks."""
    head = cast("Any", model).get_output_embeddings()
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in found.items() if layer is not head}


def share_weights(model: nn.Module, share: Share) -> None:
    """Leave of these layers' weights this process's rows.

    Raises:
        DataError: for a model in 4 bits, whose rows can't be taken apart.
    """
    for name, layer in layers_to_share(model).items():
        if type(layer) is not nn.Linear:
            raise DataError(f"{name} is a {type(layer).__name__}: shards are of weights in 16 or 32 bits (--dtype)")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ShardedLinear(layer, share))
