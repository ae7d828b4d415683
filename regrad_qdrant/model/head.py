"""The output head: from the last hidden states to the logits, as the model itself computes them.

    z = c·tanh(s·(W h + b) / c)        scale s and cap c where the architecture has them

Losses are taken from hidden states, so that logits exist for few tokens at a time; what a model does to them
afterwards (Gemma caps them, Granite and Cohere scale them, Phi adds a bias) has to be done here too. Which of it a
model does is found by trying it on a few tokens, never by its name, and what can't be matched is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from regrad_qdrant.errors import UnsupportedModelError
from regrad_qdrant.model.base_model import input_device

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")  # of a configuration, or one over it
CAPS = ("final_logit_softcapping", "output_logit_soft_cap")
PROBE = 12  # tokens of each of the two rows that are tried
TOLERANCE = {"torch.float32": 1e-4, "torch.float64": 1e-4}  # relative to the largest logit
COARSE_TOLERANCE = 5e-2  # … of 16 bits and fewer
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """W (vocabulary, d) and b (vocabulary,) of the frozen output embedding, and what happens to the logits then."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits are linear in the hidden states, so that their second derivative is 0."""
        return self.cap is None

    def linear(self, hidden: Tensor) -> Tensor:
        """W h + b of hidden states (tokens, d): (tokens, vocabulary)."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def finish(self, linear: Tensor) -> Tensor:
        """The logits of `linear`'s result."""
        scaled = linear if self.scale == 1.0 else linear * self.scale
        return scaled if self.cap is None else (scaled / self.cap).tanh() * self.cap

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states (tokens, d): (tokens, vocabulary)."""
        return self.finish(self.linear(hidden))

    def slope(self, logits: Tensor) -> Tensor | float:
        """The logits' derivative by `linear`'s result."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)

    def curvature(self, logits: Tensor) -> Tensor:
        """Their second derivative, of a head that is not plain."""
        cap = cast("float", self.cap)
        ratio = logits / cap
        return -2 * self.scale**2 / cap * ratio * (1 - ratio**2)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a plain base model, found by running it on a few tokens once.

    Raises:
        UnsupportedModelError: if its logits, or its own loss, are not what any known head gives.
    """
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    scale, cap = _FOUND[model]
    return Head(*_weights(model), scale, cap)


@contextlib.contextmanager
def own_states(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the output embedding gets states of their own memory, on a processor.

    `transformers` cuts a prompt's last states out of all of them, and in 16 bits PyTorch multiplies such a cut by a
    loop in place of a kernel: 0.6 s for each prompt of Qwen2.5-0.5B, 40 times as long as it has to.
    """
    import torch

    output = cast("Any", model.get_output_embeddings())
    if output is None or output.weight.device.type != "cpu":
        yield
        return

    def own(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = inputs
        return states.clone(memory_format=torch.contiguous_format), *others

    handle = output.register_forward_pre_hook(own)
    try:
        yield
    finally:
        handle.remove()


def _weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    output = cast("Any", model.get_output_embeddings())
    if output is None or getattr(output, "weight", None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embedding whose weights can be read")
    bias = getattr(output, "bias", None)
    return output.weight.detach(), None if bias is None else bias.detach()


def _find(model: PreTrainedModel) -> tuple[float, float | None]:
    import torch

    weight, bias = _weights(model)
    if (device := input_device(model)).type == "meta":
        return 1.0, None  # nothing can be run
    count = min(cast("Any", model.get_input_embeddings()).weight.shape[0], weight.shape[0])
    ids = (torch.arange(2 * PROBE, device=device) * 7919 % count).view(2, PROBE)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        hidden = cast("Any", model).get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        linear = Head(weight, bias).linear(hidden).float()
        expected = theirs.logits.float().to(linear.device)
        types = (weight.dtype, hidden.dtype, theirs.logits.dtype)
        tolerance = max(TOLERANCE.get(str(kind), COARSE_TOLERANCE) for kind in types) * float(expected.abs().max())
        tried = []
        for scale, cap in _candidates(model.config):
            found = Head(weight, bias, scale, cap).finish(linear)
            difference = float((found - expected).abs().max())
            tried.append(f"scale {scale:g}, cap {cap}: {difference:.3g}")
            if difference <= tolerance:
                _compare(model, found, ids, float(theirs.loss))
                return scale, cap
    raise UnsupportedModelError(
        f"the logits of {type(model).__name__} are not what its output embedding gives (largest difference by head: "
        f"{'; '.join(tried)}; allowed {tolerance:.3g}): its losses can't be computed here, so neither can atoms"
    )


def _compare(model: PreTrainedModel, logits: Tensor, ids: Tensor, theirs: float) -> None:
    """Refuse a model whose own loss is not the mean next-token cross-entropy."""
    from torch.nn.functional import cross_entropy

    ours = float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device)))
    if abs(ours - theirs) > 0.02 * max(1.0, abs(theirs)):
        raise UnsupportedModelError(
            f"the loss of {type(model).__name__} is {theirs:.4f} on a few tokens where their cross-entropy is "
            f"{ours:.4f}: it is trained for something else than the next token"
        )


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """Scales and caps that a model with this configuration may have, those that it names first: where the logits of a
    few tokens are small, a cap hardly shows."""
    configs = [config, *(c for name in ("text_config", "decoder_config") if (c := getattr(config, name, None)))]

    def named(names: tuple[str, ...]) -> list[float]:
        values = [getattr(one, name, None) for one in configs for name in names]
        return [float(value) for value in values if isinstance(value, int | float) and value]

    scales = dict.fromkeys([*(s for value in named(SCALES) for s in (value, 1 / value)), 1.0])
    yield from itertools.product(scales, [*dict.fromkeys(named(CAPS)), None])
