"""Checkpoints in the layout of the authors' released code, as meta-initializations of ours.

    peft_config.json       the LoRA's r and lora_alpha
    learner_config.json    base_model_name_or_path, alpha_mode (tie, same, fix or full), init_alpha
    meta_state_dict.pth    base_model.base_model.model.<module>.lora_A.default.weight, and its
                           alpha_base_model-model-<module, with dashes>-lora_A-default-weight, or one alpha

Their prompts differ from ours, and an initialization answers best to the prompts it was trained on: score it with
`regrad-qdrant eval` before relying on it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.codecs.registry import CODECS
from regrad_qdrant.atoms.merge import MergeRule
from regrad_qdrant.errors import InitializationError
from regrad_qdrant.model.gradients import BATCH_TOKENS
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization, scaling_of
from regrad_qdrant.model.space import LoraModule

MAX_LENGTH = 2048  # tokens of a document, in their code
_WEIGHT = re.compile(r"base_model\.base_model\.model\.(.+)\.(lora_[AB])\.default\.weight")


def read(folder: Path, base: BaseModel, *, max_length: int = MAX_LENGTH) -> MetaInitialization:
    """The checkpoint in `folder`, in the space `lora` with the merge rule `sum` (paper, section 3).

    The file is read without unpickling any object but tensors.

    Args:
        base: of the model that it was trained for: `BaseModel.of(model, name)`.
        max_length: tokens of a document at ingestion.

    Raises:
        InitializationError: if a file is missing or damaged, or holds what our format can't: DoRA, or ranks that
            differ.
    """
    peft, learner = _json(folder / "peft_config.json"), _json(folder / "learner_config.json")
    state = _state(folder / "meta_state_dict.pth")
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if found := _WEIGHT.fullmatch(key):
            weights.setdefault(found[1], {})[found[2]] = tensor.detach().float()
    broken = [name for name, parts in weights.items() if set(parts) != {"lora_A", "lora_B"}]
    if not weights or broken:
        lacking = f"{broken[0]} lacks one of A and B" if broken else "no LoRA tensors"
        raise InitializationError(f"{folder / 'meta_state_dict.pth'}: {lacking}; keys such as {sorted(state)[:3]}")
    rank, lora_alpha = int(peft.get("r", 8)), int(peft.get("lora_alpha", 8))
    if peft.get("use_dora") or peft.get("rank_pattern") or peft.get("alpha_pattern"):
        raise InitializationError(f"{folder / 'peft_config.json'}: only plain LoRA of one rank can be imported")
    rank_stabilized = bool(peft.get("use_rslora"))
    scaling = scaling_of(lora_alpha, rank, rank_stabilized)
    modules = {
        name: LoraModule(parts["lora_A"], parts["lora_B"], scaling)
        for name, parts in sorted(weights.items(), key=_order)
    }
    wrong = [name for name, module in modules.items() if module.rank != rank]
    if wrong:
        raise InitializationError(f"{wrong[0]} has rank {modules[wrong[0]].rank}, peft_config.json says {rank}")
    sizes = {
        f"{name}.{part}": _step_size(state, learner, f"base_model.model.{name}.{part}.default.weight")
        for name in modules
        for part in ("lora_A", "lora_B")
    }
    return MetaInitialization(
        base=base,
        kind="lora",
        lora_alpha=lora_alpha,
        modules=modules,
        step_sizes=sizes,
        max_length=max_length,
        merge=MergeRule("sum", 1.0),
        rank_stabilized=rank_stabilized,
        card={"imported_from": "a checkpoint of the authors' code", "peft_config": peft, "learner_config": learner},
    )


def dropout_of(folder: Path) -> float:
    """lora_dropout of the checkpoint's training."""
    return float(_json(folder / "peft_config.json").get("lora_dropout") or 0.0)


def codec_changes(
    initialization: MetaInitialization, model: nn.Module, tokenizer: Any, texts: Sequence[str]
) -> dict[str, float]:
    """How much each codec changes the updates of these texts, ‖α ⊙ (ĝ − g)‖ / ‖α ⊙ g‖ in the mean, the finest first.

    An initialization that no training has read through a codec may not stand what it leaves out.
    """
    adapter = Adapter(model, initialization, check_model=False)
    try:
        gradients = adapter.gradients(tokenizer)
        atoms = gradients.atoms_in_batches([gradients.encode(text) for text in texts], BATCH_TOKENS)
    finally:
        adapter.release()
    sizes, layout = initialization.flat_step_sizes(), initialization.space.layout
    changes = {}
    for name, codec in sorted(CODECS.items(), key=lambda item: -item[1].size(layout)):
        read = torch.stack([codec.decode(parts, layout) for parts in codec.encode(atoms, layout)])
        changes[name] = float((((read - atoms) * sizes).norm(dim=1) / (atoms * sizes).norm(dim=1)).mean())
    return changes


def base_model_of(folder: Path) -> str:
    """The base model that the checkpoint in `folder` names.

    Raises:
        InitializationError: if learner_config.json can't be read, or names none.
    """
    name = _json(folder / "learner_config.json").get("base_model_name_or_path")
    if not isinstance(name, str):
        raise InitializationError(f"{folder / 'learner_config.json'} names no base model: give --model")
    return name


def _step_size(state: Mapping[str, Tensor], learner: Mapping[str, Any], parameter: str) -> float | Tensor:
    """α of one tensor, or in the mode "full" of each of its numbers."""
    mode = learner.get("alpha_mode", "tie")
    if mode == "fix":
        return float(learner.get("init_alpha", 1e-2))
    key = "alpha" if mode == "same" else f"alpha_{parameter.replace('.', '-')}"
    if key not in state:
        raise InitializationError(f"meta_state_dict.pth lacks the step size {key!r} of alpha_mode {mode!r}")
    size = state[key].detach().float()
    return float(size) if size.numel() == 1 else size


def _order(item: tuple[str, Any]) -> list[Any]:
    """Layer 9 before layer 10."""
    return [int(part) if part.isdigit() else part for part in item[0].split(".")]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InitializationError(f"{path}: can't be read: {error}") from error


def _state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InitializationError(f"{path}: can't be read as tensors alone: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InitializationError(f"{path}: expected a dictionary of tensors")
    return state
