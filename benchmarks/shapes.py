"""What real sizes cost: models of the shapes of Llama 3.2 and 3.1 with random weights, no download.

For each: atoms a second beside the floor (the same model forward and backward through the adapted layers'
activations), the share of our own work in an answer, a batch of 64 answers with 64 updates beside the bare model's, and
the memory of a meta-training step by the number of passages whose second order is kept at once.

python benchmarks/shapes.py --shapes llama-3.2-1b --json benchmarks/shapes.json      (a GPU, or patience)
"""

from __future__ import annotations

import argparse
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from regrad_loaders.bench.figures import in_turns
from regrad_loaders.bench.gradients import Floor
from regrad_loaders.data.episodes import Episode, Example
from regrad_loaders.training.meta_gradient import backward
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.start import adapted_layers
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.atoms.record import Record, make_records
from regrad_qdrant.model.gradients import BATCH_TOKENS, EncodedDocument
from regrad_qdrant.model.head import own_states
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.space import LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "tiny": (64, 128, 4, 4, 2, 512, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128_256, True),
    "llama-3.1-8b": (4096, 14_336, 32, 32, 8, 128_256, False),
}
RANK, BASIS, TOKENS, ANSWER, TOP_K = 16, 64, 200, 20, 3
TARGETS = ("gate_proj", "up_proj", "down_proj")


class Tokenizer:
    """As much of one as an adapter's gradients ask for."""

    pad_token_id = 0


