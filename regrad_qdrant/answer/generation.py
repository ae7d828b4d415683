"""Greedy answers of a whole batch of prompts, through `model.generate`; of questions with options, the likeliest."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from regrad_qdrant.errors import ContextLengthError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.gradients import answer_losses, mean_losses, pad
from regrad_qdrant.model.head import head_of, own_states
from regrad_qdrant.model.plugin import base_of
from regrad_qdrant.model.prompts import Prompt, PromptFormat, PromptFunction

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from regrad_qdrant.answer.spans import Span


Finish = Literal["stop", "length"]  # why an answer ended: it was done, or as long as it may be


@dataclass(frozen=True)
class Generated:
    """What the model said to one prompt."""

    text: str  # as the format has it: to the first line break
    prompt_tokens: int
    span: Span | None = None  # of a grounded answer, which it is
    log_probability: float | None = None  # … and the mean of its tokens' and its end's
    finish: Finish = "stop"


@dataclass(frozen=True)
class Asking:
    """How prompts become text, and how long answers are."""

    format: PromptFormat = PromptFormat()
    function: PromptFunction | None = None  # a prompt's text, instead of the format's

    def render(self, prompt: Prompt, tokenizer: Any) -> str:
        return self.format.render(prompt, tokenizer) if self.function is None else self.function(prompt)

    def said(self, prompt: Prompt, text: str) -> str:
        """The answer in what the model said. Its own system message may want more than a line."""
        return self.format.said(text, first_line=self.first_line(prompt))

    def is_over(self, prompt: Prompt, text: str) -> bool:
        """Whether nothing that comes can change the answer in what the model has said."""
        return self.format.is_over(text, first_line=self.first_line(prompt))

    def first_line(self, prompt: Prompt) -> bool:
        """Whether an answer to this prompt ends with its line."""
        return self.format.first_line and prompt.system is None

    def target(self, tokenizer: Any, prompt: Prompt, answer: str) -> list[int]:
        """The token ids that an answer is weighed by, and its end: of an option all, however short an answer may be."""
        return self.format.target(tokenizer, answer, None if prompt.options else self.length(prompt))

    def length(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or self.format.max_new_tokens[prompt.instruction]


def encoded(
    base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], asking: Asking | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (prompts, longest), padded on the left.

    Raises:
        ContextLengthError: as `read`.
    """
    return padded_left(
        read(base, tokenizer, prompts, asking or Asking()), tokenizer.pad_token_id or 0, input_device(base)
    )


def padded_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask (rows, longest), so that all rows end together."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def token_ids(tokenizer: Any, prompts: Sequence[Prompt], asking: Asking) -> list[list[int]]:
    """Of each prompt's text."""
    texts = [asking.render(prompt, tokenizer) for prompt in prompts]
    return [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]


def read(base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], asking: Asking) -> list[list[int]]:
    """The token ids of each prompt's text, for which the model has room.

    Raises:
        ContextLengthError: for one that has more tokens, with the longest answer, than the model's context.
    """
    found = token_ids(tokenizer, prompts, asking)
    for prompt, ids in zip(prompts, found, strict=True):
        check_length(base, len(ids), asking.length(prompt))
    return found


def check_length(base: PreTrainedModel, prompt: int, answer: int) -> None:
    """Refuse so many tokens of a prompt and of an answer where they are more than the model's context.

    Raises:
        ContextLengthError: where they are.
    """
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + answer > context:
        left = context - prompt
        raise ContextLengthError(
            f"the prompt has {prompt} tokens and the answer may have {answer}: more than the {context} of the model's "
            f"context; {f'ask for {left} at most, or ' if left > 0 else ''}let less stand in the prompt (a shorter "
            "question, fewer turns, or documents where they stand in it)"
        )


def generate(
    peft_model: PeftModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    asking: Asking | None = None,
    *,
    streamer: Any = None,
    stopping: Any = None,
) -> list[Generated]:
    """The model's greedy answer to every prompt, in their order.

    Prompts are padded on the left, so that row i of the batch is prompt i in every forward pass
    (`plugin.row_updates` gives each its own change).

    Args:
        streamer: of a single prompt, as `transformers` has it.
        stopping: a stopping criterion, as `transformers` has it.

    Raises:
        ContextLengthError: for a prompt that is longer than the model's context.
    """
    import torch

    asking = asking or Asking()
    base = base_of(peft_model)
    ids, mask = encoded(base, tokenizer, prompts, asking)
    longest = ids.shape[1]
    ends = ends_of(base, tokenizer)
    lengths = [asking.length(prompt) for prompt in prompts]
    options: dict[str, Any] = {"streamer": streamer} if streamer is not None else {}

    def over(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        said = tokenizer.batch_decode(ids[:, longest:], skip_special_tokens=True)
        done = [asking.is_over(prompt, text) for prompt, text in zip(prompts, said, strict=True)]
        return torch.tensor(done, device=ids.device)

    options["stopping_criteria"] = [over] if stopping is None else [over, stopping]
    if asking.format.end:
        options |= {"stop_strings": [asking.format.end], "tokenizer": tokenizer}
    with torch.inference_mode(), greedily(base, max(lengths), ends, tokenizer.pad_token_id or 0):
        output = base.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator] # transformers
    answers = []
    for prompt, length, tokens, found in zip(prompts, lengths, mask.sum(dim=1).tolist(), output, strict=True):
        said = found[longest : longest + length].tolist()
        at = next((i for i, token in enumerate(said) if token in ends), len(said))  # what follows is padding
        text = tokenizer.decode(said[:at], skip_special_tokens=True)
        cut = at == length and not asking.is_over(prompt, text)
        answers.append(Generated(asking.said(prompt, text), tokens, finish="length" if cut else "stop"))
    return answers


