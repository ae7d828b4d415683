"""What meta-training begins with: fresh tensors, or an initialization made before, fitted to the recipe."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.training.average import mean_of
from regrad_loaders.training.calibration import calibrate
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.mixture import prompt_of
from regrad_loaders.training.narrow import narrow, values_of
from regrad_loaders.training.recipe import Recipe
from regrad_qdrant.atoms.merge import MergeRule
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.space import LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

TEMPERATURE = 0.2  # τ that fresh tensors begin with
SAMPLE = 48  # passages of each source whose atoms say which directions narrowing keeps


def begin(
    recipe: Recipe,
    model: nn.Module,
    base: BaseModel,
    sources: Sequence[EpisodeSource],
    passage_batch: int | None = None,
) -> MetaInitialization:
    """What training begins with: fresh from the model's own singular vectors, or an initialization made before,
    narrowed where the recipe's space, ranks and layers hold less; of LoRA tensors of the same rank B A stays.

    Args:
        passage_batch: passages whose atoms are computed at once, to narrow by; None: an episode's.

    Raises:
        InitializationError: if that one has another shape than the recipe says.
        WrongModelError: if it belongs to another base model.
    """
    layers = range(recipe.layers[0], recipe.layers[1] + 1)
    if recipe.start is None:
        made = fresh(
            model,
            base,
            kind=recipe.space,
            targets=recipe.targets,
            layers=layers,
            rank=recipe.rank,
            basis_rank=recipe.basis_rank,
            lora_alpha=recipe.lora_alpha,
            step_size=recipe.step_size or 1.0,
            max_length=recipe.max_length,
            passages_in_prompt=recipe.passages_in_prompt > 0,
        )
        return replace(made, merge=MergeRule(recipe.merge, recipe.temperature or TEMPERATURE), prompt=prompt_of(recipe))
    start = MetaInitialization.load(recipe.start)
    if recipe.averaged_with is not None:
        start = mean_of(start, MetaInitialization.load(recipe.averaged_with), recipe.averaged_share)
    start.check_model(model)
    modules = list(adapted_layers(model, recipe.targets, layers))
    wanted = (recipe.rank, recipe.basis_rank, set(modules))
    if start.kind == "lora" and recipe.space in ("core", "values"):
        start = values_of(start, modules)
    if recipe.space == "core" and start.kind in ("core", "values") and _plan(start) != wanted:
        atoms = _sample_atoms(recipe, model, start, sources, passage_batch)
        start = narrow(start, atoms, rank=recipe.rank, basis_rank=recipe.basis_rank, modules=modules)
    found: dict[str, tuple[Any, Any]] = {
        "kind": (start.kind, recipe.space),
        "lora_alpha": (start.lora_alpha, recipe.lora_alpha),
        "max_length": (start.max_length, recipe.max_length),
        "rank": (start.rank, recipe.rank),
        "layers": (set(start.modules), set(modules)),
    }
    if SPACES[recipe.space].uses_basis:
        found["basis_rank"] = (_plan(start)[1], recipe.basis_rank)
    differing = [name for name, (there, here) in found.items() if there != here]
    if differing:
        raise InitializationError(f"{recipe.start} does not fit the recipe: {', '.join(differing)} differ")
    if recipe.learn == "step_sizes" and start.fingerprint != MetaInitialization.load(recipe.start).fingerprint:
        raise InitializationError(
            f"step sizes alone are learned in the space of {recipe.start}, whose atoms stay valid, and the recipe "
            "changes it (basis_rank, rank, layers, targets, averaged_with): take the recipe that it was made with"
        )
    merge = MergeRule(recipe.merge, recipe.temperature or start.merge.temperature)
    passages_in_prompt = recipe.passages_in_prompt > 0
    return replace(start, merge=merge, passages_in_prompt=passages_in_prompt, prompt=prompt_of(recipe))


def fresh(
    model: nn.Module,
    base: BaseModel,
    *,
    kind: str,
    targets: Sequence[str],
    layers: Sequence[int],
    rank: int,
    basis_rank: int,
    lora_alpha: int,
    step_size: float,
    max_length: int,
    passages_in_prompt: bool = False,
) -> MetaInitialization:
    """Untrained: A and U from the top singular vectors of each weight, B zero, so the model is unchanged.

    Args:
        model: the plain base model.
        targets: last parts of the adapted layers' names, such as `gate_proj`.
        layers: numbers of the adapted transformer layers.

    Raises:
        InitializationError: if the model has no such layers, or the rank is larger than they are.
    """
    import torch

    chosen = adapted_layers(model, targets, layers)
    modules = {}
    for name, linear in chosen.items():
        weight = plain_weight(linear)
        if max(rank, basis_rank) > min(weight.shape):
            raise InitializationError(f"rank {max(rank, basis_rank)} is larger than {name} is: {tuple(weight.shape)}")
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        modules[name] = LoraModule(
            lora_a=right[:rank].contiguous(),
            lora_b=torch.zeros(weight.shape[0], rank),
            scaling=lora_alpha / rank,
            basis=left[:, :basis_rank].contiguous() if SPACES[kind].uses_basis else None,
        )
    step_sizes: dict[str, float | Tensor] = dict.fromkeys(SPACES[kind](modules).shapes, step_size)
    return MetaInitialization(
        base, kind, lora_alpha, modules, step_sizes, max_length, passages_in_prompt=passages_in_prompt
    )


def plain_weight(linear: nn.Module) -> Tensor:
    """A linear layer's weight (d_out, d_in) as float32 on the processor, of a 4-bit layer as its codes say."""
    weight: Any = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return cast("Tensor", weight.detach().float().cpu())


