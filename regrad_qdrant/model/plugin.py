"""The plug-in in a live model: LoRA layers carrying φ₀, their tensors, and an own update for every row of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from regrad_qdrant.errors import AdapterError
from regrad_qdrant.model.space import AtomSpace, LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from regrad_qdrant.model.initialization import MetaInitialization

ADAPTER = "regrad"


def plug_in(model: nn.Module, initialization: MetaInitialization) -> PeftModel:
    """Give the model LoRA layers that carry φ₀, under the adapter name `regrad`.

    The base weights stay as they are; `PeftModel.unload()` takes the layers out again. The model must be the
    one that the initialization was trained for: call `initialization.check_model(model)` before.

    Raises:
        AdapterError: if the model already carries adapters, or lacks a layer that the initialization adapts.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise AdapterError("the model already carries adapters: merge_and_unload() them, or give the plain base model")
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in initialization.modules if name not in present]
    if missing:
        raise AdapterError(f"the model lacks {len(missing)} adapted layers, {missing[0]} among them")
    config = LoraConfig(
        r=initialization.rank,
        lora_alpha=initialization.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(initialization.modules),
    )
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER)  # type: ignore[arg-type] # any causal LM
    layers = lora_layers(peft_model)
    with torch.no_grad():
        for name, module in initialization.modules.items():
            lora_weight(layers[name], "lora_A").copy_(module.lora_a)
            lora_weight(layers[name], "lora_B").copy_(module.lora_b)
    peft_model.eval().requires_grad_(False)
    return peft_model


def base_of(peft_model: PeftModel) -> PreTrainedModel:
    """The base model below the plug-in; a model without one is its own."""
    return cast("PreTrainedModel", getattr(peft_model, "get_base_model", lambda: peft_model)())


def lora_layers(peft_model: PeftModel) -> dict[str, nn.Module]:
    """The LoRA layers by their names in the base model."""
    from peft.tuners.lora import LoraLayer

    modules: Iterator[tuple[str, nn.Module]] = base_of(peft_model).named_modules()
    return {name: module for name, module in modules if issubclass(type(module), LoraLayer)}


def lora_weight(layer: nn.Module, part: str) -> nn.Parameter:
    """The LoRA tensor `lora_A` or `lora_B` of a layer that `plug_in` made."""
    weight: nn.Parameter = getattr(layer, part)[ADAPTER].weight
    return weight


def lean_forward(layer: nn.Module) -> Callable[..., Tensor]:
    """What the layer's own `forward` computes with this adapter, W x + s·B A x, in three calls instead of peft's many.

    Token by token, the calls are most of what the plug-in costs. Wherever gradients are recorded, or peft would do
    something else, its own `forward` runs.
    """
    import torch
    from torch.nn.functional import linear

    whole, base = layer.forward, cast("nn.Module", layer.base_layer)
    lora_a, lora_b = lora_weight(layer, "lora_A"), lora_weight(layer, "lora_B")
    scaling: float = cast("Any", layer).scaling[ADAPTER]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and not kwargs and not layer.disable_adapters and not layer.merged
        if not plain or torch.is_grad_enabled() or x.dtype != lora_a.dtype:
            return cast("Tensor", whole(x, *args, **kwargs))
        result: Tensor = base(x)
        if result.dtype != x.dtype or not result.is_contiguous():
            return cast("Tensor", whole(x))
        keys = linear(x, lora_a).flatten(0, -2)
        result.view(-1, result.shape[-1]).addmm_(keys, lora_b.T, alpha=scaling)
        return result

    return forward


def live_space(peft_model: PeftModel, initialization: MetaInitialization) -> AtomSpace:
    """The initialization's atom space over the model's own LoRA tensors, on its device and in its dtype."""
    layers = lora_layers(peft_model)
    modules = {}
    for name, module in initialization.modules.items():  # an atom's tensors stand in this order
        lora_b = lora_weight(layers[name], "lora_B")
        modules[name] = LoraModule(
            lora_a=lora_weight(layers[name], "lora_A"),
            lora_b=lora_b,
            scaling=module.scaling,
            basis=None if module.basis is None else module.basis.to(device=lora_b.device, dtype=lora_b.dtype),
        )
    return SPACES[initialization.kind](modules)


@contextlib.contextmanager
def row_updates(peft_model: PeftModel, space: AtomSpace, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, row i of every batch runs with its own change of the plug-in parameters.

    Args:
        space: over the model's own tensors (`live_space`).
        rows: (batch, *shape) for each tensor of the space: the change of row i, with its sign and step size.
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add_row_update(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + space.row_update(name, inputs[0], rows)

        return add_row_update

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in lora_layers(peft_model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
