"""A recipe's mixture of data: one source of episodes a data set."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrad_loaders.data.augmented import read_augmented
from regrad_loaders.data.cloze import cloze_questions
from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Dataset, Question, read_folder
from regrad_loaders.data.hub import read_hub
from regrad_loaders.data.sentences import with_sentences
from regrad_loaders.training.recipe import Recipe, Source
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.prompts import PromptFormat, Style


def prompt_of(recipe: Recipe) -> PromptFormat:
    """The prompt that the recipe trains with: its own, that of what it starts from, or the default."""
    if recipe.prompt is not None:
        format = PromptFormat.load(Path(recipe.prompt))
    else:
        format = PromptFormat() if recipe.start is None else MetaInitialization.load(recipe.start).prompt
    return format if recipe.target_end is None else replace(format, end=recipe.target_end)


def load_sources(recipe: Recipe, tokenizer: Any) -> tuple[list[EpisodeSource], list[float]]:
    """The recipe's mixture: one episode source a data set, and the weights to draw them with."""
    sources, format = [], prompt_of(recipe)
    for source in recipe.data:
        dataset = _dataset(recipe, source)
        questions = _of_types(dataset.split(source.split), source)
        if not questions:
            raise DataError(f"{dataset.name}: no question of split {source.split!r} and types {source.types or 'any'}")
        if source.style == "sentence" and not (questions := with_sentences(questions)):
            raise DataError(f"{dataset.name}: no question can be answered with a sentence")
        if source.cloze:
            questions += cloze_questions(dataset, questions, source.cloze, recipe.seed)
        sources.append(_episodes(recipe, dataset, questions, tokenizer, format, source.style))
    return sources, [source.weight for source in recipe.data]


def load_dev_sources(recipe: Recipe, tokenizer: Any) -> list[EpisodeSource]:
    """Sources of dev questions, to evaluate on: of each set that has any (a split `dev` or `validation`), and invented
    people that training has not met. None where the recipe wants none.

    Raises:
        DataError: where the recipe wants some, and no set has any.
    """
    sources: list[EpisodeSource] = []
    if not recipe.dev_questions:
        return sources
    rng, format = random.Random(recipe.seed + 4), prompt_of(recipe)
    for source in recipe.data:
        if (dataset := _dev_dataset(recipe, source)) is None:
            continue
        of_dev = _of_types(dataset.split("dev", "validation"), source)
        questions = [question for question in of_dev if question.gold_ids or recipe.retrieved]
        if source.style == "sentence":
            questions = with_sentences(questions)
        if questions:
            chosen = rng.sample(questions, min(recipe.dev_questions, len(questions)))
            sources.append(_episodes(recipe, dataset, chosen, tokenizer, format, source.style))
    if not sources:
        raise DataError("dev_questions: no set of the recipe has questions of a split dev or validation to evaluate on")
    return sources


def _episodes(
    recipe: Recipe, dataset: Dataset, questions: list[Question], tokenizer: Any, format: PromptFormat, style: Style
) -> EpisodeSource:
    return EpisodeSource(
        dataset,
        questions,
        tokenizer,
        min(recipe.passage_tokens, recipe.max_length) if recipe.atoms else recipe.passage_tokens,
        recipe.passages_in_prompt,
        format,
        style,
        retrieved=recipe.retrieved,
        label=recipe.passage_label,
        first_answer=recipe.answers == "first",
    )


def _dataset(recipe: Recipe, source: Source) -> Dataset:
    if source.facts is not None:
        return generate("train", **source.facts)
    if source.hub is not None:
        return read_hub(source.hub, source.split, source.fields, source.config)
    if source.data_aug is not None:
        return read_augmented(Path(recipe.data_dir) / source.data_aug, source.split)
    return read_folder(Path(recipe.data_dir) / str(source.folder))


def _dev_dataset(recipe: Recipe, source: Source) -> Dataset | None:
    """Where a source's dev questions are; None for a set of the Hub that has no such split."""
    if source.facts is not None:
        return generate("demo", 60, recipe.seed)
    if source.hub is None:
        return _dataset(recipe, source)
    try:
        return read_hub(source.hub, "validation", source.fields, source.config)
    except DataError:
        return None


def _of_types(questions: list[Question], source: Source) -> list[Question]:
    return [question for question in questions if not source.types or question.type in source.types]