def model_of(shape: str, device: str, dtype: torch.dtype) -> Any:
    hidden, wide, layers, heads, pairs, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, vocab_size=vocabulary, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def initialization_of(model: Any, shape: str) -> MetaInitialization:
    """Random keys and columns in the upper half of the layers, of the default's ranks."""
    generator = torch.Generator().manual_seed(0)
    layers, modules = model.config.num_hidden_layers, {}
    for name, linear in adapted_layers(model, TARGETS, range(layers // 2, layers)).items():
        rows, columns = linear.weight.shape
        keys = torch.randn(RANK, columns, generator=generator) / columns**0.5
        basis = torch.randn(rows, BASIS, generator=generator) / rows**0.5
        modules[name] = LoraModule(keys, torch.zeros(rows, RANK), 2.0, basis)
    sizes: dict[str, Any] = dict.fromkeys(SPACES["core"](modules).shapes, 0.01)
    return MetaInitialization(BaseModel.of(model, shape), "core", 2 * RANK, modules, sizes, max_length=256)


def records_of(atoms: torch.Tensor, adapter: Adapter) -> list[Record]:
    texts = [str(i) for i in range(len(atoms))]
    return make_records(atoms, texts, adapter.initialization.fingerprint, DEFAULT_CODEC, adapter.space.layout)


def tokens(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def peak(device: str) -> float:
    """Bytes: of the GPU since the last `forget`, or of the process so far."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def forget(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speak(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode(), own_states(model):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=ANSWER,
            min_new_tokens=ANSWER, pad_token_id=0,
        )  # fmt: skip


def ingestion(model: Any, initialization: MetaInitialization, count: int, rounds: int, device: str) -> dict[str, Any]:
    rng = random.Random(1)
    documents = [EncodedDocument(tokens(rng, TOKENS, model.config.vocab_size), False) for _ in range(count)]
    floor = Floor(model, initialization.layers[0])
    floor.run(documents)
    forget(device)
    adapter = Adapter(model, initialization, check_model=False)
    gradients = adapter.gradients(Tokenizer())
    atoms = gradients.atoms_in_batches(documents, BATCH_TOKENS)
    [record] = records_of(atoms[:1], adapter)

    parties: dict[str, Callable[[int], Any]] = {
        "atoms": lambda _: gradients.atoms_in_batches(documents, BATCH_TOKENS),
        "floor": lambda _: floor.run(documents),
    }
    seconds = in_turns(parties, rounds)
    found = {
        "numbers": adapter.space.numel,
        "bytes": record.payload_bytes,
        "atoms_a_second": count / median(seconds["atoms"]),
        "time_over_floor": median(a / f for a, f in zip(seconds["atoms"], seconds["floor"], strict=True)),
        "peak": peak(device),
    }
    adapter.release()
    return found


def answers(model: Any, initialization: MetaInitialization, size: int, rounds: int, device: str) -> dict[str, Any]:
    rng = random.Random(2)
    adapter = Adapter(model, initialization, check_model=False)
    atoms = torch.randn(TOP_K, adapter.space.numel, generator=torch.Generator().manual_seed(1))
    records = records_of(atoms, adapter)
    question = torch.tensor([tokens(rng, 32, model.config.vocab_size)], device=device)
    questions = torch.tensor([tokens(rng, 32, model.config.vocab_size) for _ in range(size)], device=device)

    def with_update(_: int) -> None:
        with adapter.applied(records, [0.5, 0.3, 0.2]):
            speak(adapter.model, question)

    def own(_: int) -> None:
        with adapter.applied(records, [0.5, 0.3, 0.2]):
            pass

    def batch(_: int) -> None:
        sums = [adapter.decode(records, [0.5, 0.3, 0.2]) for _ in range(size)]
        with adapter.rows(sums, [False] * size):
            speak(adapter.model, questions)

    parties: dict[str, Callable[[int], Any]] = {
        "answer": with_update,
        "own": own,
        "bare": lambda _: speak(model, question),
        "batch": batch,
        "bare batch": lambda _: speak(model, questions),
    }
    in_turns(parties, 1)
    seconds = in_turns(parties, rounds)
    middle = {name: median(values) for name, values in seconds.items()}
    found = {
        "ms_of_answer": 1000 * middle["answer"],
        "own_share": middle["own"] / middle["answer"],
        "answer_over_bare": middle["answer"] / middle["bare"],
        "batch": size,
        "batch_throughput_over_bare": middle["bare batch"] / middle["batch"],
        "answers_a_second": size / middle["batch"],
    }
    adapter.release()
    return found


def training(
    model: Any, initialization: MetaInitialization, passages: int, at_once: int, device: str
) -> dict[str, Any]:
    """Peak memory and seconds of the meta-gradient of one episode, two questions a passage."""
    rng = random.Random(3)
    words = model.config.vocab_size
    learner = MetaLearner(model, initialization, "margin")
    examples = [
        Example(f"{i}", tokens(rng, 40, words), tokens(rng, 6, words), [i % passages, (i + 1) % passages], [2.0, 1.0])
        for i in range(2 * passages)
    ]
    episode = Episode([tokens(rng, 128, words) for _ in range(passages)], examples)
    forget(device)
    try:

        def step(_: int) -> None:
            for parameter in learner.parameters():
                parameter.grad = None
            backward(learner, episode, passage_batch=at_once)

        seconds = in_turns({"step": step}, 2)["step"][-1]
        return {"passages": passages, "passage_batch": at_once, "peak": peak(device), "seconds": seconds}
    except torch.OutOfMemoryError:
        return {"passages": passages, "passage_batch": at_once, "peak": None, "seconds": None}
    finally:
        learner.model[0].unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3.2-1b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--passages", default="4,8,16,32,48", help="of a training step; each with passage_batch 4 and whole"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"device": given.device, "dtype": given.dtype, "shapes": {}}
    if given.device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()
    for shape in given.shapes.split(","):
        model = model_of(shape, given.device, getattr(torch, given.dtype))
        initialization = initialization_of(model, shape)
        row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        row["ingestion"] = ingestion(model, initialization, given.documents, given.rounds, given.device)
        print(shape, json.dumps(row), flush=True)
        row["answers"] = answers(model, initialization, given.batch, given.rounds, given.device)
        print(shape, json.dumps(row["answers"]), flush=True)
        row["training"] = []
        for passages in map(int, filter(None, given.passages.split(","))):
            for at_once in sorted({4, passages}):
                if at_once <= passages:
                    row["training"].append(training(model, initialization, passages, at_once, given.device))
                    print(shape, json.dumps(row["training"][-1]), flush=True)
        found["shapes"][shape] = row
        del model
        forget(given.device)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