def adapted_layers(model: nn.Module, targets: Sequence[str], layers: Sequence[int]) -> dict[str, nn.Linear]:
    """The linear layers whose name ends in one of `targets`, in the transformer layers `layers`.

    Raises:
        InitializationError: if the model lacks one of `targets`, or of `layers`; the error lists what it has.
    """
    from torch import nn

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {
        name: module
        for name, module in linears.items()
        if name.rsplit(".", 1)[-1] in targets
        and any(part.isdigit() and int(part) in layers for part in name.split("."))
    }
    numbers = {int(part) for name in linears for part in name.split(".") if part.isdigit()}
    if not chosen or not set(targets) <= {name.rsplit(".", 1)[-1] for name in chosen} or not set(layers) <= numbers:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise InitializationError(
            f"not every layer of targets {list(targets)} in layers {list(layers)} is there; the model has {kinds} in "
            f"layers {min(numbers, default=0)} to {max(numbers, default=0)}"
        )
    return chosen


def raw_initialization(
    model: nn.Module, like: MetaInitialization, passages: Sequence[Sequence[int]]
) -> MetaInitialization:
    """An initialization of the same layers and ranks without meta-training: fresh tensors, and the step size that
    `calibrate` finds on some passages (token ids). The control that shows what meta-training does.

    Raises:
        InitializationError: if no step size lowers the passages' loss.
    """
    made = fresh_like(model, like, like.kind)
    learner = MetaLearner(model, made, like.merge.rule)
    try:
        size, _ = calibrate(learner, passages)
    finally:
        learner.model[0].unload()
    return made.with_step_sizes(dict.fromkeys(made.step_sizes, size), like.merge)


def fresh_like(model: nn.Module, like: MetaInitialization, kind: str) -> MetaInitialization:
    """Fresh tensors in the layers and ranks of an initialization, in a space of this kind, at a step size of 1."""
    basis = next(iter(like.modules.values())).basis
    made = fresh(
        model,
        like.base,
        kind=kind,
        targets=sorted({name.rsplit(".", 1)[-1] for name in like.modules}),
        layers=like.layers,
        rank=like.rank,
        basis_rank=0 if basis is None else int(basis.shape[1]),
        lora_alpha=like.lora_alpha,
        step_size=1.0,
        max_length=like.max_length,
    )
    return replace(made, prompt=like.prompt)


def _sample_atoms(
    recipe: Recipe,
    model: nn.Module,
    start: MetaInitialization,
    sources: Sequence[EpisodeSource],
    passage_batch: int | None,
) -> Tensor:
    """Atoms of passages of every source in the space of `start`, each source's of mean length 1."""
    rng = random.Random(recipe.seed + 3)
    learner = MetaLearner(model, start, recipe.merge)
    atoms = torch.empty(len(sources), SAMPLE, learner.space.numel)
    for source, rows in zip(sources, atoms, strict=True):
        passages: list[list[int]] = []
        while len(passages) < SAMPLE:
            passages += source.episode(rng, recipe.passages, 1, recipe.top_k).passages
        size = passage_batch or recipe.passages
        for at in range(0, SAMPLE, size):
            found, _ = learner.atoms(passages[at : min(at + size, SAMPLE)], create_graph=False)
            rows[at : at + size] = learner.space.flatten(found)
        rows /= rows.norm(dim=1).mean()
    learner.model[0].unload()
    return atoms.flatten(0, 1)


def _plan(initialization: MetaInitialization) -> tuple[int, int, set[str]]:
    """Its r, its p (0 without a basis) and its modules."""
    basis = next(iter(initialization.modules.values())).basis
    return initialization.rank, 0 if basis is None else int(basis.shape[1]), set(initialization.modules)
