"""The demo's questions with the base model in each type: atoms beside float32's, and F1.

    python benchmarks/base_types.py --json benchmarks/base_types.json

Where the processor has no units for 16 bits, its own products take up to a hundred times as long. They are then made
as an accelerator makes them, summed in float32 and rounded to the type, so that the numbers are those of the type.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrad_loaders.data.facts import generate
from regrad_loaders.data.scores import bootstrap
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_qdrant import GradientBank, MetaInitialization, ReGrad, load_base_model
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.model import head
from regrad_qdrant.model.base_model import multiplies_16_bits_faster

PEOPLE, TOP_K = 60, 3  # as `regrad-qdrant demo`


class _Product(torch.autograd.Function):
    """x Wᵀ (+ b) and its gradient, summed in float32 and rounded to x's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x.float(), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (grads[0].float() @ ctx.saved_tensors[0]).to(grads[0].dtype), None, None


def summed_in_float32(model: nn.Module) -> None:
    """Let the model's linear layers and its head multiply so."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in (torch.bfloat16, torch.float16):
            weight, bias = module.weight.float(), None if module.bias is None else module.bias.float()
            module.forward = lambda x, w=weight, b=bias: _Product.apply(x, w, b)  # type: ignore[method-assign]
    plain = head._weights
    wide: dict[int, Tensor] = {}

    def weights(of: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = plain(of)
        return wide.setdefault(weight.data_ptr(), weight.float()), bias

    head._weights = weights


def measured(name: str, questions: int, init: str, exact: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """What one type gives, and its atoms."""
    initialization = MetaInitialization.load(init)
    model, tokenizer = load_base_model(initialization.base.name, dtype=name, device="cpu")
    initialization.check_model(model)
    if name in ("bfloat16", "float16") and not multiplies_16_bits_faster():
        summed_in_float32(model)
    world = generate("demo", PEOPLE, 1, questions_per_person=1)
    with tempfile.TemporaryDirectory() as folder, GradientBank.open(folder, "docs", initialization.fingerprint) as bank:
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            add_corpus(bank, world.passages, regrad.gradients)
            attach_atoms(bank, regrad.gradients, "sign")
            documents = [regrad.gradients.encode(passage.text) for passage in world.passages[:8]]
            atoms = regrad.gradients.atoms_in_batches(documents, 2048)
            found = evaluate(regrad, world.questions[:questions], ["regrad"], top_k=TOP_K, batch=16)
    f1 = bootstrap([prediction.f1 for prediction in found.predictions])
    like = torch.cosine_similarity(atoms, atoms if exact is None else exact)
    row = {"type": name, "cosine": float(like.min()), "f1": f1.mean, "low": f1.low, "high": f1.high}
    return row, atoms


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--types", default="float32,bfloat16,float16,nf4")
    options.add_argument("--questions", type=int, default=48)
    options.add_argument("--init", default="smollm2-135m-instruct")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    rows, exact = [], None
    for name in given.types.split(","):
        row, atoms = measured(name, given.questions, given.init, exact)
        exact = atoms if exact is None else exact
        rows.append(row)
        print(f"{name:10} cosine of an atom with float32's, least of 8: {row['cosine']:.5f}   F1 {100 * row['f1']:.1f}")
    if given.json:
        settings = {"questions": given.questions, "init": given.init, "top_k": TOP_K, "codec": "sign"}
        given.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
