"""Next-token cross-entropy in chunks of tokens, differentiable twice in the hidden states.

Logits are the largest tensor of a language model (tokens × vocabulary). Here they exist for `CHUNK` tokens at a
time, in the forward pass, in the backward pass and in the one through the backward pass that meta-training needs.
With a = W h + b, the logits z = f(a) of the head, p = softmax z and d = p − e_y:

    ∂ℓ/∂h   = Wᵀ(f' ⊙ d)                                          computed with ℓ, while the logits are at hand
    ∂²ℓ/∂h² v = Wᵀ(f' ⊙ p ⊙ (m − pᵀm) + f'' ⊙ d ⊙ Wv), m = f' ⊙ Wv   recomputed, chunk by chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from regrad_qdrant.model.head import Head

CHUNK = 128  # on a processor, whose caches it suits
CHUNK_OF_ACCELERATOR = 1024  # where a small product takes as long as starting it


def token_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, (tokens,) in float32 or better, and the likeliest token (tokens,).

    Args:
        hidden: (tokens, d) last hidden states.
        head: of the frozen model; no gradient flows to it.
        targets: (tokens,) token ids.
    """
    losses, best = _CrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call] # torch
    return losses, best


def _precise(hidden: Tensor) -> torch.dtype:
    """The type to take exponentials in: float32 at least."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(hidden: Tensor) -> Iterator[slice]:
    count, size = len(hidden), CHUNK if hidden.device.type == "cpu" else CHUNK_OF_ACCELERATOR
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _logits(head: Head, hidden: Tensor) -> Tensor:
    return head.finish(head.linear(hidden).to(_precise(hidden)))


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=_precise(hidden))
        best = torch.empty_like(targets)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(hidden):
            logits = _logits(head, hidden[part])
            index = targets[part, None]
            norm = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (norm - logits.gather(1, index)).squeeze(1)
            best[part] = logits.argmax(dim=1)
            if gradient is not None:
                slope = head.slope(logits)
                probabilities = logits.sub_(norm).exp_() if head.is_plain else (logits - norm).exp_()
                probabilities.scatter_add_(1, index, -torch.ones_like(norm))
                moved = probabilities if head.is_plain and head.scale == 1 else probabilities.mul_(slope)
                gradient[part] = moved.to(head.weight.dtype) @ head.weight
        ctx.mark_non_differentiable(best)
        ctx.head = head
        if gradient is not None:
            ctx.save_for_backward(hidden, targets, gradient)
        return losses, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        hidden, targets, gradient = ctx.saved_tensors
        per_token: Tensor = _CrossEntropyGradient.apply(hidden, ctx.head, targets, gradient)  # type: ignore[no-untyped-call] # torch
        return per_token * grads[0].unsqueeze(1).to(per_token.dtype), None, None


class _CrossEntropyGradient(Function):
    """∂ℓ/∂h, already known, as a function of h: its own derivative is the Hessian of ℓ."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, gradient: Tensor) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(hidden, targets)
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, targets = ctx.saved_tensors
        head: Head = ctx.head
        result = torch.empty_like(hidden)
        for part in _chunks(hidden):
            logits = _logits(head, hidden[part])
            moved = (grads[0][part].to(head.weight.dtype) @ head.weight.T).to(logits.dtype)
            probabilities = logits.softmax(dim=1)
            slope = head.slope(logits)
            bent = None
            if not head.is_plain:
                excess = probabilities.scatter_add(1, targets[part, None], -torch.ones_like(logits[:, :1]))
                bent = head.curvature(logits) * excess * moved
            moved = moved * slope
            moved.sub_((probabilities * moved).sum(dim=1, keepdim=True)).mul_(probabilities).mul_(slope)
            if bent is not None:
                moved.add_(bent)
            result[part] = moved.to(head.weight.dtype) @ head.weight
        return result, None, None, None
