"""The contrast: the right span of the passages against others that the model finds likely, as a grounded answer is
decoded.

    −log exp(s(a)/T) / Σ_c exp(s(c)/T)     over the answer a and the spans c that a search with the same update finds

s is the score of `regrad_qdrant.answer.grounding`: a span's mean log-probability and the log-weight of its sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regrad_loaders.data.episodes import Episode, Example
from regrad_qdrant.answer.generation import padded_left
from regrad_qdrant.answer.grounding import Candidate, candidates, log_weight
from regrad_qdrant.answer.spans import SpanReader, Spans, Walk
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.model.plugin import base_of, row_updates
from regrad_qdrant.model.prompts import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from regrad_loaders.training.meta_learner import MetaLearner

_WORD = re.compile(r"\w+")
NEGATIVES = 4  # spans that the answer is contrasted with, at most
TEMPERATURE = 0.5  # T
SAME = 0.8  # share of words in common with the answer from which a span is no negative


class SpanContrast:
    """The contrast's loss for some questions of an episode.

    Args:
        count: questions of an episode, at most.
    """

    def __init__(self, tokenizer: Any, count: int) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._reader = SpanReader(tokenizer)
        self._bm25 = Bm25()

    def losses(
        self, learner: MetaLearner, episode: Episode, rows: Mapping[str, Tensor] | None, rng: random.Random
    ) -> Tensor:
        """(questions,) of those drawn whose answer is a span of their passages and has a negative; may be empty.

        Args:
            rows: the update of every question of the episode, as `MetaLearner.episode_updates` makes it.
        """
        own: dict[int, Spans] = {}
        golds: dict[int, tuple[tuple[int, ...], float]] = {}
        for i in rng.sample(range(len(episode.examples)), len(episode.examples)):
            if len(golds) == self._count:
                break
            spans = self._spans(episode, episode.examples[i])
            if (gold := _walked(spans, episode.examples[i])) is not None:
                own[i], golds[i] = spans, gold
        if not golds:
            return torch.zeros(0, device=learner.device)
        drawn = list(golds)
        chosen = [episode.examples[i] for i in drawn]
        there = None if rows is None else {name: tensor[drawn] for name, tensor in rows.items()}
        found = self._candidates(learner, chosen, [own[i] for i in drawn], there)
        expanded: list[Example] = []
        weights: list[list[float]] = []
        of_question: list[int] = []
        for place, (i, example, met) in enumerate(zip(drawn, chosen, found, strict=True)):
            others = self._negatives(example, met, own[i])
            if not others:
                continue
            answers = [golds[i], *((one.tokens, one.log_weight) for one in others)]
            end = example.answer_ids[len(golds[i][0]) :]
            expanded += [replace(example, answer_ids=[*tokens, *end]) for tokens, _ in answers]
            weights.append([weight for _, weight in answers])
            of_question += [place] * len(answers)
        if not expanded:
            return torch.zeros(0, device=learner.device)
        repeated = None if there is None else {name: tensor[of_question] for name, tensor in there.items()}
        means, _ = learner.answer_losses(expanded, repeated)
        parts = means.split([len(own_weights) for own_weights in weights])
        scores = [(means.new_tensor(w) - part) / TEMPERATURE for w, part in zip(weights, parts, strict=True)]
        return torch.stack([of_one.logsumexp(0) - of_one[0] for of_one in scores])

    def _spans(self, episode: Episode, example: Example) -> Spans:
        texts = [self._tokenizer.decode(episode.passages[row], skip_special_tokens=True) for row in example.rows]
        return self._reader.spans(texts, lambda sentences: self._bm25.scores(example.question, sentences))

    def _candidates(
        self,
        learner: MetaLearner,
        examples: Sequence[Example],
        spans: Sequence[Spans],
        rows: Mapping[str, Tensor] | None,
    ) -> list[list[Candidate]]:
        ids, mask = padded_left([example.prompt_ids for example in examples], learner.pad_id, learner.device)
        lengths = [MAX_NEW_TOKENS["open"]] * len(examples)
        ends = sorted({example.answer_ids[-1] for example in examples})
        model = learner.model[0]
        own = {} if rows is None else {name: tensor.detach() for name, tensor in rows.items()}
        with torch.no_grad(), row_updates(model, learner.space, own or learner.no_change(len(examples))):
            return candidates(base_of(model), ids, mask, spans, lengths, ends)

    def _negatives(self, example: Example, found: Sequence[Candidate], spans: Spans) -> list[Candidate]:
        unlike = [one for one in found if alike(spans.said(one.span), example.answers) < SAME]
        return list({spans.said(one.span): one for one in reversed(unlike)}.values())[::-1][:NEGATIVES]


def alike(span: str, answers: Sequence[str]) -> float:
    """The words that a span and the answer most like it have in common, as a share of those of both."""
    words = set(_WORD.findall(span.lower()))
    others = [set(_WORD.findall(answer.lower())) for answer in answers]
    return max(2 * len(words & other) / max(1, len(words) + len(other)) for other in others)


def _walked(spans: Spans, example: Example) -> tuple[tuple[int, ...], float] | None:
    """The tokens of the example's answer and the log-weight of its sentence; None where it is no span."""
    walk: Walk = spans.beginning
    tokens = example.answer_ids[: example.answer_size]
    for token in tokens:
        if token not in spans.options(walk)[0]:
            return None
        walk = spans.step(walk, token)
    return None if walk.ended is None else (tuple(tokens), float(log_weight(walk.relevance)))
