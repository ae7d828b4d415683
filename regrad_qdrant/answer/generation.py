"""Greedy answers of a whole batch of prompts, through `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.model.prompts import Prompt

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """What the model said to one prompt."""

    text: str  # to the first line break
    prompt_tokens: int


def encoded(tokenizer: Any, prompts: Sequence[Prompt], device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask (prompts, longest), padded on the left."""
    import torch

    rows = [
        tokenizer(prompt.render(tokenizer), add_special_tokens=False, verbose=False).input_ids for prompt in prompts
    ]
    longest, pad_id = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def generate(peft_model: PeftModel, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Generated]:
    """The model's greedy answer to every prompt, in their order.

    Prompts are padded on the left, so that row i of the batch is prompt i in every forward pass
    (`plugin.row_updates` gives each its own change).
    """
    import torch
    from transformers import GenerationConfig

    ids, mask = encoded(tokenizer, prompts, peft_model.device)
    longest = ids.shape[1]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    with torch.inference_mode():
        output = peft_model.generate(  # type: ignore[no-untyped-call] # peft
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
        )
    answers = []
    for prompt, tokens, found in zip(prompts, mask.sum(dim=1).tolist(), output, strict=True):
        said = found[longest : longest + prompt.max_new_tokens].tolist()
        if tokenizer.eos_token_id in said:  # what follows is padding, which may be an ordinary token
            said = said[: said.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0].strip()
        answers.append(Generated(text, tokens))
    return answers
