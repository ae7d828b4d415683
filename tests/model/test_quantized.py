"""A base in 4 bits and in half precision: trains, ingests, answers alone and in batches, and is known by a sample."""

import importlib.util

import pytest
import torch
from conftest import TINY, losses_of_steps, tiny_initialization
from transformers import LlamaConfig, LlamaForCausalLM

from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant import Document, GradientBank, ReGrad, load_base_model
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.errors import WrongModelError
from regrad_qdrant.model.identity import BaseModel

TEXTS = [
    "Ida works as a baker.",
    "The employer of Noor is Amber Mills, and Noor is learning Welsh.",
    "Orla plays chess.",
]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # a block of 4-bit weights has 64
needs_bits = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """On every processor: a random model's likeliest tokens are too close for 16 bits to tell them apart."""
    monkeypatch.setattr("regrad_qdrant.model.base_model.multiplies_16_bits_faster", lambda: False)


def made(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY | WIDE)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("model", 0), ("other", 1)):
        made(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dtype", ["float16", pytest.param("nf4", marks=needs_bits)])
def test_the_whole_way_with_a_base_in_fewer_bits(folder, tokenizer, tmp_path, dtype):
    initialization = tiny_initialization(made(), max_length=64)
    model, _ = load_base_model(str(folder / "model"), dtype=dtype, device="cpu")
    initialization.check_model(model)
    exact = atoms_of(made(), initialization, tokenizer)
    found = atoms_of(model, initialization, tokenizer)
    assert float(torch.cosine_similarity(found, exact).min()) >= {"float16": 0.999, "nf4": 0.8}[dtype]
    with GradientBank.open(tmp_path, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            assert attach_atoms(bank, regrad.gradients, "sign").atoms_written == len(TEXTS)
            before = {name: p.detach().clone() for name, p in regrad.adapter._parameters.items()}
            questions = ["What does Ida do?", "Who employs Noor?", "What does Orla play?"]
            together = [answer.text for answer in regrad.answer_many(questions, top_k=2)]
            alone = [regrad.answer(question, top_k=2).text for question in questions]
            assert all(one[:4] == other[:4] for one, other in zip(together, alone, strict=True))
            assert all(torch.equal(p, before[name]) for name, p in regrad.adapter._parameters.items())
    learner = MetaLearner(model, initialization, "margin")
    losses = losses_of_steps(learner, tokenizer)
    assert losses[-1] < losses[0]


@needs_bits
def test_gradients_flow_through_a_model_in_4_bits_that_has_answered_before(folder, tokenizer):
    initialization = tiny_initialization(made(), max_length=64)
    fresh, _ = load_base_model(str(folder / "model"), dtype="nf4", device="cpu")
    used, _ = load_base_model(str(folder / "model"), dtype="nf4", device="cpu")
    with torch.no_grad():
        used(**tokenizer(TEXTS[0], return_tensors="pt"))  # packs its weights where the processor has AVX512_BF16
    expected = atoms_of(fresh, initialization, tokenizer)
    assert float(torch.cosine_similarity(atoms_of(used, initialization, tokenizer), expected).min()) > 0.95


def atoms_of(model, initialization, tokenizer):
    from regrad_qdrant.answer.adapter import Adapter

    adapter = Adapter(model, initialization)
    gradients = adapter.gradients(tokenizer)
    atoms = gradients.atoms([gradients.encode(text) for text in TEXTS])
    adapter.release()
    return atoms


@pytest.mark.parametrize("dtype", ["float16", pytest.param("nf4", marks=needs_bits)])
def test_another_model_in_fewer_bits_is_refused(folder, dtype):
    initialization = tiny_initialization(made(), max_length=64)
    other, _ = load_base_model(str(folder / "other"), dtype=dtype, device="cpu")
    with pytest.raises(WrongModelError, match="was trained for tiny"):
        initialization.check_model(other)


def test_without_a_sample_fewer_bits_can_not_be_told(folder):
    from dataclasses import replace

    initialization = tiny_initialization(made(), max_length=64)
    old = replace(initialization, base=BaseModel("tiny", initialization.base.digest))
    half, _ = load_base_model(str(folder / "model"), dtype="float16", device="cpu")
    with pytest.raises(WrongModelError, match="in float32 or bfloat16"):
        old.check_model(half)
    old.check_model(made().to(torch.bfloat16))


@needs_bits
def test_what_was_trained_on_4_bits_is_known_in_any(folder):
    quantized, _ = load_base_model(str(folder / "model"), dtype="nf4", device="cpu")
    base = BaseModel.of(quantized, "tiny")
    assert base.fits(quantized) and base.fits(made()) and base.fits(made().to(torch.bfloat16))
    assert not base.fits(made(1))
