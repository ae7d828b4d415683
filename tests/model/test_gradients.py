import pytest
import torch
from conftest import tiny_initialization

from regrad_qdrant.errors import DataError
from regrad_qdrant.model.gradients import GradientComputer, batches
from regrad_qdrant.model.plugin import live_space, lora_layers, lora_weight, plug_in, row_updates

TEXTS = [
    "Ida works as a baker.",
    "The employer of Noor is Amber Mills, and Noor is learning Welsh in the evenings.",
    "a b",
    "Galen enjoys chess. Galen has a duck named Waffle. Nothing tastes better to Galen than plum cake.",
]


def computer(model, tokenizer, kind):
    initialization = tiny_initialization(model, kind)
    peft_model = plug_in(model, initialization)
    space = live_space(peft_model, initialization)
    return GradientComputer(peft_model, tokenizer, space, initialization.max_length)


def one_at_a_time(gradients, document):
    """The atom of one document by plain autograd on the LoRA tensors."""
    layers = lora_layers(gradients.model)
    weights = {f"{n}.{p}": lora_weight(layers[n], p) for n in gradients.space.modules for p in ("lora_A", "lora_B")}
    for weight in weights.values():
        weight.requires_grad_(True)
    ids = torch.tensor([document.ids])
    gradients.model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    if gradients.space.kind == "lora":
        return grads
    atom = {}
    for name, module in gradients.space.modules.items():
        [tensor] = gradients.space.tensors(name, module)
        of_b = grads[f"{name}.lora_B"]
        gradients.space.accumulate(atom, {tensor: of_b.T if module.basis is None else module.basis.T @ of_b})
    return atom


def test_batched_atoms_equal_one_document_autograd(model, tokenizer, kind):
    gradients = computer(model, tokenizer, kind)
    documents = [gradients.encode(text) for text in TEXTS]
    assert len({len(document.ids) for document in documents}) == len(TEXTS)
    atoms = gradients.space.unflatten(gradients.atoms(documents))
    for row, document in enumerate(documents):
        for name, expected in one_at_a_time(gradients, document).items():
            found = atoms[name][row]
            assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) >= 0.9999
            assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_an_atom_is_the_gradient_of_a_row_update(model, tokenizer, kind):
    """Meta-training takes atoms from a zero change of every row: the same numbers as ingestion's."""
    from regrad_qdrant.model.gradients import document_losses, pad

    gradients = computer(model, tokenizer, kind)
    documents = [gradients.encode(text) for text in TEXTS]
    zeros = {
        name: torch.zeros(len(TEXTS), *shape, requires_grad=True) for name, shape in gradients.space.shapes.items()
    }
    with row_updates(gradients.model, gradients.space, zeros):
        losses = document_losses(gradients.model, *pad([document.ids for document in documents], 2))
    grads = dict(zip(zeros, torch.autograd.grad(losses.sum(), list(zeros.values())), strict=True))
    torch.testing.assert_close(gradients.space.flatten(grads), gradients.atoms(documents), rtol=1e-4, atol=1e-6)


def test_computing_atoms_leaves_no_trace_in_the_model(model, tokenizer):
    gradients = computer(model, tokenizer, "core")
    with torch.no_grad():
        gradients.atoms([gradients.encode(TEXTS[0])])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in gradients.model.parameters())
    assert not any(layer._forward_hooks for layer in lora_layers(gradients.model).values())


def test_a_document_of_one_token_is_refused(model, tokenizer):
    gradients = computer(model, tokenizer, "core")
    with pytest.raises(DataError, match="has 1 token"):
        gradients.encode("a")
    with pytest.raises(DataError, match="has 0 token"):
        gradients.encode("")


def test_a_long_document_is_cut_and_says_so(model, tokenizer):
    gradients = computer(model, tokenizer, "core")
    document = gradients.encode("Ida works as a baker. " * 50)
    assert document.truncated and len(document.ids) == gradients.max_length
    assert not gradients.encode(TEXTS[0]).truncated


def test_batches_hold_every_document_once_within_their_bound():
    lengths = [5, 100, 7, 7, 300, 50, 2]
    found = list(batches(lengths, 120))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 120
