"""The meta-gradient of one episode in parts, so that it takes the memory of one part:

    1  the atoms of a few passages at a time, without a graph
    2  the answers of a few questions at a time: ∂/∂φ₀ of their losses, and ∂/∂ of every question's update
    3  from there back through the merge and the codec: ∂/∂α, ∂/∂τ, and ∂/∂ of every atom
    4  a few passages at a time once more, with a graph: ∂/∂φ₀ through their atoms, the second order

It is the gradient of `MetaLearner.objective`'s mean, exactly, for one forward and backward pass of the passages more
than in one part. Where all passages are one part, steps 1 and 4 share a graph, and nothing is computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regrad_loaders.data.episodes import Episode
from regrad_loaders.training.meta_learner import MetaLearner

Updates = Mapping[str, Tensor]  # (questions, *shape) a tensor of the space


@dataclass(frozen=True)
class EpisodeLosses:
    """What one episode's questions had, and the seconds of its two parts."""

    losses: Tensor  # (questions,) mean negative log-likelihood of the answer
    exact: Tensor  # (questions,) whether greedy decoding would give it
    contrast: float | None  # mean loss beside it, where there was one
    seconds_of_atoms: float  # forward and inner backward, without the way back
    seconds_of_answers: float  # forward and backward


def backward(
    learner: MetaLearner,
    episode: Episode,
    *,
    codec: str = "fp32",
    order: Literal[0, 1, 2] = 2,
    atoms: bool = True,
    passage_batch: int | None = None,
    scale: float = 1.0,
    contrast: Callable[[Updates | None], Tensor] | None = None,
    contrast_weight: float = 0.0,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> EpisodeLosses:
    """Add the meta-gradient of one episode to the `grad` of the learner's parameters.

    Args:
        order: as `MetaLearner.episode_updates`.
        atoms: False is plain fine-tuning of φ₀ on the answers.
        passage_batch: passages of one part; None: all.
        scale: factor of the gradient.
        contrast: further losses of some questions, from their updates; `contrast_weight` times their mean is added.
        precision: the block in which the model computes.
    """
    started = time.perf_counter()
    rows: dict[str, Tensor] | None = None
    found: dict[str, Tensor] = {}
    parts = _parts(len(episode.passages), passage_batch) if atoms else []
    if atoms:
        with precision():
            found = _atoms(learner, episode, parts, order)
            rows = learner.merged(episode, found, codec)
    leaves = None if rows is None else {name: row.detach().requires_grad_(True) for name, row in rows.items()}
    between = time.perf_counter()
    losses, exact = [], []
    groups = learner.groups(episode.examples)
    for group in groups:
        with precision():
            own = None if leaves is None else {name: leaf[group] for name, leaf in leaves.items()}
            loss, right = learner.group_losses([episode.examples[i] for i in group], own)
        (loss.sum() * scale / len(episode.examples)).backward()
        losses.append(loss.detach())
        exact.append(right)
    against = None
    if contrast is not None:
        with precision():
            others = contrast(leaves)
        if len(others):
            (contrast_weight * scale * others.mean()).backward()
            against = float(others.detach().mean())
    answered = time.perf_counter()
    if rows is not None and leaves is not None:
        _back(list(rows.values()), [leaf.grad for leaf in leaves.values()])
        if len(parts) > 1 and order:
            for part in parts:
                with precision():
                    again = _of_part(learner, episode, part, order)
                of_part = [None if atom.grad is None else atom.grad[part] for atom in found.values()]
                _back([again[name] for name in found], of_part)
    where = torch.tensor([i for group in groups for i in group], device=learner.device).argsort()
    return EpisodeLosses(
        torch.cat(losses)[where], torch.cat(exact)[where], against, between - started, answered - between
    )


def _parts(count: int, size: int | None) -> list[list[int]]:
    """Passages by number, as many in each part."""
    numbers = list(range(count))
    return [numbers[at : at + (size or count)] for at in range(0, count, size or count)]


def _atoms(
    learner: MetaLearner, episode: Episode, parts: Sequence[Sequence[int]], order: Literal[0, 1, 2]
) -> dict[str, Tensor]:
    """All passages' atoms: of one part with its graph, of several parts without, to gather what comes back to them."""
    if len(parts) == 1:
        return _of_part(learner, episode, parts[0], order)
    found = learner.atoms_in_parts(episode.passages, len(parts[0]))
    return {name: atom.requires_grad_(True) for name, atom in found.items()}


def _of_part(learner: MetaLearner, episode: Episode, part: Sequence[int], order: Literal[0, 1, 2]) -> dict[str, Tensor]:
    return learner.atoms_to_order([episode.passages[i] for i in part], order)


def _back(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Go on backward from these gradients, where there is a way."""
    pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
