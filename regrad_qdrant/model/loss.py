"""Next-token cross-entropy in chunks of tokens, differentiable twice in the hidden states.

Logits are the largest tensor of a language model (tokens × vocabulary). Here they exist for `CHUNK` tokens at a
time, in the forward pass, in the backward pass and in the one through the backward pass that meta-training needs:

    ∂ℓ/∂h   = Wᵀ(p − e_y)                     computed with ℓ, while the logits are at hand
    ∂²ℓ/∂h² v = Wᵀ(p ⊙ (Wv − pᵀWv))           recomputed, chunk by chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

CHUNK = 128


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, (tokens,) in float32 or better.

    Args:
        hidden: (tokens, d) last hidden states.
        weight: (vocabulary, d) of the frozen output embedding; no gradient flows to it.
        targets: (tokens,) token ids.
    """
    losses: Tensor = _CrossEntropy.apply(hidden, weight.detach(), targets)  # type: ignore[no-untyped-call] # torch
    return losses


def _precise(hidden: Tensor) -> torch.dtype:
    """The type to take exponentials in: float32 at least."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=_precise(hidden))
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        for part in _chunks(len(hidden)):
            logits = (hidden[part] @ weight.T).to(losses.dtype)
            index = targets[part, None]
            norm = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (norm - logits.gather(1, index)).squeeze(1)
            if gradient is not None:
                probabilities = logits.sub_(norm).exp_()
                probabilities.scatter_add_(1, index, -torch.ones_like(norm))
                gradient[part] = probabilities.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(hidden, weight, gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, gradient = ctx.saved_tensors
        per_token: Tensor = _CrossEntropyGradient.apply(hidden, weight, gradient)  # type: ignore[no-untyped-call] # torch
        return per_token * grads[0].unsqueeze(1).to(per_token.dtype), None, None


class _CrossEntropyGradient(Function):
    """∂ℓ/∂h, already known, as a function of h: its own derivative is the Hessian of ℓ."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight = ctx.saved_tensors
        result = torch.empty_like(hidden)
        for part in _chunks(len(hidden)):
            probabilities = (hidden[part] @ weight.T).to(_precise(hidden)).softmax(dim=1)
            moved = (grads[0][part].to(weight.dtype) @ weight.T).to(probabilities.dtype)
            moved.sub_((probabilities * moved).sum(dim=1, keepdim=True)).mul_(probabilities)
            result[part] = moved.to(weight.dtype) @ weight
        return result, None, None
