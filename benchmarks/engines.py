"""Search with atoms on the embedded engines, and the memory of filling them: Edge against the in-process client.

    python benchmarks/engines.py --points 20000

Points hold invented biographies; a search returns the three best with their atoms, and searches take turns between the
engines. Memory is the peak of a process that ingests and does nothing else, without the pages of the shard's own files,
which the kernel takes back when it needs them; `engine_mb` of it is what closing the shard gives back, the engine's own
index. A tiny random model computes atoms, which have as many numbers as the shipped initialization's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from qdrant_client import QdrantClient
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrad_loaders.data.facts import generate
from regrad_loaders.training.start import fresh
from regrad_qdrant import Adapter, Document, GradientBank, GradientComputer
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.stores.base import Store
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.memory import anonymous_megabytes, give_back_memory


def documents(count: int) -> Iterator[Document]:
    """As many biographies as asked for; people come again under other ids."""
    passages = generate("train", min(count, 2000), 1).passages
    return (Document(i, {"text": f"{passages[i % len(passages)].text} No. {i}."}) for i in range(count))


def tiny_gradients() -> tuple[GradientComputer, str]:
    """What computes 10,752 numbers a document quickly, and their space."""
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = (document.payload["text"] for document in documents(2000))
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=14, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    initialization = fresh(
        model, BaseModel.of(model, "tiny"), kind="core", targets=["gate_proj", "up_proj", "down_proj"],
        layers=range(14), rank=16, basis_rank=16, lora_alpha=32, step_size=1.0, max_length=256,
    )  # fmt: skip
    adapter = Adapter(model, initialization)
    gradients = adapter.gradients(tokenizer)
    return gradients, initialization.fingerprint


def filled(store: Store, count: int) -> GradientBank:
    """A bank with that many points and their atoms."""
    gradients, space = tiny_gradients()
    bank = GradientBank(store, store.name, space)
    bank.create()
    bank.add(documents(count))
    report = attach_atoms(bank, gradients, "ternary")
    if report.atoms_written != count:
        raise SystemExit(f"{report.atoms_written} atoms of {count}")
    return bank


@contextlib.contextmanager
def peak_of_memory() -> Iterator[list[float]]:
    """A list that grows by this process's anonymous memory, in MB, every 20 ms inside the block."""
    seen: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append(anonymous_megabytes())

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ended.set()
    thread.join()


def megabytes_of_filling(folder: Path, count: int) -> dict[str, float]:
    """The peak memory of a process that ingests into an Edge bank, in MB, and the engine's part of it."""
    command = [sys.executable, "-W", "ignore", __file__, "--fill", str(folder), "--points", str(count)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", type=Path, metavar="FOLDER", help="measure ingestion into this new folder alone")
    arguments = parser.parse_args()
    if arguments.fill:
        with peak_of_memory() as peak:
            bank = filled(open_store("docs", path=arguments.fill), arguments.points)
            give_back_memory()
            open_mb = anonymous_megabytes()
            bank.close()
            give_back_memory()
        print(json.dumps({"peak_mb": max(peak), "engine_mb": open_mb - anonymous_megabytes()}))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        memory = {count: megabytes_of_filling(folder / str(count), count) for count in (1000, arguments.points)}
        client = filled(ClientStore(QdrantClient(":memory:"), "docs"), arguments.points)
        edge = GradientBank(open_store("docs", path=folder / str(arguments.points)), "docs", client.space)
        rng, seconds = random.Random(0), {"edge": [], "client": []}
        texts = [document.payload["text"] for document in documents(2000)]
        questions = [f"What does {' '.join(rng.choice(texts).split()[:2])} do?" for _ in range(arguments.queries)]
        for question in questions:
            for name, bank in (("edge", edge), ("client", client)):
                started = time.perf_counter()
                hits = bank.search(question, 3)
                seconds[name].append(time.perf_counter() - started)
                if len(hits) != 3 or any(hit.record is None for hit in hits):
                    raise SystemExit(f"{name}: expected three hits with their atoms")
        edge.close()
    result = {"points": arguments.points, "memory": {str(count): value for count, value in memory.items()}}
    for name, values in seconds.items():
        result[name] = {"median_ms": 1000 * median(values), "p99_ms": 1000 * quantiles(values, n=100)[98]}
    result["client_over_edge_median"] = result["client"]["median_ms"] / result["edge"]["median_ms"]
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
