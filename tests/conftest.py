"""A tiny random Llama and its tokenizer for unit tests; the real model for integration tests."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from contextlib import contextmanager

import pytest
import torch
from qdrant_client import QdrantClient
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrad_loaders.bench.atoms import AtomBench, Task
from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.training.start import fresh
from regrad_qdrant import Document, GradientBank, MetaInitialization, ReGrad
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.stores.client import ClientStore
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.cli import app as cli
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.spaces.registry import SPACES

# Files of a minute and more, which begin first, so that no worker is left alone with one at the end.
LONG = ("test_examples", "test_cluster", "test_wheel", "test_smollm2", "test_cli", "test_sharded", "test_meta_train")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


COMMANDS = """
import json, sys
from regrad_qdrant.cli import app
for command in json.loads(sys.argv[1]):
    sys.argv = ["regrad-qdrant", *command]
    try:
        app.main()
    except SystemExit as ended:
        if ended.code:
            raise
"""  # a program of several commands, for starting takes longer than they do

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """Trained on the invented facts: 600 byte-level tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p.text for p in generate("train", 60, 3).passages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


class Letters:
    """A dense embedder that counts letters."""

    size = 4

    def documents(self, texts):
        return [self.query(text) for text in texts]

    def query(self, text):
        return [float(text.lower().count(letter)) + 0.1 for letter in "aeio"]


TINY = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def tiny_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY | changes)).eval().requires_grad_(False)


def tiny_initialization(model: torch.nn.Module, kind: str = "core", **changes) -> MetaInitialization:
    """Random φ₀ with a B that is not zero, so that every part of a gradient is alive."""
    settings = {
        "kind": kind,
        "targets": ["gate_proj", "up_proj", "down_proj"],
        "layers": [1, 2],
        "rank": 4,
        "basis_rank": 3,
        "lora_alpha": 8,
        "step_size": 0.5,
        "max_length": 64,
    } | changes
    initialization = fresh(model, BaseModel.of(model, "tiny"), **settings)
    generator = torch.Generator().manual_seed(7)
    for module in initialization.modules.values():
        module.lora_b.copy_(0.1 * torch.randn(module.lora_b.shape, generator=generator))
    return initialization


@contextmanager
def regrad_over(texts, model, tokenizer, folder, codec="int8"):
    """A ReGrad with random φ₀ over a bank in this folder, which holds the texts d0, d1, … and their atoms."""
    initialization = tiny_initialization(model)
    with GradientBank.open(folder, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(texts))
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            attach_atoms(bank, regrad.gradients, codec)
            yield regrad


def state_of(adapter) -> str:
    """A hash of the base model's weights and of the plug-in's, as they are now."""
    state = hashlib.sha256()
    base = adapter.model.get_base_model()
    for name, tensor in (*base.state_dict().items(), *adapter._parameters.items()):
        state.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return state.hexdigest()


def losses_of_steps(learner, tokenizer, steps: int = 4) -> list[float]:
    """Of a few training steps on one episode; every gradient must be finite."""
    world = generate("train", 8, 1)
    episode = EpisodeSource(world, world.questions, tokenizer, 48).episode(random.Random(0), 3, 1, [2])
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = learner.objective(episode)[0].mean()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in learner.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(params=list(SPACES))
def kind(request):
    return request.param


@pytest.fixture
def initialization(model):
    return tiny_initialization(model)


@pytest.fixture
def measured(tokenizer):
    """The benchmarks' own view of the tiny model."""
    return AtomBench("tiny", tiny_initialization(tiny_model()), tiny_model(), tokenizer)


@pytest.fixture
def task():
    """Five questions about twelve invented people, with what BM25 returns for them."""
    world = generate("demo", 12, 1, questions_per_person=1)
    return Task.of(world, world.questions[:5], depth=4)


@pytest.fixture
def tiny_bench(tokenizer, tmp_path, monkeypatch, capsys):
    """Runs a command of `regrad-qdrant bench` on the tiny model, in an empty folder."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    initialization = tiny_initialization(model)
    object.__setattr__(initialization.base, "name", str(tmp_path / "model"))
    initialization.save(tmp_path / "init")
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["regrad-qdrant", "bench", command, "--init", "init", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code, capsys.readouterr().err

    return run


@pytest.fixture(params=["client", "edge", "rest", "grpc"])
def store(request, tmp_path):
    """An empty collection in each engine; a server, over REST and gRPC, is skipped without QDRANT_URL."""
    if request.param == "edge":
        store = EdgeStore(tmp_path / "docs")
    elif request.param == "client":
        store = ClientStore(QdrantClient(":memory:"), "docs", owns_client=True)
    else:
        if not os.environ.get("QDRANT_URL"):
            pytest.skip("QDRANT_URL is not set")
        grpc = request.param == "grpc"
        client = QdrantClient(
            os.environ["QDRANT_URL"],
            api_key=os.environ.get("QDRANT_API_KEY"),
            prefer_grpc=grpc,
            timeout=60,
            check_compatibility=False,
        )
        for name in ("regrad_test", "regrad_test_atoms"):
            client.delete_collection(name)
        store = ClientStore(client, "regrad_test", owns_client=True)
    yield store
    store.close()
