"""Documents per second: atoms of whole batches against one document at a time, in turns within one run.

    python benchmarks/gradients.py --corpus ../shared/data/squad2_dev/corpus.jsonl --limit 64

The loop is what the paper's code does: one document, autograd on every LoRA tensor, fp32. Both compute the same
numbers; the largest relative difference is printed with the ratio.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from regrad_loaders.data import read_corpus
from regrad_loaders.facts import generate
from regrad_qdrant import Adapter, GradientComputer, MetaInitialization, load_base_model
from regrad_qdrant.gradients import EncodedDocument
from regrad_qdrant.plugin import lora_layers, lora_weight


def one_at_a_time(gradients: GradientComputer, documents: list[EncodedDocument]) -> torch.Tensor:
    """All atoms by a loop of plain autograd."""
    layers = lora_layers(gradients.model)
    weights = [lora_weight(layers[name], part) for name in gradients.space.modules for part in ("lora_A", "lora_B")]
    for weight in weights:
        weight.requires_grad_(True)
    atoms = torch.empty(len(documents), gradients.space.numel)
    for row, document in enumerate(documents):
        ids = torch.tensor([document.ids])
        grads = torch.autograd.grad(gradients.model(input_ids=ids, labels=ids).loss, weights)
        of_b = dict(zip(gradients.space.modules, grads[1::2], strict=True))
        cores = {f"{n}.core": (m.basis.T @ of_b[n]).unsqueeze(0) for n, m in gradients.space.modules.items()}
        atoms[row] = gradients.space.flatten(cores)[0]
    for weight in weights:
        weight.requires_grad_(False)
    return atoms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="corpus.jsonl; invented biographies where none is given")
    parser.add_argument("--limit", type=int, default=48, help="documents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--init", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    initialization = MetaInitialization.load(arguments.init)
    model, tokenizer = load_base_model(initialization.base.name)
    adapter = Adapter(model, initialization)
    gradients = GradientComputer(adapter.model, tokenizer, adapter.space, initialization.max_length)
    passages = read_corpus(arguments.corpus) if arguments.corpus else generate("demo", arguments.limit, 1).passages
    documents = [gradients.encode(passage.text) for passage in passages[: arguments.limit]]
    (
        gradients.atoms_in_batches(documents[:4], arguments.batch_tokens),
        one_at_a_time(gradients, documents[:4]),
    )  # warm up
    ratios, rates = [], {"batched": 0.0, "one at a time": 0.0}
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        ours = gradients.atoms_in_batches(documents, arguments.batch_tokens)
        middle = time.perf_counter()
        loop = one_at_a_time(gradients, documents)
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        rates = {"batched": len(documents) / (middle - start), "one at a time": len(documents) / (end - middle)}
        difference = float(((ours - loop).norm(dim=1) / loop.norm(dim=1)).max())
        print(", ".join(f"{name} {rate:.2f} documents/s" for name, rate in rates.items()), f"ratio {ratios[-1]:.2f}")
    tokens = sum(len(document.ids) for document in documents)
    print(f"{len(documents)} documents, {tokens} tokens; largest relative difference {difference:.1e}")
    print(f"batched over one at a time: {median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
