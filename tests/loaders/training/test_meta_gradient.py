"""The meta-gradient in parts is the whole one, at the memory of one part."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import tiny_initialization, tiny_model
from test_meta_train import RECIPE, trainer

from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.training import meta_gradient
from regrad_loaders.training.estimate import fitting_passages, graph_of_passage
from regrad_loaders.training.meta_gradient import backward
from regrad_loaders.training.meta_learner import MetaLearner


@pytest.fixture
def episode(tokenizer):
    world = generate("train", 12, 1)
    source = EpisodeSource(world, world.questions, tokenizer, passage_tokens=30)
    return source.episode(random.Random(3), 5, 2, [1, 3])


@pytest.fixture
def learner():
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model), "softmax").double()
    learner.model[0].double()
    return learner


def gradients(learner):
    found = [None if p.grad is None else p.grad.clone() for p in learner.parameters()]
    learner.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("codec", ["fp32", "sign"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("passage_batch", [None, 1, 2, 9])
def test_it_is_that_of_the_objective(learner, episode, monkeypatch, codec, order, passage_batch):
    monkeypatch.setattr("regrad_loaders.training.meta_learner.BATCH_TOKENS", 150)  # several groups of questions
    losses, exact = learner.objective(episode, codec, order)
    losses.mean().backward()
    expected = gradients(learner)
    found = backward(learner, episode, codec=codec, order=order, passage_batch=passage_batch)
    torch.testing.assert_close(found.losses, losses.detach())
    torch.testing.assert_close(found.exact, exact)
    for one, other in zip(gradients(learner), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_contrast_beside_the_answers_and_a_scale_count_too(learner, episode):
    def contrast(rows):
        return torch.stack([row.square().sum() for row in rows.values()])

    rows = learner.episode_updates(episode, "fp32", 2)
    losses, _ = learner.answer_losses(episode.examples, rows)
    (0.5 * (losses.mean() + 0.1 * contrast(rows).mean())).backward()
    expected = gradients(learner)
    found = backward(learner, episode, passage_batch=2, scale=0.5, contrast=contrast, contrast_weight=0.1)
    assert found.contrast == pytest.approx(float(contrast(rows).detach().mean()))
    for one, other in zip(gradients(learner), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_without_atoms_it_is_plain_fine_tuning(learner, episode):
    losses, _ = learner.answer_losses(episode.examples, None)
    losses.mean().backward()
    expected = gradients(learner)
    backward(learner, episode, atoms=False)
    for one, other in zip(gradients(learner), expected, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other)


def test_no_more_than_one_part_has_a_graph_at_a_time(learner, episode, monkeypatch):
    """What is kept for the way back, in numbers, at its most."""
    kept, most = 0, 0

    class Token:
        def __init__(self, tensor):
            nonlocal kept, most
            self.tensor = tensor
            kept += tensor.numel()
            most = max(most, kept)

        def __del__(self):
            nonlocal kept
            kept -= self.tensor.numel()

    peaks = {}
    monkeypatch.setattr("regrad_loaders.training.meta_learner.BATCH_TOKENS", 60)
    for size in (1, None):
        kept = most = 0
        with torch.autograd.graph.saved_tensors_hooks(Token, lambda token: token.tensor):
            meta_gradient.backward(learner, episode, passage_batch=size)
        peaks[size] = most
    assert peaks[1] < 0.4 * peaks[None]


def test_passages_go_through_in_parts_where_memory_is_short(tokenizer, tmp_path, monkeypatch):
    whole = trainer(tokenizer, tmp_path / "whole")
    assert whole.passage_batch is None
    config = whole.learner.model[0].config
    of_one = graph_of_passage(RECIPE, config, wide=True)
    monkeypatch.setattr("regrad_loaders.training.trainer.available_bytes", lambda: 4.1 * of_one)
    short = trainer(tokenizer, tmp_path / "short")
    assert short.passage_batch == 2
    assert trainer(tokenizer, tmp_path / "own", replace(RECIPE, passage_batch=1)).passage_batch == 1
    assert fitting_passages(RECIPE, config, 0.0) == 1
    found = [run.train_step() for run in (whole, short)]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-4)
