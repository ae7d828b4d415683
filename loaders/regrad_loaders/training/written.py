"""What the model writes to an episode's questions, each with its own update: how well it answers while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from regrad_loaders.data.episodes import Example
from regrad_loaders.data.scores import f1
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant.answer.generation import ends_of, greedily, padded_left
from regrad_qdrant.model.plugin import base_of, row_updates
from regrad_qdrant.model.prompts import PromptFormat

MAX_NEW_TOKENS = 24


def mean_f1(
    learner: MetaLearner,
    examples: Sequence[Example],
    updates: Mapping[str, Tensor] | None,
    tokenizer: Any,
    format: PromptFormat,
) -> float:
    """Mean F1 of what is written greedily to these questions, in batches as training has them.

    Args:
        updates: (questions, *shape) of each tensor of the space; None: with φ₀ alone.
    """
    base: Any = base_of(learner.model[0])
    scores = []
    for group in learner.groups(examples):
        asked = [examples[i] for i in group]
        ids, mask = padded_left([example.prompt_ids for example in asked], learner.pad_id, learner.device)
        own = None if updates is None else {name: update[group] for name, update in updates.items()}
        rows = nullcontext() if own is None else row_updates(learner.model[0], learner.space, own)
        with rows, torch.no_grad(), greedily(base, MAX_NEW_TOKENS, ends_of(base, tokenizer), learner.pad_id):
            written = base.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        scores += [f1(format.said(text), example.answers) for text, example in zip(texts, asked, strict=True)]
    return mean(scores)
