"""What a recipe would take, against what is seen of models of known shape."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_initialization, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from regrad_loaders.training import estimate as estimating
from regrad_loaders.training.estimate import GPUS, Gpu, estimate, saved, sizes
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.recipe import Recipe, Source
from regrad_loaders.training.start import adapted_layers, fresh
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.gradients import document_losses, pad
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.plugin import row_updates

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
RECIPE = Recipe(
    name="eight", base_model="x", space="lora", rank=16, lora_alpha=32, targets=("gate_proj", "up_proj", "down_proj"),
    layers=(16, 31), max_length=512, passage_tokens=512, passages=48, questions_per_passage=1, steps=1000,
    data=(Source(weight=1.0, folder="x"),),
)  # fmt: skip


def test_a_shared_model_takes_its_part_of_the_memory():
    whole, shared = estimate(RECIPE, LLAMA_8B, "h100", 4), estimate(replace(RECIPE, shards=4), LLAMA_8B, "h100", 4)
    of_embeddings = 2 * 2.0 * 128256 * 4096  # bytes of the input's and the head's, which each process has
    assert shared.weights == pytest.approx((whole.weights - of_embeddings) / 4 + of_embeddings, rel=1e-3)
    assert shared.passage_batch > whole.passage_batch
    with pytest.raises(DataError, match="4 shards need --gpus 4"):
        estimate(replace(RECIPE, shards=4), LLAMA_8B, "h100", 2)


@pytest.mark.parametrize("space", ["lora", "core", "tied", "values"])
def test_sizes_are_those_of_the_tensors(space):
    recipe = replace(RECIPE, space=space, basis_rank=4, rank=2, layers=(0, 1))
    model = tiny_model()
    layers = adapted_layers(model, recipe.targets, range(0, 2))
    made = fresh(
        model, BaseModel.of(model, "tiny"), kind=space, targets=recipe.targets, layers=range(0, 2), rank=2,
        basis_rank=4, lora_alpha=4, step_size=1.0, max_length=32,
    )  # fmt: skip
    tensors = [t for m in made.modules.values() for t in (m.lora_a, m.lora_b, m.basis) if t is not None]
    assert sizes(recipe, layers) == (made.space.numel, sum(tensor.numel() for tensor in tensors))


def kept(work):
    """Bytes that autograd saves for the way back, each storage once."""
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    del result
    return sum(seen.values())


def test_what_a_layer_saves_of_a_token_is_what_autograd_saves():
    """Twice as many passages less once as many: the weights, which are saved too, fall out."""
    config = LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
        vocab_size=300, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    made = tiny_initialization(model)
    learner = MetaLearner(model, made, "sum")
    tokens, layers = 96, config.num_hidden_layers - min(made.layers)

    def forward(count):
        zeros = {name: zero.requires_grad_(True) for name, zero in learner.no_change(count).items()}
        with (
            row_updates(learner.model[0], learner.space, zeros),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            return document_losses(learner.model[0], *pad([[5] * tokens] * count, 2, "cpu"))

    first = kept(lambda: forward(8)) - kept(lambda: forward(4))
    assert first / (4 * tokens * layers * 4) == pytest.approx(saved(config, tokens), rel=0.3)
    both = [kept(lambda n=n: learner.atoms([[5] * tokens] * n, create_graph=True)) for n in (8, 4)]
    assert (both[0] - both[1]) / first == pytest.approx(estimating.SECOND, rel=0.3)


def test_the_published_settings_of_8b_need_passage_batches():
    found = estimate(RECIPE, LLAMA_8B, "h100")
    assert found.parameters == pytest.approx(8.03e9, rel=0.01) and found.adapted == 48
    whole = found.of_passage * RECIPE.passages
    assert whole == pytest.approx(326 * 2**30, rel=0.25)  # in one batch
    assert 1 <= found.passage_batch < 48 and found.peak < GPUS["h100"].memory
    assert found.hours == pytest.approx(found.seconds * 1000 / 3600)
    assert estimate(RECIPE, LLAMA_8B, "h100", gpus=8).seconds == found.seconds  # of eight times the episodes
    shared = replace(RECIPE, shards=4, passage_batch=1)
    alone, together = estimate(replace(shared, shards=1), LLAMA_8B, "h100"), estimate(shared, LLAMA_8B, "h100", gpus=8)
    assert together.seconds == pytest.approx(alone.seconds / 4)


def test_a_gpu_that_is_too_small_or_unknown_is_said(monkeypatch):
    monkeypatch.setitem(estimating.GPUS, "toy", Gpu(8e9, 1e12))
    assert not estimate(RECIPE, LLAMA_8B, "toy").fits
    with pytest.raises(DataError, match="h100, a100"):
        estimate(RECIPE, LLAMA_8B, "abacus")


def test_plain_fine_tuning_takes_less():
    plain = estimate(replace(RECIPE, atoms=False), LLAMA_8B, "h100")
    assert plain.flops < estimate(RECIPE, LLAMA_8B, "h100").flops / 3
