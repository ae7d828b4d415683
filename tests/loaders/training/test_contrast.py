"""The contrast of an answer with other spans of its passages."""

import random

import pytest
import torch
from conftest import tiny_initialization, tiny_model

from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.training import contrast
from regrad_loaders.training.contrast import NEGATIVES, SAME, TEMPERATURE, SpanContrast, alike
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant.answer.grounding import candidates


@pytest.fixture
def learner():
    model = tiny_model()
    return MetaLearner(model, tiny_initialization(model), "margin")


@pytest.fixture
def episode(tokenizer):
    world = generate("train", 8, 1)
    return EpisodeSource(world, world.questions, tokenizer, 60).episode(random.Random(0), 3, 3, [2])


def test_it_is_the_softmax_over_the_answer_and_what_a_search_finds(learner, episode, tokenizer, monkeypatch):
    met = []
    monkeypatch.setattr(contrast, "candidates", lambda *args: met.append(candidates(*args)) or met[-1])
    of_all = SpanContrast(tokenizer, len(episode.examples))
    rows = learner.episode_updates(episode, "fp32", 2)
    found = of_all.losses(learner, episode, rows, random.Random(1))
    assert 0 < len(found) <= len(episode.examples) and bool((found > 0).all())

    drawn = random.Random(1).sample(range(len(episode.examples)), len(episode.examples))
    [searched] = met
    place = 0
    for i, of_one in zip(drawn, searched, strict=True):
        example = episode.examples[i]
        spans = of_all._spans(episode, example)
        tokens = example.answer_ids[: example.answer_size]
        walk = spans.beginning
        for token in tokens:
            walk = spans.step(walk, token)
        others = [one for one in of_one if alike(spans.said(one.span), example.answers) < SAME]
        said = [spans.said(one.span) for one in others]
        others = [one for n, one in enumerate(others) if said[n] not in said[:n]][:NEGATIVES]
        weights = [contrast.log_weight(walk.relevance), *(one.log_weight for one in others)]
        end = example.answer_ids[example.answer_size :]
        one_row = {name: tensor[i : i + 1] for name, tensor in rows.items()}
        scores = [
            weight - learner.answer_losses([replace_answer(example, [*ids, *end])], one_row)[0]
            for weight, ids in zip(weights, [tokens, *(one.tokens for one in others)], strict=True)
        ]
        expected = -torch.stack(scores).squeeze(1).div(TEMPERATURE).log_softmax(0)[0]
        torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-5)
        place += 1
    assert place == len(found)


def replace_answer(example, answer_ids):
    from dataclasses import replace

    return replace(example, answer_ids=answer_ids)


def test_steps_lower_it_through_the_atoms(learner, episode, tokenizer):
    of_all = SpanContrast(tokenizer, 4)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        rows = learner.episode_updates(episode, "sign", 2)
        loss = of_all.losses(learner, episode, rows, random.Random(1)).mean()
        loss.backward()
        assert float(learner.step_size.grad.abs().max()) > 0
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_span_that_is_nearly_the_answer_is_like_it():
    assert alike("the Philadelphia Eagles", ["Philadelphia Eagles", "Patriots"]) == 0.8
    assert alike("February", ["February 14, 2015"]) == 0.5
    assert alike("—", ["x"]) == 0


def test_answers_that_are_no_span_are_left_out(learner, episode, tokenizer):
    for example in episode.examples:
        object.__setattr__(example, "answer_ids", [*tokenizer("zzz").input_ids, *example.answer_ids[-1:]])
        object.__setattr__(example, "answer_size", len(example.answer_ids) - 1)
    assert len(SpanContrast(tokenizer, 4).losses(learner, episode, None, random.Random(0))) == 0


def test_a_fine_tuned_reader_is_contrasted_without_atoms(learner, episode, tokenizer):
    losses = SpanContrast(tokenizer, 2).losses(learner, episode, None, random.Random(0))
    assert len(losses) == 2 and losses.requires_grad
