"""Which base model it is: what its weights and its architecture hash to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PEFT_PREFIX = "base_model.model."  # of module names, in a model that carries an adapter


@dataclass(frozen=True)
class BaseModel:
    """Identity of the base model θ: where it is loaded from, and what its weights and architecture hash to."""

    name: str
    digest: str

    @classmethod
    def of(cls, model: nn.Module, name: str) -> BaseModel:
        return cls(name, weights_digest(model))


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of the base model's weights and of the settings its forward pass depends on.

    Weights are hashed as bfloat16, so that a checkpoint loaded in bfloat16 and in float32 is the same model.
    LoRA tensors are left out: a model that carries an adapter hashes as the plain one.
    """
    import torch

    digest = hashlib.sha256(json.dumps(_architecture(model), sort_keys=True, default=str).encode())
    for name, parameter in sorted((name.replace(".base_layer", ""), p) for name, p in model.named_parameters()):
        name = name.removeprefix(PEFT_PREFIX)
        if ".lora_" in name:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach()
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


_ARCHITECTURE = (
    "model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "layer_norm_eps",
    "rope_parameters", "sliding_window", "tie_word_embeddings",
)  # fmt: skip


def _architecture(model: nn.Module) -> dict[str, Any]:
    """Settings that change the forward pass though no weight's shape shows them."""
    config = getattr(model, "config", None)
    return {name: getattr(config, name, None) for name in _ARCHITECTURE}
