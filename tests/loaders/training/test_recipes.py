"""The recipes that ship: each can be read, and those of larger models run on a tiny one of the same names."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.data.sentences import with_sentences
from regrad_loaders.training.mixture import load_sources
from regrad_loaders.training.recipe import Recipe, Source
from regrad_loaders.training.start import adapted_layers
from regrad_loaders.training.trainer import run
from regrad_qdrant import MetaInitialization
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.space import LoraModule
from regrad_qdrant.model.spaces.registry import SPACES

RECIPES = sorted((Path(__file__).parents[3] / "loaders" / "recipes").glob("*.yaml"))
LLAMAS = [path for path in RECIPES if path.name.startswith("llama")]
SHAPES = {  # hidden and MLP sizes, layers; numbers of an atom
    "llama-3.2-1b": (2048, 8192, 16, 3_932_160),
    "llama-3.2-3b": (3072, 8192, 28, 3_784_704),
    "llama-3.1-8b": (4096, 14336, 32, 3_538_944),
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    assert Recipe.load(path).name == path.stem


def test_a_recipe_may_set_answers_against_other_spans(tokenizer, tmp_path):
    path = next(path for path in RECIPES if path.stem == "smollm2-135m-instruct-core")
    recipe = replace(
        Recipe.load(path), start=None, rank=4, basis_rank=4, layers=(1, 2), steps=2, max_length=64, contrast=2,
        data=(Source(1.0, facts={"people": 12, "seed": 5}),), passages=3, passage_tokens=60, checkpoint_every=1,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval().requires_grad_(False)
    run(recipe, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 2 and all(line["contrast"] > 0 for line in steps)
    with pytest.raises(DataError, match="contrast"):
        replace(recipe, contrast=-1)


def test_a_window_holds_what_its_sentence_says(tokenizer):
    world = generate("train", 12, 5)
    source = EpisodeSource(world, with_sentences(world.questions), tokenizer, 24, style="sentence")
    short = {f"{world.name}/{question.id}": question.answers[0] for question in world.questions}
    for seed in range(5):
        episode = source.episode(random.Random(seed), 3, 2, [1])
        for example in episode.examples:
            assert short[example.question_id] in tokenizer.decode(episode.passages[example.rows[0]])


def test_a_source_may_teach_sentences(tokenizer):
    recipe = Recipe.load(next(path for path in RECIPES if path.stem == "smollm2-135m-instruct"))
    data = tuple(Source(0.5, facts={"people": 12, "seed": 5}, style=style) for style in ("short", "sentence"))
    short, sentences = load_sources(replace(recipe, start=None, averaged_with=None, steps=1, data=data), tokenizer)[0]
    for source, instruction, longest in ((short, "a few words", 6), (sentences, "one sentence", 40)):
        episode = source.episode(random.Random(0), 3, 2, [3])
        assert all(instruction in tokenizer.decode(example.prompt_ids) for example in episode.examples)
        said = [tokenizer.decode(example.answer_ids, skip_special_tokens=True) for example in episode.examples]
        assert all(text.endswith(".") == (source is sentences) and len(text.split()) <= longest for text in said)
    with pytest.raises(DataError, match="short, sentence"):
        Source(1.0, folder="x", style="long")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("path", [path for path in LLAMAS if "1b" in path.stem], ids=lambda path: path.stem)
def test_a_llamas_recipe_runs_from_calibration_through_evaluation_and_a_resumed_checkpoint(
    path, dtype, tokenizer, tmp_path
):
    """Its space, layers, codecs, schedule and precision as they are; fewer and shorter passages."""
    recipe = Recipe.load(path)
    recipe = replace(
        recipe, rank=4, basis_rank=min(recipe.basis_rank, 4), data=(Source(1.0, facts={"people": 12, "seed": 5}),),
        passages=3, passage_tokens=48, accumulate=1, steps=3, evaluate_every=2, checkpoint_every=1, max_length=64,
        dev_questions=min(recipe.dev_questions, 3),
    )  # fmt: skip

    def trained(resume=False, dies_after=4):
        torch.manual_seed(0)
        done = []

        def on_step(count):
            done.extend([None] * count)
            if len(done) == dies_after:
                raise Killed

        layers = recipe.layers[1] + 1
        model = LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": layers})).to(dtype).eval()
        model.requires_grad_(False)
        base = BaseModel.of(model, "tiny")
        return run(recipe, model, tokenizer, base, tmp_path / "run", resume=resume, on_step=on_step)

    with pytest.raises(Killed):
        trained(dies_after=3)
    made = trained(resume=True)
    assert made.fingerprint == MetaInitialization.load(tmp_path / "run" / "initialization").fingerprint
    assert made.layers == list(range(recipe.layers[0], recipe.layers[1] + 1))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"calibration"' in lines and lines.count('"evaluation"') == 2 and "NaN" not in lines
    steps = [line["step"] for line in map(json.loads, lines.splitlines()) if line["kind"] == "step"]
    assert steps == [1, 2, 3]
    assert trained(resume=True).fingerprint == made.fingerprint


@pytest.mark.parametrize("path", LLAMAS, ids=lambda path: path.stem)
def test_llamas_recipes_differ_in_their_model_layers_and_rank_alone(path):
    of_1b = next(other for other in LLAMAS if "1b" in other.stem and ("short" in other.stem) == ("short" in path.stem))
    own = ("name", "base_model", "layers", "rank", "lora_alpha")
    recipe, like = Recipe.load(path), Recipe.load(of_1b)
    assert replace(recipe, **{name: getattr(like, name) for name in own}) == like


@pytest.mark.parametrize("path", LLAMAS, ids=lambda path: path.stem)
def test_llamas_recipes_fit_their_models(path):
    """On the meta device: shapes without weights."""
    recipe = Recipe.load(path)
    hidden, mlp, layers, numbers = next(shape for name, shape in SHAPES.items() if path.stem.startswith(name))
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=128_256)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    chosen = adapted_layers(model, recipe.targets, range(recipe.layers[0], recipe.layers[1] + 1))
    assert len(chosen) == 3 * (recipe.layers[1] - recipe.layers[0] + 1) and recipe.layers[1] == layers - 1
    modules = {
        module: LoraModule(
            torch.empty(recipe.rank, linear.in_features, device="meta"),
            torch.empty(linear.out_features, recipe.rank, device="meta"),
            recipe.lora_alpha / recipe.rank,
        )
        for module, linear in chosen.items()
    }
    assert SPACES[recipe.space](modules).numel == numbers and recipe.lora_alpha == 2 * recipe.rank


def test_a_recipe_for_any_model_takes_its_upper_half(tmp_path):
    both = {path.stem: Recipe.load(path) for path in RECIPES if path.stem in ("lora", "core")}
    made = {stage: recipe.of_model("/models/Tiny-1B-Instruct") for stage, recipe in both.items()}
    assert (made["lora"].name, made["core"].name) == ("tiny-1b-instruct-lora", "tiny-1b-instruct-core")
    assert made["core"].start == "runs/tiny-1b-instruct-lora/initialization"
    config = LlamaConfig(**TINY | {"num_hidden_layers": 10})
    assert {recipe.fitted_to(config).layers for recipe in made.values()} == {(5, 9)}
    assert replace(made["lora"], layers=(2, 3)).fitted_to(config).layers == (2, 3)
    with pytest.raises(DataError, match="or upper"):
        replace(made["lora"], layers="lower")
