"""The settings that the paper's runs had, as options of a recipe."""

import random
from dataclasses import replace

import pytest
import torch
from test_meta_train import RECIPE, trainer

from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.training import meta_learner, written
from regrad_loaders.training.recipe import Recipe
from regrad_loaders.training.trainer import run
from regrad_loaders.training.written import mean_f1
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.prompts import PromptFormat

YAML = """
name: published
base_model: tiny
space: lora
rank: 4
lora_alpha: 8
targets: [gate_proj, up_proj, down_proj]
layers: [1, 2]
step_size: {kind: raw, initial: 0.01}
data: [{facts: {people: 12, seed: 1}, weight: 1}]
passages: retrieved
passage_label: true
answers: first
target_end: "\\n"
top_k: [3]
passage_tokens: 48
steps: 2
warmup: 10
weight_decay: 0.01
optimizer: {beta2: 0.999, warmup_from: 0.01}
dev_questions: 4
evaluate_every: 1
select_by: f1
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "published.yaml").write_text(YAML)
    return Recipe.load(tmp_path / "published.yaml")


def test_raw_step_sizes_are_learned_as_they_are_and_may_change_their_sign(tokenizer, tmp_path, recipe):
    run_of = trainer(tokenizer, tmp_path, replace(recipe, learning_rate=0.5, warmup=0))
    learner = run_of.learner
    assert torch.equal(learner.step_size.detach(), torch.full_like(learner.step_size, 0.01))
    groups = run_of.optimizer.param_groups
    assert [group["lr"] for group in groups[:2]] == [0.5, 0.5]
    assert all(group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0.01 for group in groups)
    run_of.train_step()
    made = run_of.made()
    assert min(made.step_sizes.values()) < 0 < max(made.step_sizes.values())
    assert made.prompt.end == "\n"


def test_warm_up_begins_at_a_hundredth(tokenizer, tmp_path, recipe):
    run_of = trainer(tokenizer, tmp_path, replace(recipe, steps=100))
    assert [run_of._decay(step) for step in (0, 5, 10)] == pytest.approx([0.01, 0.505, 1.0])
    assert trainer(tokenizer, tmp_path, RECIPE)._decay(0) == 0.5  # the default begins with one part of it


def test_an_episode_is_one_question_with_what_was_retrieved(tokenizer):
    world = generate("train", 30, 1)
    source = EpisodeSource(
        world, world.questions, tokenizer, 48, format=PromptFormat(end="\n"), retrieved=True, label=True,
        first_answer=True,
    )  # fmt: skip
    golds, starts = 0, tokenizer("Passage 1: ").input_ids[:2]
    for episode in source.each(3):
        assert len(episode.passages) <= 3
        assert len(episode.examples) == 1
        assert episode.passages[0][:2] == starts
        [example] = episode.examples
        assert example.rows == list(range(len(episode.passages)))
        assert example.scores == sorted(example.scores, reverse=True)
        assert tokenizer.decode(example.answer_ids) == f"{example.answers[0]}\n"
        golds += 1
    assert golds == len(world.questions)
    assert source.episode(random.Random(0), 3, 1, [2]).examples


def test_the_best_is_what_writes_the_best_answers(tokenizer, tmp_path, recipe):
    run_of = trainer(tokenizer, tmp_path, recipe)
    [found] = run_of.evaluate().values()
    assert 0 <= found["f1"] <= 1
    assert run_of.is_better({"set": found | {"f1": 0.2, "loss": 9.0}})
    assert not run_of.is_better({"set": found | {"f1": 0.1, "loss": 1.0}})
    assert run_of.waited == 1
    model = run_of.learner.model[0].unload()
    made = run(recipe, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path / "run")
    assert made.card["recipe"]["optimizer"]["beta2"] == 0.999


def test_an_update_of_nothing_changes_no_written_answer(tokenizer, tmp_path):
    run_of = trainer(tokenizer, tmp_path)
    episode = run_of._draw(random.Random(0))
    with torch.no_grad():
        rows = run_of.learner.updates(episode.examples, run_of.learner.no_change(len(episode.passages)))
    source = run_of.sources[0]
    alone = mean_f1(run_of.learner, episode.examples, None, tokenizer, source.format)
    assert mean_f1(run_of.learner, episode.examples, rows, tokenizer, source.format) == alone


def test_what_is_written_in_several_batches_is_what_is_written_in_one(tokenizer, tmp_path, monkeypatch):
    run_of = trainer(tokenizer, tmp_path, replace(RECIPE, retrieved=False, passage_label=False))
    episode = run_of._draw(random.Random(0))
    torch.manual_seed(0)
    none = run_of.learner.no_change(len(episode.examples))
    rows = {name: torch.randn_like(change) for name, change in none.items()}
    said = []
    monkeypatch.setattr(written, "f1", lambda text, answers: said.append((text, answers)) or 0.5)
    for size in (10_000, 1):
        monkeypatch.setattr(meta_learner, "BATCH_TOKENS", size)
        assert mean_f1(run_of.learner, episode.examples, rows, tokenizer, PromptFormat()) == 0.5
    count = len(episode.examples)
    assert count > 2 and len(said) == 2 * count and sorted(said[:count]) == sorted(said[count:])
    assert len({text for text, _ in said}) > 1


@pytest.mark.parametrize(
    "wrong", [{"step_size_kind": "square"}, {"select_by": "f1"}, {"answers": "last"}, {"averaged_share": 2.0}]
)
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        replace(RECIPE, **wrong)
    with pytest.raises(DataError, match="beta2"):
        replace(RECIPE, optimizer={"beta2": 1.5})
