"""The plug-in in a live model: LoRA layers carrying φ₀, their tensors, and an own update for every row of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from regrad_qdrant.errors import AdapterError, UnsupportedModelError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.head import head_of
from regrad_qdrant.model.space import AtomSpace, LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from regrad_qdrant.model.initialization import MetaInitialization

ADAPTER = "regrad"


def plug_in(model: nn.Module, initialization: MetaInitialization) -> PeftModel:
    """Give the model LoRA layers that carry φ₀ in float32, under the adapter name `regrad`.

    The base weights stay as they are; `PeftModel.unload()` takes the layers out again. The model must be the
    one that the initialization was trained for: call `initialization.check_model(model)` before.

    Raises, and the model is as it was:
        AdapterError: if the model already carries adapters, or lacks a layer that the initialization adapts.
        UnsupportedModelError: if its losses can't be computed here, or a layer meets other tokens than a document's.
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
    _keep_differentiable(model)
    check_layers(cast("PreTrainedModel", model), list(initialization.modules))
    config = LoraConfig(
        r=initialization.rank,
        lora_alpha=initialization.lora_alpha,
        use_rslora=initialization.rank_stabilized,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(initialization.modules),
    )
    plain = {name: model.get_submodule(name) for name in initialization.modules}
    model.__dict__.pop("peft_config", None)  # of another plug-in, whose layers are out of the model now
    try:
        peft_model = get_peft_model(model, config, adapter_name=ADAPTER)  # type: ignore[arg-type] # any causal LM
        with torch.no_grad():
            for name, layer in lora_layers(peft_model).items():
                module = initialization.modules[name]
                for part, tensor in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
                    parameter = lora_weight(layer, part)
                    parameter.data = tensor.to(
                        device=parameter.device, dtype=torch.promote_types(tensor.dtype, torch.float32), copy=True
                    )
                layer.forward = lean_forward(layer)
    except BaseException:  # memory that is short, layers that peft can't adapt
        for name, layer in plain.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        raise
    peft_model.eval().requires_grad_(False)
    return peft_model


