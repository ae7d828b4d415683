"""Grounded answers: the best span of the retrieved texts, by beam search. No text stands in the prompt for that.

    score = mean over the span's tokens and the answer's end of the model's own log-probability + log w
    log w = (s − 1)/τ      of the span's sentence, s its BM25 for the question relative to the best sentence's

The texts say which tokens may follow and the model how likely they are; w is the merge rule `margin`, which weighs
sentences here as it weighs documents there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from regrad_qdrant.answer.generation import Asking, Generated, can_fork, encoded, ends_of, next_logits
from regrad_qdrant.answer.spans import Floats, Ints, Span, Spans, Walk
from regrad_qdrant.errors import UnsupportedModelError
from regrad_qdrant.model.plugin import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from regrad_qdrant.model.prompts import Prompt

BEAMS = 4  # of the search
AHEAD = 2  # tokens that a beam is granted before the search ends without it
TEMPERATURE = 2 / 3  # τ of sentences


@dataclass(frozen=True)
class _Beam:
    """One beginning of an answer."""

    walk: Walk
    options: Ints  # the tokens that may come next
    relevance: Floats  # of each the best sentence's
    tokens: tuple[int, ...] = ()
    log_probability: float = 0.0  # the sum of its tokens'
    log_weight: float = 0.0  # of its best sentence

    @property
    def hope(self) -> float:
        return self.log_probability / (len(self.tokens) + AHEAD) + self.log_weight


@dataclass(frozen=True)
class Candidate:
    """A span that was met as a whole answer."""

    span: Span
    tokens: tuple[int, ...]  # without an end
    log_probability: float  # the mean of its tokens' and its end's
    log_weight: float  # of its sentence

    @property
    def score(self) -> float:
        return self.log_probability + self.log_weight


class _Search:
    """The search for one question's answer.

    Args:
        length: tokens of an answer, at most.
    """

    def __init__(self, spans: Spans, length: int) -> None:
        self.spans = spans
        self._length = length
        first = _Beam(spans.beginning, *spans.options(spans.beginning))
        self.beams = [first] if len(first.options) else []
        self.found: list[Candidate] = []
        self.best: Candidate | None = None

    @property
    def done(self) -> bool:
        """Whether no beam would be better than the best answer if it ended `AHEAD` tokens on at no cost."""
        return not self.beams or (self.best is not None and all(beam.hope <= self.best.score for beam in self.beams))

    def grow(self, scores: Sequence[Any], ends: Sequence[float], width: int) -> list[int]:
        """Let every beam grow by a token, and keep the best.

        Args:
            scores: of each beam the log-probabilities of its options.
            ends: of each beam that of the answer's end.

        Returns:
            Which beam each of the new ones came of.
        """
        grown: list[tuple[float, int, int]] = []
        for i, (beam, own, end) in enumerate(zip(self.beams, scores, ends, strict=True)):
            size = len(beam.tokens) + 1
            if (span := beam.walk.ended) is not None:
                mean, weight = (beam.log_probability + end) / size, float(log_weight(beam.walk.relevance))
                self.found.append(Candidate(span, beam.tokens, mean, weight))
                if self.best is None or self.found[-1].score > self.best.score:
                    self.best = self.found[-1]
            if size <= self._length:
                totals = (beam.log_probability + own) / size + log_weight(beam.relevance)
                grown += [(float(totals[at]), i, int(at)) for at in np.argsort(-totals, kind="stable")[:width]]
        grown = sorted(grown, key=lambda one: -one[0])[:width]
        before, self.beams = self.beams, []
        for _, i, at in grown:
            beam, token = before[i], int(before[i].options[at])
            walk, weight = self.spans.step(beam.walk, token), float(log_weight(beam.relevance[at]))
            log_probability = beam.log_probability + float(scores[i][at])
            self.beams.append(_Beam(walk, *self.spans.options(walk), (*beam.tokens, token), log_probability, weight))
        return [i for _, i, _ in grown]


def log_weight(relevance: Any) -> Any:
    """log w of sentences of such relevance, by the merge rule `margin`."""
    return (relevance - 1) / TEMPERATURE


def ground(
    peft_model: PeftModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    spans: Sequence[Spans],
    asking: Asking | None = None,
    beams: int = BEAMS,
) -> list[Generated]:
    """The best span to answer every prompt with, in their order."""
    asking = asking or Asking()
    base = base_of(peft_model)
    ids, mask = encoded(base, tokenizer, prompts, asking)
    ends = sorted({*ends_of(base, tokenizer), asking.format.end_ids(tokenizer)[0]})
    lengths = [asking.length(prompt) for prompt in prompts]
    answers = []
    for own, found, tokens in zip(
        spans, candidates(base, ids, mask, spans, lengths, ends, beams), mask.sum(dim=1).tolist(), strict=True
    ):
        if not found:
            answers.append(Generated("", tokens))  # no word of the texts is as short as the answer must be
        else:
            answers.append(Generated(own.said(found[0].span), tokens, found[0].span, found[0].log_probability))
    return answers


def candidates(
    base: Any,
    ids: Tensor,
    mask: Tensor,
    spans: Sequence[Spans],
    lengths: Sequence[int],
    ends: Sequence[int],
    beams: int = BEAMS,
) -> list[list[Candidate]]:
    """What the search meets as answers to every prompt, best first.

    Each prompt is read once, and its beams are rows of one batch: rows i·beams to (i + 1)·beams − 1 are prompt i
    (`plugin.row_updates` gives all of them the change of row i).

    Args:
        base: the base model, as it is at the moment.
        ids, mask: (prompts, longest), padded on the left.
        lengths: tokens of each answer, at most.
        ends: the tokens that end an answer.
    """
    import torch

    device = ids.device
    searches = [_Search(own, length) for own, length in zip(spans, lengths, strict=True)]
    cache = None
    with torch.inference_mode():
        while not all(search.done for search in searches):
            logits, now = next_logits(base, ids, mask, cache)
            rows = beams if cache else 1  # of each prompt
            came_of = _grow(searches, logits, ends, rows, beams)
            if cache is None:
                if not can_fork(now):
                    raise UnsupportedModelError(
                        f"{type(base).__name__} keeps a state of what it has read that beams can't share: its answers "
                        "can't be spans of the texts (grounded=False)"
                    )
                now.batch_repeat_interleave(beams)
                mask = mask.repeat_interleave(beams, dim=0)
            elif came_of != list(range(len(came_of))):
                now.reorder_cache(torch.tensor(came_of, device=device))
            cache = now
            said = [token for search in searches for token in _last_tokens(search, beams)]
            ids = torch.tensor(said, device=device)[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [sorted(search.found, key=lambda one: -one.score) for search in searches]


def _grow(searches: Sequence[_Search], logits: Tensor, ends: Sequence[int], rows: int, width: int) -> list[int]:
    """Let every search go on by a token.

    Args:
        logits: (searches · rows, vocabulary) after what the beams have said; beam j of search i is row i · rows + j.

    Returns:
        The row that each of the `width` rows of every search came of.
    """
    import torch

    live = [(i, j) for i, search in enumerate(searches) if not search.done for j in range(len(search.beams))]
    options = [searches[i].beams[j].options for i, j in live]
    at = torch.tensor([i * rows + j for i, j in live], device=logits.device)
    sizes = [len(own) for own in options]
    total = logits.logsumexp(dim=1)[at]
    ended = (logits[at][:, list(ends)].logsumexp(dim=1) - total).tolist()
    chosen = torch.from_numpy(np.concatenate(options)).to(logits.device)
    of_beam = torch.tensor(np.repeat(np.arange(len(live)), sizes), device=logits.device)
    scores = (logits[at[of_beam], chosen] - total[of_beam]).cpu().numpy()
    parts = iter(zip(np.split(scores, np.cumsum(sizes)[:-1]), ended, strict=True))
    came_of = []
    for i, search in enumerate(searches):
        parents: list[int] = []
        if not search.done:
            own = [next(parts) for _ in search.beams]
            parents = search.grow([score for score, _ in own], [end for _, end in own], width)
        parents += [0] * (width - len(parents))
        came_of += [i * rows + parent for parent in parents]
    return came_of


def _last_tokens(search: _Search, width: int) -> list[int]:
    """What each of a search's rows said last; rows that no beam has repeat something."""
    said = [beam.tokens[-1] for beam in search.beams]
    return said + [said[0] if said else 0] * (width - len(said))
