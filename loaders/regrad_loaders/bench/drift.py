"""What happens as more and more documents are taught (the paper's Table 2): continued pre-training writes them into the
weights, which drift; a Gradient Bank only grows. And what the paper lacks: what the model forgets of all else.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrad_loaders.baselines.continued import continued
from regrad_loaders.data.episodes import bm25_hits
from regrad_loaders.data.folders import Question
from regrad_loaders.data.scores import Interval, bootstrap, f1
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_loaders.evaluation.plots import new_figure
from regrad_qdrant.answer.generation import Asking, generate
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.bank.documents import Document
from regrad_qdrant.bank.stores.opening import open_store
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.gradients import batches, document_losses, pad
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.plugin import plug_in
from regrad_qdrant.model.prompts import Prompt

TOP_K = 3
BATCH_TOKENS = 2048
MAX_TOKENS = 256  # of a held-out text


@dataclass(frozen=True)
class Row:
    """One way to teach so many documents."""

    way: str  # cpt or regrad
    documents: int
    f1: Interval  # of the questions about them, 0 to 1
    unchanged: float  # F1 between the answers to other questions before any document and now
    perplexity: float  # of held-out texts


@dataclass(frozen=True)
class Kept:
    """What should stay as it was."""

    questions: Sequence[str]  # of other sets
    texts: Sequence[str]


def study(
    model: nn.Module,
    tokenizer: Any,
    initialization: MetaInitialization,
    start: MetaInitialization,
    corpus: Sequence[Passage],
    questions: Sequence[Question],
    kept: Kept,
    sizes: Sequence[int],
    on_size: Callable[[int], None] = lambda _: None,
    *,
    epochs: int = 3,
) -> list[Row]:
    """Teach the documents that the questions find, then others at random, in steps of these sizes; first at least those
    that the questions find.

    Args:
        initialization: ReGrad's.
        start: what continued pre-training begins with, such as the fine-tuned `ft-direct`.
        corpus: at least the largest size of passages.

    Returns:
        First a row of `start` as it is, with no document; then two of each size. What `regrad` keeps is measured on
        `start` again, after the answers from the bank: their gradients are taken back.

    Raises:
        DataError: where there are no other questions or texts to keep.
    """
    if not kept.questions or not kept.texts:
        raise DataError("what should stay as it was has no open question, or no text: choose another set (--other)")
    ordered, found = _ordered(corpus, [question.question for question in questions])
    sizes = sorted({max(size, found) for size in sizes})
    learned, (before, perplexity) = start, _kept(model, tokenizer, start, kept)
    untaught = _f1(model, tokenizer, start, ordered[: sizes[0]], questions, "init")
    rows = [Row("cpt", 0, untaught, 1.0, perplexity)]
    for done, size in zip([0, *sizes], sizes, strict=False):
        texts = [passage.text for passage in ordered[done:size]]
        learned = continued(model, tokenizer, learned, texts, epochs=epochs, seed=size)
        said, perplexity = _kept(model, tokenizer, learned, kept)
        own = _f1(model, tokenizer, learned, ordered[:size], questions, "init")
        rows.append(Row("cpt", size, own, _same(before, said), perplexity))
        theirs = _f1(model, tokenizer, initialization, ordered[:size], questions, "regrad")
        said, perplexity = _kept(model, tokenizer, start, kept)  # the weights are as they were
        rows.append(Row("regrad", size, theirs, _same(before, said), perplexity))
        on_size(1)
    return rows


def _ordered(corpus: Sequence[Passage], questions: Sequence[str]) -> tuple[list[Passage], int]:
    """What the questions find, then the others at random; and how many the questions find."""
    passages = {passage.id: passage for passage in corpus}
    hits = bm25_hits({key: passage.text for key, passage in passages.items()}, questions, TOP_K)
    found = dict.fromkeys(key for of_one in hits for key in of_one)
    others = [key for key in passages if key not in found]
    random.Random(0).shuffle(others)
    return [passages[key] for key in [*found, *others]], len(found)


def _f1(
    model: nn.Module,
    tokenizer: Any,
    initialization: MetaInitialization,
    passages: Sequence[Passage],
    questions: Sequence[Question],
    mode: str,
) -> Interval:
    """Of the questions over a bank of these passages."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store("docs", path=Path(folder))
        with GradientBank(store, "docs", initialization.fingerprint) as bank:
            bank.create()
            bank.add(Document(passage.id, passage.payload) for passage in passages)
            with ReGrad(model, tokenizer, bank, initialization, on_missing="compute", check_model=False) as regrad:
                found = evaluate(regrad, questions, [mode], top_k=TOP_K, batch=8)
    return bootstrap([prediction.f1 for prediction in found.predictions])


def _kept(model: nn.Module, tokenizer: Any, initialization: MetaInitialization, kept: Kept) -> tuple[list[str], float]:
    """What the model with these tensors answers to the other questions, and the perplexity of the held-out texts."""
    peft_model = plug_in(model, initialization)
    try:
        prompts = [Prompt(question) for question in kept.questions]
        said = generate(peft_model, tokenizer, prompts, Asking(initialization.prompt))
        encoded = [tokenizer(text, verbose=False).input_ids[:MAX_TOKENS] for text in kept.texts]
        documents = [ids for ids in encoded if len(ids) > 1]  # one token has no loss
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for batch in batches([len(ids) for ids in documents], BATCH_TOKENS):
                ids, mask = pad([documents[i] for i in batch], tokenizer.pad_token_id or 0, input_device(model))
                losses = document_losses(peft_model, ids, mask)
                counts = losses.new_tensor([len(documents[i]) - 1 for i in batch])
                total += float((losses * counts).sum())
                tokens += int(counts.sum())
    finally:
        peft_model.unload()
    return [one.text for one in said], float(torch.tensor(total / tokens).exp())


def _same(before: Sequence[str], now: Sequence[str]) -> float:
    return sum(f1(text, [was]) for was, text in zip(before, now, strict=True)) / len(before)


def plot(rows: Sequence[Row], path: Path) -> None:
    """F1, unchanged answers and perplexity against the number of documents."""
    figure = new_figure(10, 3.2)
    panels = figure.subplots(1, 3)
    for way in ("cpt", "regrad"):
        own = [row for row in rows if row.way == way]
        documents = [row.documents for row in own]
        panels[0].plot(documents, [100 * row.f1.mean for row in own], marker="o", label=way)
        panels[1].plot(documents, [100 * row.unchanged for row in own], marker="o", label=way)
        panels[2].plot(documents, [row.perplexity for row in own], marker="o", label=way)
    for panel, title in zip(panels, ("F1", "other answers, unchanged (F1)", "perplexity of other text"), strict=True):
        panel.set(title=title, xlabel="documents taught", xlim=(0, None), ylim=(0, None))
    panels[0].legend()
    figure.savefig(path, dpi=120)


def report(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench drift`."""
    return {"settings": settings, "rows": [asdict(row) for row in rows]}
