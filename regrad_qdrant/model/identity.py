"""Which base model it is: what its weights and its architecture hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLED = 512  # numbers of each kind
EQUAL, CLOSE = 0.85, 0.98  # of a sample's numbers in the same model, and at most one step of bfloat16 away
PEFT_PREFIX = "base_model.model."  # of module names, in a model that carries an adapter


@dataclass(frozen=True)
class BaseModel:
    """Identity of the base model θ: where it is loaded from, and what its weights and architecture hash to.

    `sample` holds some of the weights that quantizers leave as they are, by which a model is known that is loaded in
    4 bits or in float16, where no hash of all weights is the same.
    """

    name: str
    digest: str
    sample: str = ""

    @classmethod
    def of(cls, model: nn.Module, name: str) -> BaseModel:
        sample = weights_sample(model)
        hashed = hashlib.sha256(sample.encode()).hexdigest()[:16]
        return cls(name, hashed if is_quantized(model) else weights_digest(model), sample)

    def fits(self, model: nn.Module) -> bool:
        """Whether these are the weights: all of them, or where they are rounded the sample of those that are not.

        Raises:
            UnsupportedModelError: if some of them are not there to be compared.
        """
        if away := next((name for name, parameter in _parameters(model) if parameter.device.type == "meta"), None):
            raise UnsupportedModelError(
                f"{away} is offloaded, so the weights can't be compared with those of {self.name}: load the model with "
                "a device_map that keeps all of them on a device, or give check_model=False where you know them"
            )
        coarse = is_coarse(model)
        if not coarse and weights_digest(model) == self.digest:
            return True
        of_coarse = self.digest == hashlib.sha256(self.sample.encode()).hexdigest()[:16]
        return bool(self.sample) and (coarse or of_coarse) and _alike(self.sample, weights_sample(model))


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are codes instead of numbers."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())


def is_coarse(model: nn.Module) -> bool:
    """Whether the weights are rounded in another way than to bfloat16 or finer."""
    import torch

    return is_quantized(model) or any(parameter.dtype == torch.float16 for parameter in model.parameters())


def weights_sample(model: nn.Module) -> str:
    """Hex digits of the architecture and, as bfloat16, of 512 weights of the input embedding and about as many of all
    vectors (norms and biases)."""
    import torch

    architecture = hashlib.sha256(json.dumps(_architecture(model), sort_keys=True, default=str).encode())
    embedding = model.get_input_embeddings()  # type: ignore[operator] # of every transformers model
    vectors = [p for _, p in sorted(_parameters(model)) if p.dim() == 1 and p.is_floating_point()]
    each = max(1, SAMPLED // max(1, len(vectors)))
    values = [_spread(embedding.weight, SAMPLED), *(_spread(vector, each) for vector in vectors)]
    bits = torch.cat(values).view(torch.int16).numpy().astype("<i2").tobytes()
    return f"{architecture.hexdigest()[:16]}:{bits.hex()}"


def _spread(tensor: Tensor, count: int) -> Tensor:
    """So many of a tensor's numbers, evenly spaced, as bfloat16."""
    import torch

    flat = tensor.detach().flatten()
    index = torch.linspace(0, len(flat) - 1, min(count, len(flat)), dtype=torch.float64).long()
    return flat[index.to(flat.device)].to(torch.bfloat16).cpu()


def _alike(ours: str, theirs: str) -> bool:
    """Whether two samples are of one architecture and their numbers equal, but for what is rounded twice."""
    (made, known), (other, found) = ours.split(":"), theirs.split(":")
    if made != other or len(known) != len(found):
        return False
    steps = [  # of bfloat16 between them; its bits as little-endian numbers
        abs(
            int.from_bytes(bytes.fromhex(known[i : i + 4]), "little")
            - int.from_bytes(bytes.fromhex(found[i : i + 4]), "little")
        )
        for i in range(0, len(known), 4)
    ]
    return steps.count(0) >= EQUAL * len(steps) and steps.count(0) + steps.count(1) >= CLOSE * len(steps)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own parameters by their names in the plain model."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", "").removeprefix(PEFT_PREFIX), parameter


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of the base model's weights and of the settings its forward pass depends on.

    Weights are hashed as bfloat16, so that a checkpoint loaded in bfloat16 and in float32 is the same model.
    LoRA tensors are left out: a model that carries an adapter hashes as the plain one.
    """
    import torch

    digest = hashlib.sha256(json.dumps(_architecture(model), sort_keys=True, default=str).encode())
    for name, parameter in sorted(_parameters(model)):
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
