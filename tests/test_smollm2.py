"""The real model, the real engine and the shipped meta-initialization."""

import pytest
import torch
from conftest import state_of

from regrad_loaders.data.facts import generate
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_qdrant import GradientBank, MetaInitialization, ReGrad, load_base_model
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.cli.options import DEFAULT_INIT
from regrad_qdrant.model.plugin import lora_layers, lora_weight


@pytest.fixture(scope="module")
def initialization():
    return MetaInitialization.load(DEFAULT_INIT)


@pytest.fixture(scope="module")
def world():
    return generate("demo", 14, 5, questions_per_person=1)


@pytest.fixture(scope="module")
def regrad(initialization, tmp_path_factory, world):
    model, tokenizer = load_base_model(initialization.base.name)
    with GradientBank.open(tmp_path_factory.mktemp("bank"), "people", initialization.fingerprint) as bank:
        regrad = ReGrad(model, tokenizer, bank, initialization)
        add_corpus(bank, world.passages, regrad.gradients)
        attach_atoms(bank, regrad.gradients, DEFAULT_CODEC)
        yield regrad


def test_the_initialization_says_what_made_it(initialization):
    assert {"recipe", "steps", "questions_seen", "scores"} <= set(initialization.card)
    assert initialization.card["recipe"]["seed"] is not None
    assert all(source["split"] == "train" for source in initialization.card["recipe"]["data"])


def test_an_atom_takes_what_the_readme_says(regrad):
    assert 7_500 < regrad.bank.status().bytes_median < 7_900


@pytest.mark.parametrize("name", ["smollm2-135m-instruct-icl", "smollm2-135m-instruct-small"])
def test_the_other_shipped_ones_are_of_the_same_model(regrad, name):
    other = MetaInitialization.load(name)
    other.check_model(regrad.adapter.model.get_base_model())
    assert {"recipe", "steps", "questions_seen", "scores"} <= set(other.card)


def one_at_a_time(gradients, document):
    """The cores of one document by plain autograd on B, in the order of the space's modules.

    The loss is taken in float64: PyTorch's float32 cross-entropy on a CPU is itself off by up to 1e-4 in a tensor.
    """
    layers = lora_layers(gradients.model)  # inside the plug-in's block
    weights = {name: lora_weight(layers[name], "lora_B").requires_grad_(True) for name in gradients.space.modules}
    ids = torch.tensor([document.ids])
    logits = gradients.model(input_ids=ids).logits[0, :-1].double()
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 1:]), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return [m.basis.to(g).T @ g for m, g in zip(gradients.space.modules.values(), grads, strict=True)]


def test_batched_atoms_equal_one_document_autograd(regrad, world):
    gradients = regrad.gradients
    texts = [world.passages[0].text, world.passages[1].text[:60], " ".join(p.text for p in world.passages[:3])]
    documents = [gradients.encode(text) for text in texts]
    atoms = gradients.space.unflatten(gradients.atoms(documents))
    for row, document in enumerate(documents):
        with regrad.adapter.initial():
            one = one_at_a_time(gradients, document)
        for name, expected in zip(gradients.space.modules, one, strict=True):
            found = atoms[f"{name}.core"][row]
            assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) >= 0.9999
            assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_retrieved_gradients_answer_what_the_model_can_not_know(regrad, world):
    before = _digest(regrad)
    result = evaluate(regrad, world.questions, ["direct", "regrad", "random"], top_k=3)
    assert result.f1_of("regrad") >= result.f1_of("direct") + 0.4
    assert result.f1_of("regrad") >= result.f1_of("random") + 0.3
    assert _digest(regrad) == before
    prompts = {row["mode"]: row["prompt_tokens"] for row in result.results()}
    assert prompts["regrad"] == prompts["direct"]  # nothing of the documents is in the prompt


def _digest(regrad):
    return state_of(regrad.adapter)