def next_logits(base: Any, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The logits (rows, vocabulary) after the rows' last token, and the cache of keys and values with what was read.

    Args:
        ids: (rows, tokens) that the cache, None at first, does not have yet.
        mask: (rows, all tokens), padded on the left.
    """
    options = {"logits_to_keep": 1} if "logits_to_keep" in _taken(type(base).forward) else {}
    with own_states(base):
        output = _read_on(base, ids, mask, cache, **options)
    return output.logits[:, -1].float(), output.past_key_values


def _read_on(module: Any, ids: Tensor, mask: Tensor, cache: Any, **options: Any) -> Any:
    """What a base model, or its decoder, returns of these tokens after those in the cache."""
    if "position_ids" in _taken(type(module).forward):
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return module(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)


def can_fork(cache: Any) -> bool:
    """Whether several continuations can go on from a cache: from keys and values they can, from a recurrent state, as
    Mamba and linear attention have it, `transformers` does not let them."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


@functools.cache
def _taken(forward: Callable[..., Any]) -> frozenset[str]:
    """What a class's forward pass takes; an object's own may be wrapped, where a model is spread over devices."""
    return frozenset(inspect.signature(forward).parameters)


def choose(
    peft_model: PeftModel, tokenizer: Any, prompts: Sequence[Prompt], asking: Asking | None = None
) -> list[Generated]:
    """Of each prompt's options the likeliest answer: by the mean log-probability of its tokens and its end."""
    asking = asking or Asking()
    before = read(base_of(peft_model), tokenizer, prompts, asking)
    said = [[spelling for spelling, _ in prompt.spellings] for prompt in prompts]
    means = _mean_log_probabilities(peft_model, tokenizer, prompts, before, said, asking)
    return [
        Generated(prompt.spellings[own.index(max(own))][1], len(ids))
        for prompt, ids, own in zip(prompts, before, means, strict=True)
    ]


def mean_log_probabilities(
    peft_model: PeftModel, tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str], asking: Asking
) -> list[float]:
    """Of each answer to its prompt, over its tokens and its end."""
    ids = token_ids(tokenizer, prompts, asking)
    means = _mean_log_probabilities(peft_model, tokenizer, prompts, ids, [[answer] for answer in answers], asking)
    return [mean for [mean] in means]


def _mean_log_probabilities(
    peft_model: PeftModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    answers: Sequence[Sequence[str]],
    asking: Asking,
) -> list[list[float]]:
    """Of each prompt's answers, over their tokens and their end.

    A prompt is read once, and its answers go on from there, where the model's cache lets them. They are rows of one
    batch: n·i to n·(i + 1) − 1 are those of prompt i, n as many as any has (`plugin.row_updates` gives all of them the
    change of row i).
    """
    import torch

    base, pad_id = base_of(peft_model), tokenizer.pad_token_id or 0
    count = max(map(len, answers))
    targets: list[list[int]] = []
    for prompt, own in zip(prompts, answers, strict=True):
        found = [asking.target(tokenizer, prompt, answer) for answer in own]
        targets += found + found[:1] * (count - len(own))
    asked, mask = padded_left(ids, pad_id, input_device(base))
    decoder, head = base.get_decoder(), head_of(base)
    with torch.inference_mode():
        output = _read_on(decoder, asked, mask, None)
        cache: Any = getattr(output, "past_key_values", None)
        if not can_fork(cache):
            whole = [own for own in ids for _ in range(count)]
            means, _ = answer_losses(peft_model, list(zip(whole, targets, strict=True)), pad_id)
        else:
            states = output[0][:, -1:].repeat_interleave(count, dim=0)
            if max(map(len, targets)) > 1:
                said, _ = pad([target[:-1] for target in targets], pad_id, asked.device)
                mask = torch.cat([mask.repeat_interleave(count, dim=0), torch.ones_like(said)], dim=1)
                cache.batch_repeat_interleave(count)
                states = torch.cat([states, _read_on(decoder, said, mask, cache)[0]], dim=1)
            means, _ = mean_losses(states, head, targets)
    return (-means).view(len(prompts), count).tolist()


def ends_of(base: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and all that the model's generation config names."""
    return ends_with(getattr(base.generation_config, "eos_token_id", None), tokenizer)


def ends_with(named: Any, tokenizer: Any) -> list[int]:
    """The tokens that a generation config names, one, several or none, and the tokenizer's."""
    found = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    return sorted({int(token) for token in found if token is not None})


@contextlib.contextmanager
def greedily(base: Any, max_new_tokens: int, ends: list[int], pad_id: int) -> Iterator[None]:
    """Inside the block the model decodes greedily, with nothing of its own generation config: no repetition penalty."""
    from transformers import GenerationConfig

    own = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad_id
    )
    try:
        with own_states(base):
            yield
    finally:
        base.generation_config = own
