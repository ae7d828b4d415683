"""A running batch: rows join it at the next token, each with its own update, and leave it when they are done.

The cache of keys and values is kept by row. A row that joins is read by itself; then the shorter cache of the two is
padded on the left, where the mask hides it, so that all rows end together. No weight is written: every forward pass
gives each row its own change (`plugin.row_updates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.answer.generation import Asking, Finish, can_fork, ends_of, next_logits, padded_left, token_ids
from regrad_qdrant.errors import RegradError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.plugin import base_of

if TYPE_CHECKING:
    from torch import Tensor

    from regrad_qdrant.answer.adapter import Adapter, RowChange
    from regrad_qdrant.model.prompts import Prompt

GREEDY = 1e-3  # a temperature below which the likeliest token is chosen
THOUGHT = "<think>"
UNFINISHED = "�"  # what a text ends with whose last letter has tokens to come


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen.

    Args:
        temperature: 0 is greedy.
        top_p: only the likeliest tokens that have this share together.
        seed: of the draws; None: another one every time.
        stop: texts that end an answer, which is without them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise RegradError(
                f"temperature is 0 or more and top_p above 0 up to 1, found {self.temperature} and {self.top_p}"
            )


class Row:
    """One answer in the making.

    Args:
        atom_sum: (numel,) of its documents; None: φ₀ alone, or the bare model.
        bare: whether it runs without the plug-in.
        sampling: of its tokens.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Any,
        asking: Asking,
        atom_sum: Tensor | None,
        bare: bool,
        sampling: Sampling | None = None,
    ) -> None:
        [self.prompt_ids] = token_ids(tokenizer, [prompt], asking)
        self.atom_sum, self.bare = atom_sum, bare
        self.tokens: list[int] = []
        self.text = ""  # the answer so far
        self.finish: Finish | None = None
        self._sampling = sampling or Sampling()
        self._tokenizer = tokenizer
        self._prompt, self._asking = prompt, asking
        self.length = asking.length(prompt)  # tokens of the answer, at most
        self._generator: Any = None

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token, from its logits (vocabulary,), of which one is the likeliest."""
        import torch

        sampling = self._sampling
        if sampling.temperature < GREEDY:
            return likeliest
        if self._generator is None:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        shares, tokens = (logits.cpu().double() / sampling.temperature).softmax(dim=0).sort(descending=True)
        before = shares.cumsum(dim=0) - shares
        kept = shares * (before < sampling.top_p)
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])

    def add(self, token: int, ends: Sequence[int]) -> None:
        """Take the next token, and see whether the answer is done."""
        if token in ends:
            self.finish = "stop"
            self.text = self.text.rstrip(UNFINISHED)
            return
        self.tokens.append(token)
        said = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.text = self._asking.said(self._prompt, said)
        at = min((place for stop in self._sampling.stop if (place := self.text.find(stop)) >= 0), default=None)
        if at is not None:
            self.text, self.finish = self.text[:at], "stop"
        elif self._asking.is_over(self._prompt, said):
            self.finish = "stop"
        elif len(self.tokens) >= self.length:
            self.finish = "length"

    @property
    def shown(self) -> str:
        """What of the answer so far will stand in it, whatever comes."""
        if self.finish is not None:
            return self.text
        text = self.text.rstrip(UNFINISHED)
        ends = (*self._sampling.stop, THOUGHT, self._asking.format.end or "")
        begun = max((size for end in ends for size in range(1, len(end)) if text.endswith(end[:size])), default=0)
        return text[: len(text) - begun].rstrip() if begun else text


class RunningBatch:
    """Rows that one model answers together, token by token; one thread uses it.

    Args:
        adapter: of the rows' initialization. Between the calls the model is the bare one, and others may use it.
    """

    def __init__(self, adapter: Adapter, tokenizer: Any) -> None:
        self.rows: list[Row] = []
        self._adapter = adapter
        self._base = base_of(adapter.model)
        self._ends = ends_of(self._base, tokenizer)
        self._pad = tokenizer.pad_token_id or 0
        self._cache: Any = None
        self._mask: Tensor | None = None  # (rows, tokens that the cache has)
        self._change: RowChange | None = None  # of these rows; None: not made yet
        self._silent: set[int] = set()  # rows, by id, that have left and whose places are still there

    @property
    def is_open(self) -> bool:
        """Whether a row can join: where a layer keeps other keys and values than of all tokens, only an empty batch."""
        from transformers.cache_utils import DynamicLayer

        return not self.rows or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of these rows, and let each say its first token.

        Where that fails, no row has joined; those that were there have left if they can't go on.
        """
        import torch

        if not self.is_open:
            raise RegradError("this model's running batch takes no row before it is empty")
        ids, mask = padded_left([row.prompt_ids for row in rows], self._pad, input_device(self._base))
        with torch.inference_mode(), self._adapter.changed(self._change_of(rows)):
            logits, cache = next_logits(self._base, ids, mask, None)
        said = _chosen(rows, logits)
        if self._mask is None:
            self._cache, self._mask = cache, mask
        else:
            try:
                for own, other in zip(self._cache.layers, cache.layers, strict=True):
                    own.keys, own.values = _beside(own.keys, other.keys, 2), _beside(own.values, other.values, 2)
                self._mask = _beside(self._mask, mask, 1)
            except BaseException:  # some layers have the new rows and some have not
                self.leave(self.rows)
                raise
        self.rows += rows
        self._change = None
        self._add(rows, said)

    def step(self) -> None:
        """Let every row say a token."""
        import torch

        assert self._mask is not None
        ids = torch.tensor([row.tokens[-1:] or [self._pad] for row in self.rows], device=self._mask.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        if self._change is None:
            self._change = self._change_of(self.rows)
        with torch.inference_mode(), self._adapter.changed(self._change):
            logits, self._cache = next_logits(self._base, ids, self._mask, self._cache)
        self._add(self.rows, _chosen(self.rows, logits))

    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out, done or not; those that a recurrent state holds are silent from then until all have left."""
        import torch

        gone = self._silent | set(map(id, rows))
        left = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if left and self._mask is not None and not can_fork(self._cache):
            self._silent = gone
            return
        self._silent = set()
        self.rows, self._change = [self.rows[i] for i in left], None
        if not left or self._mask is None:
            self._cache, self._mask = None, None
            return
        self._mask = self._mask[left]
        first = int(self._mask.any(dim=0).nonzero()[0])  # columns that only rows that are gone had
        self._cache.batch_select_indices(torch.tensor(left))  # layers may be on several devices
        if first and self.is_open:
            self._mask = self._mask[:, first:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    def _add(self, rows: Sequence[Row], said: Sequence[int]) -> None:
        for row, token in zip(rows, said, strict=True):
            if id(row) not in self._silent:
                row.add(token, self._ends)

    def _change_of(self, rows: Sequence[Row]) -> RowChange:
        return self._adapter.row_change([row.atom_sum for row in rows], [row.bare for row in rows])


def _chosen(rows: Sequence[Row], logits: Tensor) -> list[int]:
    """The next token of each row."""
    likeliest = logits.argmax(dim=1).tolist()
    return [row.choose(own, token) for row, own, token in zip(rows, logits, likeliest, strict=True)]


def _beside(ours: Tensor, theirs: Tensor, dim: int) -> Tensor:
    """Both one below the other, the shorter of the two padded on the left of this dimension."""
    import torch

    longest = max(ours.shape[dim], theirs.shape[dim])

    def padded(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = longest - tensor.shape[dim]
        return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor

    return torch.cat([padded(ours), padded(theirs)])
