"""Continued pre-training: the plug-in's tensors trained on the documents' own texts, next token by next token.

What is learned stays in the weights, and nothing is retrieved. Gururangan et al. 2020; as tasks of reading
comprehension (`baselines.comprehension`) Cheng et al. 2023.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regrad_qdrant.errors import DataError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.gradients import batches, document_losses, pad
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.plugin import base_of, lora_layers, lora_weight, plug_in

LEARNING_RATE = 1e-3  # of 3e-4, 1e-3 and 3e-3, on 24 dev questions of Natural Questions (cpt: 3.4, 4.4, 3.7 F1; ft-cpt:
EPOCHS = 3  # 6.9, 8.8, 4.8); ten epochs have 2.7 and 7.1
BATCH_TOKENS = 1024  # of one step, with padding
MAX_TOKENS = 512  # of a text that is learned from; longer ones are cut


def continued(
    model: nn.Module,
    tokenizer: Any,
    start: MetaInitialization,
    texts: Sequence[str],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda _: None,
) -> MetaInitialization:
    """The initialization whose φ₀ has been trained on these texts.

    Args:
        model: the plain base model; it is plain again afterwards.
        start: whose A and B the training begins with.
        on_step: called after every step with the number of texts that it saw, `epochs` times each in all.

    Raises:
        DataError: for no text of two tokens or more.
    """
    documents = [ids[:MAX_TOKENS] for text in texts if len(ids := tokenizer(text, verbose=False).input_ids) > 1]
    if not documents:
        raise DataError("continued pre-training has no text to learn from")
    peft_model = plug_in(model, start)
    try:
        layers = lora_layers(peft_model)
        tensors = {(name, part): lora_weight(layers[name], part) for name in layers for part in ("lora_A", "lora_B")}
        optimizer = torch.optim.AdamW([tensor.requires_grad_(True) for tensor in tensors.values()], lr=learning_rate)
        rng, device = random.Random(seed), input_device(base_of(peft_model))
        plan = [batch for _ in range(epochs) for batch in _shuffled(documents, rng)]
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(plan))
        for batch in plan:
            with precision(peft_model), torch.enable_grad():
                ids, mask = pad([documents[i] for i in batch], tokenizer.pad_token_id or 0, device)
                document_losses(peft_model, ids, mask).mean().backward()
            nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay.step()
            on_step(len(batch))
        learned = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    finally:
        peft_model.unload()
    modules = {
        name: replace(module, lora_a=learned[name, "lora_A"], lora_b=learned[name, "lora_B"])
        for name, module in start.modules.items()
    }
    return replace(start, modules=modules, card={"texts": len(documents), "epochs": epochs, "seed": seed})


def precision(model: nn.Module) -> torch.autocast:
    """bf16 for a model that is loaded in 16 bits, so that training is as precise as what it is compared with."""
    base = base_of(model)
    return torch.autocast(input_device(base).type, torch.bfloat16, enabled=base.dtype != torch.float32)


def _shuffled(documents: Sequence[Sequence[int]], rng: random.Random) -> list[list[int]]:
    """Batches of like length in random order; those of like length meet others in every epoch."""
    order = rng.sample(range(len(documents)), len(documents))
    found = [[order[i] for i in batch] for batch in batches([len(documents[i]) for i in order], BATCH_TOKENS)]
    rng.shuffle(found)
    return found
