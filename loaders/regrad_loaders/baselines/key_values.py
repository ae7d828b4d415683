"""RAG with the passages' keys and values computed beforehand (TurboRAG, Lu et al. 2024; Gim et al. 2024).

Every passage is read once by itself, after the beginning of the prompt that all questions share, and what attention
keeps of it is stored. At query time those of the retrieved passages are set one behind the other, their keys turned to
where they stand now, and the model reads the question alone. Passages never read each other, and each is read as the
first one: a model reads worse so than RAG's whole prompt, unless it is trained for it as TurboRAG's is. It is not
here.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regrad_loaders.baselines.reader import Reader
from regrad_qdrant.answer.generation import Generated, ends_of
from regrad_qdrant.answer.pipeline import Merged, ReGrad, answer_of
from regrad_qdrant.answer.query import BARE, Answer, Query, Timings
from regrad_qdrant.answer.retrieval import Found
from regrad_qdrant.errors import UnsupportedModelError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.plugin import base_of
from regrad_qdrant.model.prompts import Prompt

KEPT_BYTES = 2**31  # of keys and values that are kept in memory; others are computed again

_Layers = list[tuple[Tensor, Tensor]]  # of each layer the keys and values (1, heads, tokens, width)


@dataclass(frozen=True)
class Piece:
    """The keys and values of some tokens, the keys as if they stood from `first` on."""

    layers: _Layers
    first: int
    tokens: int

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


class KeyValueReader(Reader):
    """Answers as `rag` and `init+icl` do, from keys and values instead of passages; a question at a time.

    Args:
        regrad: whose model, bank and prompts it uses.

    Raises:
        UnsupportedModelError: for a model whose positions are not turned by one rotary embedding in all its layers, or
            whose attention has windows.
    """

    def __init__(self, regrad: ReGrad, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(regrad)
        self._model = base_of(regrad.adapter.model)
        self._decoder: Any = self._model.get_decoder()
        config: Any = self._model.config.get_text_config()
        windows = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
        if not hasattr(self._decoder, "rotary_emb") or windows:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: keys can be set to another place only where one rotary embedding turns "
                "them in all layers and attention has no windows; use the mode rag"
            )
        self.seconds: list[float] = []  # that each passage took to read
        self.sizes: list[int] = []  # bytes of each passage's keys and values
        self._kept: OrderedDict[tuple[str, str], Piece] = OrderedDict()
        self._kept_bytes, self._held = kept_bytes, 0

    def answer_many(
        self, questions: Sequence[str | Query], *, top_k: int = 3, using: str | Sequence[str] | None = None
    ) -> list[Answer]:
        """As `ReGrad.answer_many`, each question by itself."""
        started = time.perf_counter()
        found = self.found(questions, top_k, using)
        search = (time.perf_counter() - started) / max(1, len(found))
        return [self._answered(one, search) for one in found]

    def speak(self, prompt: Prompt, tokens: int) -> list[int]:
        """Exactly so many tokens of the bare model, greedily, for timings."""
        with self.regrad.adapter.disabled(), torch.inference_mode():
            begin, passages, asked = self._pieces(prompt)
            return self._written([begin, *passages], asked, tokens, frozenset())

    def forget(self) -> None:
        """Drop all that is kept."""
        self._kept.clear()
        self._held = 0

    def _answered(self, found: Found, search: float) -> Answer:
        prompt = found.asked.prompt(found.hits)
        with self._weights(found.asked), torch.inference_mode():
            begin, passages, asked = self._pieces(prompt)
            started = time.perf_counter()
            answered = self._chosen if prompt.options else self._said
            text = answered(prompt, [begin, *passages], asked)
            timings = Timings(search=search, generate=time.perf_counter() - started)
        return answer_of(Generated(text, len(asked)), found, Merged(None, {}, found.notes, {}), timings)

    def _weights(self, asked: Query) -> AbstractContextManager[Any]:
        adapter = self.regrad.adapter
        return adapter.disabled() if asked.mode in BARE else adapter.initial()

    def _pieces(self, prompt: Prompt) -> tuple[Piece, list[Piece], list[int]]:
        """The prompt's beginning and its passages as keys and values, and the tokens of what follows them."""
        asking, tokenizer = self.regrad.asking, self.regrad.tokenizer
        format = asking.format
        if not prompt.passages:
            return self._empty(), [], self._ids(asking.render(prompt, tokenizer))
        shown = [format.passage.format(number=1, text=text) for text in prompt.passages]
        whole = asking.render(replace(prompt, passages=prompt.passages[:1]), tokenizer)
        before, _, after = whole.partition(shown[0])
        begin = self._read(before, "", None)
        between = format.between_passages
        ends = [between] * (len(shown) - 1)
        if after.startswith(between):  # the last passage ends as the others do: one piece for all places
            ends, after = [*ends, between], after.removeprefix(between)
        ending = zip(shown, [*ends, ""], strict=False)
        return begin, [self._read(before, text + end, begin) for text, end in ending], self._ids(after)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.regrad.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _read(self, before: str, text: str, begin: Piece | None) -> Piece:
        """A passage's text read after the prompt's beginning, or that beginning alone; kept for the next question."""
        key = (before, text)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        started = time.perf_counter()
        ids = self._ids(text if begin is not None else before)
        if not ids:
            return self._empty()
        past, length = self.joined([] if begin is None else [begin])
        device = input_device(self._model)
        self._decoder(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, length + len(ids), dtype=torch.long, device=device),
            past_key_values=past,
            use_cache=True,
        )
        layers = [(layer.keys[:, :, length:].clone(), layer.values[:, :, length:].clone()) for layer in past.layers]
        piece = self._kept[key] = Piece(layers, length, len(ids))
        if begin is not None:
            self.seconds.append(time.perf_counter() - started)
            self.sizes.append(piece.bytes)
        self._held += piece.bytes
        while self._held > self._kept_bytes and len(self._kept) > 1:
            self._held -= self._kept.popitem(last=False)[1].bytes
        return piece

    def joined(self, pieces: Sequence[Piece]) -> tuple[Any, int]:
        """A cache of these pieces one behind the other, and how many tokens it holds."""
        from transformers import DynamicCache

        past, length = DynamicCache(), 0
        for piece in pieces:
            turn = self._turn(length - piece.first) if length != piece.first else None
            for number, (keys, values) in enumerate(piece.layers):
                past.update(keys if turn is None else _turned(keys, *turn), values, number)
            length += piece.tokens
        return past, length

    def _turn(self, by: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines of a rotation by so many positions."""
        rotary = self._decoder.rotary_emb
        like = torch.zeros(1, device=input_device(self._model))
        cos, sin = rotary(like, torch.tensor([[by]], device=like.device))
        scale = getattr(rotary, "attention_scaling", 1.0)
        return cos.unsqueeze(1) / scale, sin.unsqueeze(1) / scale

    def _empty(self) -> Piece:
        return Piece([], 0, 0)

    def _said(self, prompt: Prompt, pieces: Sequence[Piece], asked: list[int]) -> str:
        """What the model writes, greedily."""
        asking, tokenizer = self.regrad.asking, self.regrad.tokenizer
        said = self._written(pieces, asked, asking.length(prompt), ends_of(self._model, tokenizer))
        return asking.said(prompt, tokenizer.decode(said, skip_special_tokens=True))

    def _written(self, pieces: Sequence[Piece], asked: list[int], most: int, ends: Collection[int]) -> list[int]:
        """The likeliest tokens one after the other, as many or until one that ends."""
        past, length = self.joined(pieces)
        said, following = list[int](), asked
        for _ in range(most):
            logits = self._next(past, length, following)[-1]
            length += len(following)
            token = int(logits.argmax())
            if token in ends:
                break
            said.append(token)
            following = [token]
        return said

    def _chosen(self, prompt: Prompt, pieces: Sequence[Piece], asked: list[int]) -> str:
        """The likeliest option, by the mean log-probability of its tokens and its end."""
        asking, best = self.regrad.asking, dict[str, float]()
        for spelling, option in prompt.spellings:
            target = asking.target(self.regrad.tokenizer, prompt, spelling)
            logits = self._next(*self.joined(pieces), asked + target)
            chances = logits[len(asked) - 1 : -1].log_softmax(dim=-1)
            mean = float(chances[range(len(target)), target].mean())
            best[option] = max(mean, best.get(option, mean))
        return max(best, key=lambda option: best[option])

    def _next(self, past: Any, length: int, ids: list[int]) -> Tensor:
        """The logits (tokens, vocabulary) after each of these tokens, which the cache gets too."""
        device = input_device(self._model)
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, length + len(ids), dtype=torch.long, device=device),
            past_key_values=past,
            use_cache=True,
        )
        logits: Tensor = output.logits[0].float()
        return logits


def _turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys turned by a rotary embedding's rotation, in float32."""
    half = keys.shape[-1] // 2
    wide = keys.float()
    turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
    return (wide * cos + turned * sin).to(keys.dtype)
