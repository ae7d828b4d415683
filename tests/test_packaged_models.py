"""The whole way with Qwen2.5-Coder-0.5B and Gemma 3 270M: `make test-models`, which fetches them."""

import os

import pytest
import torch

from regrad_loaders.data.facts import generate
from regrad_loaders.training.start import fresh
from regrad_qdrant import Adapter, Document, GradientBank, ReGrad, load_base_model
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.packaged import packaged_file

LAYERS = {"qwen2.5-coder-0.5b-instruct": range(18, 24), "gemma-3-270m": range(12, 18)}
WORLD = generate("demo", 6, 1, questions_per_person=1)


def untrained(model, name):
    return fresh(
        model, BaseModel.of(model, name), kind="core", targets=("gate_proj", "up_proj", "down_proj"),
        layers=LAYERS[name], rank=8, basis_rank=16, lora_alpha=16, step_size=0.01, max_length=128,
    )  # fmt: skip


def atoms_of(model, tokenizer, initialization):
    adapter = Adapter(model, initialization)
    gradients = adapter.gradients(tokenizer)
    flat = gradients.atoms([gradients.encode(passage.text) for passage in WORLD.passages])
    adapter.release()
    return flat


@pytest.fixture(scope="module", params=LAYERS)
def name(request):
    if not os.environ.get("REGRAD_TEST_MODELS"):
        pytest.skip("large models: make test-models")
    assert packaged_file(request.param).is_file(), "make models"
    return request.param


def test_it_ingests_answers_alone_and_in_batches_and_is_as_before(name, tmp_path):
    model, tokenizer = load_base_model(name, dtype="float32", device="cpu")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    initialization = untrained(model, name)
    questions = [question.question for question in WORLD.questions]
    with GradientBank.open(tmp_path, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(Document(passage.id, {"id": passage.id, "text": passage.text}) for passage in WORLD.passages)
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            assert attach_atoms(bank, regrad.gradients, "sign").atoms_written == len(WORLD.passages)
            together = [answer.text for answer in regrad.answer_many(questions)]
            assert together == [regrad.answer(question).text for question in questions] and any(together)
            grounded = regrad.answer(questions[0], grounded=True)
            [hit] = [hit for hit in grounded.hits if hit.document_id == grounded.source.document_id]
            assert hit.text[grounded.source.start : grounded.source.end] == grounded.text
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_in_bfloat16_its_atoms_are_nearly_those_of_float32(name):
    model, tokenizer = load_base_model(name, dtype="float32", device="cpu")
    initialization = untrained(model, name)
    exact = atoms_of(model, tokenizer, initialization)
    half, _ = load_base_model(name, dtype="bfloat16", device="cpu")
    initialization.check_model(half)
    found = atoms_of(half, tokenizer, initialization)
    assert float(torch.cosine_similarity(found, exact).min()) > 0.98
