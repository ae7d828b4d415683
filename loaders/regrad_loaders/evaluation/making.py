"""The initializations of baselines that are made on the spot, from the corpus that is asked about."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import mean, median
from typing import Any

from torch import nn

from regrad_loaders.baselines.comprehension import comprehension_text
from regrad_loaders.baselines.continued import EPOCHS, continued
from regrad_loaders.baselines.key_values import KeyValueReader
from regrad_loaders.baselines.parametric import DocumentAdapters, without_steps
from regrad_loaders.baselines.shortened import ShortenedReader
from regrad_loaders.data.episodes import bm25_hits
from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.plan import Party, own_value
from regrad_loaders.evaluation.results import Stored
from regrad_loaders.training.narrow import values_of
from regrad_loaders.training.start import fresh_like, raw_initialization
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.bank.layouts import value_at
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.initialization import MetaInitialization

CALIBRATED_ON = 8  # passages that the step size of `raw` is chosen on
FOUND = 3  # passages for each question, that continued pre-training learns

# A block with a progress bar, from its title and how far it goes, that yields what advances it.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Answerer = ReGrad | KeyValueReader | ShortenedReader


def initialization_of(
    party: Party,
    like: MetaInitialization,
    model: nn.Module,
    tokenizer: Any,
    passages: Sequence[Passage] | None,
    questions: Sequence[Question],
    filter_field: str | None,
    progress: Progress,
) -> MetaInitialization:
    """What a party answers with: the initialization of its folder, or what is made of it.

    Args:
        like: that of --init, whose layers and ranks fresh tensors have.
        model: the plain base model; it is plain again afterwards.
        passages: of the corpus.
        questions: that will be asked.
        filter_field: restricts what is found for each question to passages with its own value of this field.
        progress: shows how far the training is.

    Raises:
        DataError: for something that is made of the corpus, without one.
        WrongModelError: for a folder of another model.
    """
    if party.made is None or party.starts:
        start = MetaInitialization.load(party.init)
        start.check_model(model)
    if party.made is None:
        return start
    name = next(iter(party.modes.values()))
    if party.made == "prag":
        if not party.starts:
            start = fresh_like(model, like, "values")
        return without_steps(values_of(start, list(start.modules)) if start.kind == "lora" else start)
    if passages is None:
        raise DataError(f"the mode {name} learns from the corpus: give --corpus")
    if party.made == "raw":
        ids = [tokenizer(passage.text).input_ids[: like.max_length] for passage in passages[:CALIBRATED_ON]]
        return raw_initialization(model, like, ids)
    if not party.starts:
        start = fresh_like(model, like, "lora")
    chosen = injected(passages, questions, filter_field)
    texts = [comprehension_text(one) if party.made == "instruction-cpt" else one.text for one in chosen]
    with progress(f"Training {name}", EPOCHS * len(texts)) as advance:
        return continued(model, tokenizer, start, texts, on_step=advance)


def injected(
    passages: Sequence[Passage], questions: Sequence[Question], filter_field: str | None = None
) -> list[Passage]:
    """What continued pre-training learns: what BM25 finds for the questions (the paper's section 5.3), of each among
    the passages with its own value of the field. More documents make it drift (`regrad-qdrant bench drift`)."""
    asked: dict[Any, list[str]] = defaultdict(list)
    for question in questions:
        asked[None if filter_field is None else own_value(question, filter_field)].append(question.question)
    wanted: set[str] = set()
    for value, texts in asked.items():
        of_value = {
            p.id: p.text for p in passages if filter_field is None or value_at(p.payload, filter_field) == value
        }
        wanted.update(key for hits in bm25_hits(of_value, texts, FOUND) for key in hits)
    return [passage for passage in passages if passage.id in wanted]


def answerer_of(party: Party, regrad: ReGrad, progress: Progress) -> Answerer:
    """What answers a party's questions, with what it reads in place of passages or of gradients."""
    if party.made == "prag":
        shown = functools.partial(progress, "Training adapters")
        regrad.filling.gradients = DocumentAdapters(
            regrad.adapter, regrad.tokenizer, regrad.asking.format, progress=shown
        )
    if party.reads == "key values":
        return KeyValueReader(regrad)
    return regrad if party.reads is None else ShortenedReader(regrad, party.reads)


def stored_of(answerer: Answerer) -> Stored | None:
    """What a baseline keeps of each document in place of an atom; None for one that keeps none."""
    if isinstance(answerer, KeyValueReader) and answerer.seconds:
        return Stored(len(answerer.sizes), int(median(answerer.sizes)), mean(answerer.seconds))
    if isinstance(answerer, ReGrad) and isinstance(answerer.filling.gradients, DocumentAdapters):
        adapters = answerer.filling.gradients
        size = answerer.bank.status().bytes_median
        return Stored(len(adapters.seconds), int(size or 0), mean(adapters.seconds)) if adapters.seconds else None
    return None
