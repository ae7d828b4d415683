"""The spans of the retrieved texts as a language model says them: token sequences, walked as arrays.

A span begins where a word begins and ends where a word ends; white space inside it is one blank, and a blank line or
the end of its text ends it. Its first word is tokenized by itself, as the model says it at the beginning of an answer
("Barry" and not " Barry"), the others as they stand in the text. Each token of a text is one node with the node that
follows it; each word has a chain of nodes for itself alone, which leads into the text where the word ends.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from regrad_qdrant.errors import RegradError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

KEPT = 256  # texts whose tokens are kept
NOWHERE = -1  # what follows the last node of a text
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts: each letter is a word
_WORD = regex.compile(
    rf"(?V1)[{_UNSPACED}]\p{{M}}*|(?:[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]|(?<=\p{{N}})[.,:](?=\p{{N}}))+"
)
_TRAILING = ",;:"  # signs that no span ends with
_SENTENCE_END = regex.compile(r"(?<=[.!?…])\s+|[。！？]|\n+")
_PIECE = regex.compile(r"\S+")
_SIGN = regex.compile(r"(?<!\S)[^\s\p{L}\p{M}\p{N}]")  # before a word, with no blank between: $5, "Nevermore"


@dataclass(frozen=True)
class Span:
    """Characters of one of the texts."""

    text: int  # which
    start: int
    end: int  # one past the last


@dataclass(frozen=True)
class TextNodes:
    """The nodes of one text."""

    text: str
    tokens: Ints
    following: Ints
    stops: Ints  # one past the last character of the text as it was given
    ends: NDArray[np.bool_]  # whether a span can end with the node
    firsts: Ints  # the node that each span begins with
    starts: Ints  # the character that it begins with
    sentences: list[str]
    sentence_of: Ints  # the sentence that each span begins in


@dataclass(frozen=True)
class Walk:
    """What has been said so far, as all places of the texts where it stands."""

    following: Ints  # the nodes that may come next
    origins: Ints  # of each, which beginning it goes back to
    ended: Span | None = None  # what has been said, where it is a span: in the sentence that is most relevant
    relevance: float = 0.0  # of that sentence


class Spans:
    """All spans of some texts, best text first.

    Args:
        relevance: of each sentence of all texts, 0 to 1; by default all are alike.
    """

    def __init__(self, texts: Sequence[TextNodes], relevance: Sequence[float] | None = None) -> None:
        offsets = list(itertools.accumulate((len(text.tokens) for text in texts), initial=0))[:-1]
        pairs = list(zip(texts, offsets, strict=True))
        self._tokens = _joined([text.tokens for text in texts])
        self._following = _joined([np.where(t.following < 0, NOWHERE, t.following + offset) for t, offset in pairs])
        self._stops = _joined([text.stops for text in texts])
        self._ends = _joined([text.ends for text in texts]).astype(bool)
        self._starts = _joined([text.starts for text in texts])
        self._text_of = np.repeat(np.arange(len(texts)), [len(text.firsts) for text in texts])
        self._texts = [text.text for text in texts]
        firsts = _joined([text.firsts + offset for text, offset in pairs])
        first_sentences = itertools.accumulate((len(text.sentences) for text in texts), initial=0)
        sentence_of = _joined([text.sentence_of + first for text, first in zip(texts, first_sentences, strict=False)])
        self._relevance = np.zeros(len(firsts)) if relevance is None else np.array(relevance, dtype=float)[sentence_of]
        self.beginning = Walk(firsts, np.arange(len(firsts)))

    def __bool__(self) -> bool:
        return bool(len(self._starts))

    def said(self, span: Span) -> str:
        """A span as an answer: its text with single blanks."""
        return " ".join(self._texts[span.text][span.start : span.end].split())

    def options(self, walk: Walk) -> tuple[Ints, Floats]:
        """The tokens that may come next, ascending, and the relevance of the best sentence that each may go on in."""
        tokens, at = np.unique(self._tokens[walk.following], return_inverse=True)
        relevance = np.zeros(len(tokens))
        np.maximum.at(relevance, at, self._relevance[walk.origins])
        return tokens, relevance

    def step(self, walk: Walk, token: int) -> Walk:
        """The walk with one more token, one of those that may come next."""
        agreeing = self._tokens[walk.following] == token
        said, origins = walk.following[agreeing], walk.origins[agreeing]
        following = self._following[said]
        goes_on = following != NOWHERE
        walk = Walk(following[goes_on], origins[goes_on])
        if not (ending := np.flatnonzero(self._ends[said])).size:
            return walk
        best = ending[self._relevance[origins[ending]].argmax()]
        first = origins[best]
        span = Span(int(self._text_of[first]), int(self._starts[first]), int(self._stops[said[best]]))
        return replace(walk, ended=span, relevance=float(self._relevance[first]))


class SpanReader:
    """Makes the spans of texts with a model's tokenizer; keeps the nodes of the texts that it met last. Any thread may
    ask it.

    Args:
        tokenizer: one that says which characters each token stands for (a "fast" one).

    Raises:
        RegradError: if it does not.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RegradError(
                f"grounded answers need a tokenizer that says which characters a token stands for; {type(tokenizer)} "
                "does not: load the model's fast one"
            )
        # Its own: that special tokens are read as text is a state of the tokenizer, which other threads would meet.
        self.tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, TextNodes] = OrderedDict()
        self._words: dict[str, list[int]] = {}  # the tokens of words that a text has been met to begin a span with

    def spans(self, texts: Sequence[str], score: Callable[[list[str]], Sequence[float]] | None = None) -> Spans:
        """The spans of these texts, best text first.

        Args:
            score: of sentences, such as the BM25 of a question; it counts relative to the best.
        """
        with self._lock:
            nodes = [self._nodes(text) for text in texts]
        sentences = [sentence for text in nodes for sentence in text.sentences]
        if score is None or not sentences:
            return Spans(nodes)
        scores = score(sentences)
        best = max(scores)
        return Spans(nodes, [max(0.0, one) / best for one in scores] if best > 0 else None)

    def _nodes(self, text: str) -> TextNodes:
        if (nodes := self._kept.pop(text, None)) is None:
            nodes = self._read(text)
        self._kept[text] = nodes
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return nodes

    def _read(self, text: str) -> TextNodes:
        flat, places, breaks = _flattened(text)
        encoded = self.tokenizer(
            flat, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        ids = np.array(encoded.input_ids, dtype=np.int64)
        stops = np.array([stop for _, stop in encoded.offset_mapping], dtype=np.int64)
        starts, ends = _boundaries(flat)
        last, following = _in_order(stops, breaks)
        # A span's first word is tokenized by itself, as an answer begins; from where it stops the span goes on in the
        # text. So the nodes are the text's own tokens, and after them those of each first word.
        starts, word_ends = _first_words(starts, ends, stops)
        words = self._tokens_of([flat[a:b] for a, b in zip(starts.tolist(), word_ends.tolist(), strict=True)])
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        at = np.searchsorted(stops, word_ends, side="right") - 1  # the last token that stops there, if one does
        onward = np.where((at >= 0) & (stops[at] == word_ends), following[at], NOWHERE) if len(ids) else at
        ends_word = np.zeros(lengths.sum(), dtype=bool)
        ends_word[np.cumsum(lengths) - 1] = True
        in_words = np.arange(len(ids) + 1, len(ids) + 1 + len(ends_word))
        in_words[ends_word] = onward
        sentences, sentence_of = _sentences(text, places[starts])
        return TextNodes(
            text=text,
            tokens=np.concatenate([ids, np.fromiter(itertools.chain.from_iterable(words), dtype=np.int64)]),
            following=np.concatenate([following, in_words]),
            stops=places[np.concatenate([stops, np.repeat(word_ends, lengths)]) - 1] + 1,
            ends=np.concatenate([np.isin(stops, ends) & last, ends_word]),
            firsts=len(ids) + np.cumsum(lengths) - lengths,
            starts=places[starts],
            sentences=sentences,
            sentence_of=sentence_of,
        )

    def _tokens_of(self, words: Sequence[str]) -> list[list[int]]:
        unknown = [word for word in dict.fromkeys(words) if word not in self._words]
        if unknown:
            if len(self._words) > KEPT * KEPT:
                self._words.clear()
                unknown = list(dict.fromkeys(words))
            ids = self.tokenizer(unknown, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
            self._words |= zip(unknown, ids, strict=True)
        return [self._words[word] for word in words]


def _in_order(stops: Ints, breaks: Ints) -> tuple[Ints, Ints]:
    """Of each token of a text whether it is the last of its character (where one is several tokens, they all stop with
    it), and which follows it: none where a paragraph ends."""
    last = np.append(stops[1:] != stops[:-1], True) if len(stops) else np.zeros(0, dtype=bool)
    following = np.arange(1, len(stops) + 1)
    following[np.isin(stops, breaks) & last] = NOWHERE
    following[-1:] = NOWHERE
    return last, following


def _first_words(starts: Ints, ends: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """The characters of the first words that spans may begin with, from each start to the first end after it. Where no
    token of the text stops there, as after the O of O'Brien that is one token, another goes on to where one does."""
    stopped = ends[np.isin(ends, stops)]
    near = ends[np.searchsorted(ends, starts, side="right")]
    far = np.append(stopped, 0)[np.searchsorted(stopped, starts, side="right")]
    further = far > near
    return np.append(starts, starts[further]), np.append(near, far[further])


def _joined(arrays: Sequence[Any]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def _flattened(text: str) -> tuple[str, Ints, Ints]:
    """The text with single blanks, where each of its characters stands in the text, and the ends of its paragraphs."""
    pieces = [(found.group(), found.start(), found.end()) for found in _PIECE.finditer(text)]
    places: list[Ints] = []
    breaks, length, before = [], 0, 0
    for piece, start, end in pieces:
        if places:
            if text.count("\n", before, start) > 1:
                breaks.append(length)
            places.append(np.array([before]))  # of the blank
            length += 1
        places.append(np.arange(start, end))
        length += len(piece)
        before = end
    return " ".join(piece for piece, _, _ in pieces), _joined(places), np.array(breaks, dtype=np.int64)


def _sentences(text: str, starts: Ints) -> tuple[list[str], Ints]:
    """The sentences of a text, lines apart, and which of them each of these characters stands in."""
    ends = [*(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]
    sentences = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return sentences, np.searchsorted(np.array(ends), starts, side="right")


def _boundaries(flat: str) -> tuple[Ints, Ints]:
    """Where spans may begin and where they may end: at words, and at signs that stand beside a blank."""
    words = [found.span() for found in _WORD.finditer(flat)]
    starts = {start for start, _ in words} | {found.start() for found in _SIGN.finditer(flat)}
    ends = {end for _, end in words} | {
        found.end() for found in _PIECE.finditer(flat) if found.group()[-1] not in _TRAILING
    }
    last = max(ends, default=0)
    ending = [start for start in sorted(starts) if start < last]
    return np.array(ending, dtype=np.int64), np.array(sorted(ends), dtype=np.int64)
