"""Passages cut to so many tokens: of all retrieved ones the sentences that BM25 ranks best for the question.

The simplest prompt compression: a reader gets less to read, and most often the answer's sentence is still in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from regrad_loaders.baselines.reader import Reader
from regrad_qdrant.answer.pipeline import ReGrad
from regrad_qdrant.answer.query import Answer, Query
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.embed import Bm25

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")


class ShortenedReader(Reader):
    """`ReGrad` with less of each passage in its prompts.

    Args:
        tokens: of all passages of a question together, at most.
    """

    def __init__(self, regrad: ReGrad, tokens: int) -> None:
        super().__init__(regrad)
        self.tokens = tokens

    def answer_many(
        self, questions: Sequence[str | Query], *, top_k: int = 3, using: str | Sequence[str] | None = None
    ) -> list[Answer]:
        """As `ReGrad.answer_many`; the hits of an answer are whole."""
        found = self.found(questions, top_k, using)
        bm25, tokenizer = self.regrad.weighing.bm25, self.regrad.tokenizer
        short = [
            replace(one.asked, hits=shortened(one.hits, one.asked.question, bm25, tokenizer, self.tokens))
            for one in found
        ]
        answers = self.regrad.answer_many(short, top_k=top_k)
        return [replace(answer, hits=one.hits) for answer, one in zip(answers, found, strict=True)]


def shortened(hits: Sequence[Hit], question: str, bm25: Bm25, tokenizer: Any, tokens: int) -> list[Hit]:
    """The hits with those of their sentences that together have at most so many tokens, the best for the question
    first to be kept, and cut where it alone has more; in their order, without those of which nothing is left."""
    sentences = [(i, text) for i, hit in enumerate(hits) for text in _SENTENCE.split(hit.text) if text.strip()]
    if not sentences:
        return list(hits)
    texts = [text for _, text in sentences]
    scores, left = bm25.scores(question, texts), tokens
    kept: set[int] = set()
    for at in sorted(range(len(texts)), key=lambda i: -scores[i]):
        ids = tokenizer(texts[at], add_special_tokens=False, verbose=False).input_ids
        if not kept and len(ids) > left:  # the best sentence alone
            ids = ids[:left]
            texts[at] = tokenizer.decode(ids)
        if len(ids) <= left:
            kept.add(at)
            left -= len(ids)
    of_hit = [" ".join(texts[at] for at, (i, _) in enumerate(sentences) if i == number and at in kept)
              for number in range(len(hits))]  # fmt: skip
    return [replace(hit, text=text) for hit, text in zip(hits, of_hit, strict=True) if text]