def _keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers on a processor with AVX512_BF16 from a kernel of bitsandbytes' that is for inference alone:
    gradients would stop at it."""
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # of Linear4bit
            layer.state_dict()  # brings weights that were packed for it back


def check_layers(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Run a plain base model on two rows of a few tokens, and refuse it where a document's atom would be wrong.

    Raises:
        UnsupportedModelError: if its head is none that `head_of` knows, or if a layer of these names is offloaded, or
            sees other inputs than all tokens of every row, once.
    """
    import torch

    device = input_device(model)
    for name in names if device.type != "meta" else ():
        if cast("Tensor", model.get_submodule(name).weight).device.type == "meta":  # φ₀ has to be where it computes
            raise UnsupportedModelError(
                f"layer {name} is offloaded: load the model with a device_map that keeps the adapted layers on a device"
            )
    head_of(model)
    if device.type == "meta":
        return
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: seen[name].append(tuple(inputs[0].shape[:-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    rows, tokens = 2, 5
    vocabulary = len(cast("Any", model.get_input_embeddings()).weight)
    ids = torch.arange(rows * tokens, device=device).view(rows, tokens) % vocabulary
    try:
        with torch.no_grad():
            cast("Any", model).get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name, shapes in seen.items():
        if shapes not in ([(rows, tokens)], [(rows * tokens,)]):
            raise UnsupportedModelError(
                f"layer {name} of {type(model).__name__} sees inputs {shapes or 'never'} of {rows} rows of {tokens} "
                "tokens, where every token was expected once: experts that tokens are routed to, and shared layers, "
                "can't be adapted; choose others (targets)"
            )


class Seats:
    """The places of the LoRA layers in the base model, to take them out and put them in again.

    Out of it, the model is the plain one: its modules, its state and what it computes.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        base = base_of(peft_model)
        self._seats = []
        for name, layer in lora_layers(peft_model).items():
            parent, _, child = name.rpartition(".")
            self._seats.append((base.get_submodule(parent), child, layer, cast("nn.Module", layer.base_layer)))

        self.are_out = False

    def put_in(self) -> None:
        """Also brings the layers to where the base model has moved meanwhile."""
        for parent, child, layer, plain in self._seats:
            device = cast("Tensor", plain.weight).device
            if lora_weight(layer, "lora_A").device != device:
                for part in ("lora_A", "lora_B"):
                    getattr(layer, part).to(device)
            setattr(parent, child, layer)
        self.are_out = False

    def take_out(self) -> None:
        for parent, child, _, plain in self._seats:
            setattr(parent, child, plain)
        self.are_out = True


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


def lean_forward(layer: nn.Module, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> Callable[..., Tensor]:
    """What the layer computes, W x + s·B A x, in three calls instead of peft's many; in any type of W.

    Token by token, the calls are most of what the plug-in costs. A and B stay in float32, and what they add is rounded
    to the model's type once, together with `change`.

    Args:
        change: what a further change of the plug-in adds to the output, from x and A x in A's type.
    """
    import torch
    from torch.nn.functional import linear

    base = cast("nn.Module", layer.base_layer)
    down, up = (cast("Any", getattr(layer, part))[ADAPTER] for part in ("lora_A", "lora_B"))
    scaling: float = cast("Any", layer).scaling[ADAPTER]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base(x, *args, **kwargs)
        lora_a, lora_b = down.weight, up.weight
        x = x.to(lora_a.dtype)
        keys = linear(x, lora_a)
        is_plain = result.dtype == keys.dtype == lora_b.dtype  # not inside autocast
        if is_plain and result.is_contiguous() and not torch.is_grad_enabled():
            result.view(-1, result.shape[-1]).addmm_(keys.flatten(0, -2), lora_b.T, alpha=scaling)
            return result if change is None else result.add_(change(x, keys))
        added = scaling * linear(keys, lora_b)
        if change is not None:
            added = added + change(x, keys)
        return (result + added).to(result.dtype)

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
def row_updates(
    peft_model: PeftModel, space: AtomSpace, rows: Mapping[str, Tensor], bare: Sequence[bool] | None = None
) -> Iterator[None]:
    """Inside the block, row i of every batch runs with its own change of the plug-in parameters.

    Args:
        space: over the model's own tensors (`live_space`).
        rows: (batch, *shape) for each tensor of the space: the change of row i, with its sign and step size.
        bare: of each row, whether it runs as the base model, without the plug-in.
    """
    layers = lora_layers(peft_model)
    count = len(next(iter(rows.values())))
    try:
        for name, layer in layers.items():
            own = {
                part: rows[part].to(lora_weight(layer, "lora_A").device)
                for part in space.tensors(name, space.modules[name])
            }
            layer.forward = lean_forward(layer, _change_of(space, name, own, count))
            if bare is not None and any(bare):
                layer.forward = _mixed(cast("nn.Module", layer.base_layer), layer.forward, bare)
        yield
    finally:
        for layer in layers.values():
            layer.forward = lean_forward(layer)


def by_rows(x: Tensor, count: int) -> Tensor:
    """A layer's input or output as (count, tokens, d): some architectures flatten the batch before a layer, and the
    beams of one prompt share its row.
    """
    return x if len(x) == count and x.dim() == 3 else x.reshape(count, -1, x.shape[-1])


def _change_of(
    space: AtomSpace, name: str, rows: Mapping[str, Tensor], count: int
) -> Callable[[Tensor, Tensor], Tensor]:
    def change(x: Tensor, keys: Tensor) -> Tensor:
        added = space.row_update(name, by_rows(x, count), by_rows(keys, count), rows)
        return added.reshape(*x.shape[:-1], -1)

    return change


def _mixed(base: nn.Module, forward: Callable[..., Tensor], bare: Sequence[bool]) -> Callable[..., Tensor]:
    """A layer's forward whose bare rows are the base layer's own."""
    import torch

    rows = torch.tensor(bare)

    def mixed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = rows.to(x.device)
        if len(x) != len(bare):
            plain = plain.repeat_interleave(len(x) // len(bare))
        return torch.where(plain.view(-1, *[1] * (x.dim() - 1)), base(x, *args, **kwargs), forward(x, *args, **kwargs))

    return mixed
