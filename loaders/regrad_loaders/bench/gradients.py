"""Documents per second: whole batches against one document at a time, beside the floor of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from regrad_loaders.bench.figures import Figure, flops, in_turns, milliseconds
from regrad_qdrant.model.gradients import BATCH_TOKENS, EncodedDocument, GradientComputer, batches, document_losses, pad
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.plugin import live_space, lora_layers, lora_weight, plug_in
from regrad_qdrant.model.space import AtomSpace

A_ROUND = 16  # documents


def one_at_a_time(gradients: GradientComputer, documents: Sequence[EncodedDocument]) -> torch.Tensor:
    """The atoms by a loop of plain autograd on every LoRA tensor, as the paper's code computes them."""
    layers = lora_layers(gradients.model)
    weights = {f"{name}.{part}": lora_weight(layers[name], part) for name in layers for part in ("lora_A", "lora_B")}
    atoms = torch.empty(len(documents), gradients.space.numel)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for row, document in enumerate(documents):
            ids = torch.tensor([document.ids], device=gradients.model.device)
            loss = gradients.model(input_ids=ids, labels=ids).loss
            grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            atoms[row] = gradients.space.flatten(in_space(gradients.space, grads))[0]
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return atoms


def in_space(space: AtomSpace, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One document's atom, (1, *shape) a tensor, from its gradients of the LoRA tensors."""
    if space.kind == "lora":
        return {name: grad.unsqueeze(0) for name, grad in grads.items()}
    atoms: dict[str, torch.Tensor] = {}
    for name, module in space.modules.items():  # g_B = s·Σ δ keyᵀ, here with the unit vectors as keys
        delta = grads[f"{name}.lora_B"].mT.unsqueeze(0) / module.scaling
        keys = torch.eye(module.rank, device=delta.device).unsqueeze(0)
        space.accumulate(atoms, space.from_gradients(name, keys, delta))
    return atoms


class Floor:
    """A forward pass of the bare model and the backward pass through the adapted layers' activations alone.

    Args:
        model: a copy of the base model without plug-in, whose dtype is the floor's.
        first: the first adapted transformer layer.
    """

    def __init__(self, model: Any, first: int) -> None:
        self.model = model.requires_grad_(False)
        self.first: nn.Module = model.get_decoder().layers[first]

    def run(self, documents: Sequence[EncodedDocument]) -> None:
        handle = self.first.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            for batch in batches([len(document.ids) for document in documents], BATCH_TOKENS):
                ids, mask = pad([documents[i].ids for i in batch], 0, self.model.device)
                document_losses(self.model, ids, mask).sum().backward()
        finally:
            handle.remove()

    @staticmethod
    def _begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The graph begins at this layer's input."""
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs


def bench_gradients(
    initialization: MetaInitialization,
    load: Callable[[str], tuple[Any, Any]],
    dtype: str,
    texts: Sequence[str],
    on_round: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The figures, and what they were made of.

    Args:
        load: gives a base model in a dtype, and its tokenizer.
        dtype: of the model that atoms are computed with.
        texts: of the documents; each is computed once by every party.
    """
    model, tokenizer = load(dtype)
    peft_model = plug_in(model, initialization)
    gradients = GradientComputer(
        peft_model, tokenizer, live_space(peft_model, initialization), initialization.max_length
    )
    first = initialization.layers[0]
    floors = {dtype: Floor(load(dtype)[0], first) for dtype in ("bfloat16", "float32")}
    documents = [gradients.encode(text) for text in texts]
    rounds = list(_rounds(documents))
    largest = 0.0

    def batched(turn: int) -> torch.Tensor:
        return gradients.atoms_in_batches(rounds[turn], BATCH_TOKENS)

    batched(0), one_at_a_time(gradients, rounds[0][:2]), [floor.run(rounds[0]) for floor in floors.values()]
    difference = batched(0) - one_at_a_time(gradients, rounds[0])
    largest = float((difference.norm(dim=1) / batched(0).norm(dim=1)).max())
    parties = {
        "batched": batched,
        "one at a time": lambda turn: one_at_a_time(gradients, rounds[turn]),
        "floor, bfloat16": lambda turn: floors["bfloat16"].run(rounds[turn]),
        "floor, float32": lambda turn: floors["float32"].run(rounds[turn]),
    }
    seconds = in_turns(parties, len(rounds), on_round)
    middle = len(rounds) // 2
    gflop = {name: flops(lambda party=party: party(middle)) / 1e9 for name, party in parties.items()}
    peft_model.unload()
    best = min(("floor, bfloat16", "floor, float32"), key=lambda name: sum(seconds[name]))
    bare = (
        "the bare model forward and, through the adapted layers' activations alone, backward: "
        f"{gflop['floor, float32'] / A_ROUND:.3g} of the {gflop['batched'] / A_ROUND:.3g} GFLOP a document"
    )
    speedup = sum(seconds["one at a time"]) / sum(seconds[best])
    figures = {
        "gradients.speedup_over_one_at_a_time": Figure.ratio(
            seconds["one at a time"], seconds["batched"], speedup, f"what the floor would reach: {bare}, {best[7:]}"
        ),
        "gradients.time_over_floor": Figure.ratio(seconds["batched"], seconds["floor, bfloat16"], 1.0, f"{bare}, bf16"),
        "gradients.time_over_float32_floor": Figure.ratio(
            seconds["batched"], seconds["floor, float32"], 1.0, f"{bare}, float32; atoms in {dtype}"
        ),
    }
    tokens = sum(len(document.ids) for document in documents)
    details = {
        "documents": len(documents),
        "tokens": tokens,
        "largest_relative_difference": largest,
        "ms_a_document": {name: value / A_ROUND for name, value in milliseconds(seconds).items()},
        "gflop_a_document": {name: value / A_ROUND for name, value in gflop.items()},
        "gflop_per_second": {name: value / seconds[name][middle] for name, value in gflop.items()},
        "documents_per_second": round(len(documents) / sum(seconds["batched"]), 2),
    }
    return figures, details


def _rounds(documents: Sequence[EncodedDocument]) -> Iterator[list[EncodedDocument]]:
    """Rounds of documents of like length, as a long list gives them to a batch."""
    ordered = sorted(documents, key=lambda document: len(document.ids))
    yield from (ordered[start : start + A_ROUND] for start in range(0, len(ordered) - A_ROUND + 1, A_ROUND))
