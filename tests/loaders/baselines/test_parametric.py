"""An adapter for each document (PRAG)."""

import pytest
import torch
from conftest import tiny_initialization, tiny_model

from regrad_loaders.baselines.parametric import DocumentAdapters, without_steps
from regrad_loaders.data.facts import generate
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.model.gradients import document_losses, pad
from regrad_qdrant.model.prompts import PromptFormat

TEXTS = [passage.text for passage in generate("train", 6, 1).passages]


@pytest.fixture
def adapters(tokenizer):
    model = tiny_model()
    adapter = Adapter(model, without_steps(tiny_initialization(model, "values", max_length=128)))
    return DocumentAdapters(adapter, tokenizer, PromptFormat(), epochs=2, learning_rate=1e-2), adapter


def trained(adapters, texts):
    return adapters.atoms_in_batches([adapters.windows(text)[0] for text in texts], 100_000)


def test_documents_that_train_side_by_side_are_trained_as_alone(adapters):
    adapters, _ = adapters
    together = trained(adapters, TEXTS)
    alone = torch.cat([trained(adapters, [text]) for text in TEXTS])
    assert len(adapters.seconds) == 2 * len(TEXTS)
    assert torch.nn.functional.cosine_similarity(together, alone).min() > 0.999


def test_a_stored_adapter_knows_its_document_and_leaves_no_trace(adapters, tokenizer):
    adapters, adapter = adapters
    found = trained(adapters, TEXTS[:2])
    records = make_records(found, TEXTS[:2], adapter.initialization.fingerprint, "fp16", adapter.space.layout)
    learned = adapters.examples(adapters.windows(TEXTS[0])[0])
    assert {len(adapters.examples(adapters.windows(text)[0])) for text in [*TEXTS, "No blank here at all."]} == {5}

    def loss():
        with torch.no_grad():
            return float(document_losses(adapter.model, *pad(learned, 2)).mean())

    with adapter.initial():
        before = loss()
    with adapter.applied(records[:1]):
        own = loss()
    with adapter.applied(records[1:]):
        other = loss()
    with adapter.initial():
        assert loss() == before
    assert own < other
    assert own < before - 0.05
