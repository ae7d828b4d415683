"""Narrowing: a meta-initialization with smaller atoms out of a larger one, before any further training.

Train wide, narrow, and train on: an atom's cores C (p, r) use few of their directions. The principal ones, over the
atoms of sample passages, span the narrower bases: with L (p, p') and R (r, r') the leading eigenvectors of Σ CCᵀ and
Σ CᵀC of a module,

    U' = U L     A' = Rᵀ A     B' = B R     so that C' = Lᵀ C R and B'A' = B R Rᵀ A

φ₀ changes only in what B had along the directions of A that are left out. The whole g_B of the space `values` is a
core in the basis of unit vectors, so it narrows to `core` in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.space import LoraModule

EXACT = 2048  # rows of a matrix up to which all its directions are computed


def narrow(
    initialization: MetaInitialization, atoms: Tensor, *, rank: int, basis_rank: int, modules: Collection[str]
) -> MetaInitialization:
    """The initialization in the core space with p' = `basis_rank` and r' = `rank`, on `modules` alone.

    Args:
        atoms: (documents, numel) of the initialization's own space; more documents than the ranks.

    Raises:
        InitializationError: for another space than core or values, larger ranks, modules that it does not adapt, or a
            step size for every number.
    """
    if initialization.kind not in ("core", "values"):
        raise InitializationError(f"only core and values can be narrowed, not {initialization.kind!r}")
    _check(initialization, modules)
    parts = initialization.space.unflatten(atoms)
    kept, sizes = {}, {}
    for name, module in initialization.modules.items():
        if name not in modules:
            continue
        tensor = f"{name}.{initialization.kind}"
        core = parts[tensor].double()
        if initialization.kind == "values":
            core = core.mT
        if basis_rank > core.shape[1] or rank > core.shape[2]:
            raise InitializationError(
                f"{name} has p × r = {tuple(core.shape[1:])}; narrowing to ({basis_rank}, {rank}) would widen it"
            )
        left, right = _leading(core, basis_rank), _leading(core.mT, rank)
        basis = left if module.basis is None else module.basis @ left
        kept[name] = LoraModule(right.T @ module.lora_a, module.lora_b @ right, module.scaling, basis)
        sizes[f"{name}.core"] = initialization.step_sizes[tensor]
    lora_alpha = next(iter(kept.values())).scaling * rank
    if abs(lora_alpha - round(lora_alpha)) > 1e-6 * lora_alpha:
        raise InitializationError(f"rank {rank} would need lora_alpha {lora_alpha}: choose another rank")
    return replace(
        initialization,
        kind="core",
        modules=kept,
        step_sizes=sizes,
        lora_alpha=round(lora_alpha),
        rank_stabilized=False,
        card={},
    )


def values_of(initialization: MetaInitialization, modules: Collection[str]) -> MetaInitialization:
    """An initialization in the space `lora` as one in the space `values`, on `modules` alone.

    What moved A is left out. The step sizes become one, each module's own going into its A (and φ₀'s B the other
    way), so that the numbers of an atom are comparable from module to module: a codec's rounding then falls where it
    changes the model least.

    Raises:
        InitializationError: for another space than lora, modules that it does not adapt, step sizes not above 0, or a
            step size for every number.
    """
    if initialization.kind != "lora":
        raise InitializationError(f"only the space lora holds values to begin with, not {initialization.kind!r}")
    _check(initialization, modules)
    sizes = {name: float(initialization.step_sizes[f"{name}.lora_B"]) for name in modules}
    if min(sizes.values()) <= 0:
        raise InitializationError(
            "step sizes that are not above 0 have no common one: this initialization can't be narrowed"
        )
    common = math.exp(sum(map(math.log, sizes.values())) / len(sizes))
    kept = {}
    for name, size in sizes.items():
        module, factor = initialization.modules[name], math.sqrt(size / common)
        kept[name] = replace(module, lora_a=factor * module.lora_a, lora_b=module.lora_b / factor)
    step_sizes: dict[str, float | Tensor] = {f"{name}.values": common for name in modules}
    return replace(initialization, kind="values", modules=kept, step_sizes=step_sizes, card={})


def _check(initialization: MetaInitialization, modules: Collection[str]) -> None:
    """Refuse what no smaller space can hold."""
    unknown = [name for name in modules if name not in initialization.modules]
    if unknown:
        raise InitializationError(f"the initialization does not adapt {unknown[0]}: it can't be narrowed to it")
    if initialization.has_full_step_sizes:
        raise InitializationError("with a step size for every number an initialization can't be narrowed")


def _leading(cores: Tensor, count: int) -> Tensor:
    """The eigenvectors of Σ CCᵀ over cores (documents, n, m) with the largest eigenvalues, (n, count) float32."""
    rows = cores.transpose(0, 1).flatten(1)
    if len(rows) > EXACT:  # a whole decomposition takes minutes, and the leading ones are found without it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, _, _ = torch.svd_lowrank(rows.float(), q=min(2 * count, *rows.shape), niter=4)
        return left[:, :count]
    vectors: Tensor = torch.linalg.eigh(rows @ rows.T).eigenvectors
    return vectors[:, -count:].flip(1).float()
