"""From texts to knowledge atoms: exact gradients of every document of a batch in one backward pass.

A LoRA module's gradient for one document is a sum over its tokens of outer products of the module's input and
the loss's gradient at its output. Hooks keep both for a whole padded batch, and a batched matrix product joins
them row by row: no loop over documents, no gradient that sums documents, nothing computed for frozen weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import AdapterError, DataError
from regrad_qdrant.model.base_model import input_device
from regrad_qdrant.model.head import Head, head_of
from regrad_qdrant.model.plugin import base_of, by_rows, lora_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from regrad_qdrant.model.space import AtomSpace

FLOAT16_FACTOR = 2.0**14  # of a loss whose gradients half precision would round to zero; less where they overflow
BATCH_TOKENS = 2048  # of one batch, with padding; lower it where memory is short


def hidden_states(peft_model: PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states (batch, tokens, hidden) of right-padded token ids."""
    states: Tensor = base_of(peft_model).get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return states


def document_losses(peft_model: PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """L(d) of every row: the mean over its tokens of the next-token cross-entropy (batch,).

    `ids` and `mask` are (batch, tokens), padded on the right; each row has at least two tokens.
    """

    from regrad_qdrant.model.loss import token_cross_entropy

    hidden, head = hidden_states(peft_model, ids, mask)[:, :-1], head_of(base_of(peft_model))
    where, mask, ids = head.weight.device, mask.to(head.weight.device), ids.to(head.weight.device)
    row, position = mask[:, 1:].nonzero(as_tuple=True)  # padding never reaches the vocabulary
    losses, _ = token_cross_entropy(hidden.to(where)[row, position], head, ids[:, 1:][row, position])
    lengths = mask[:, 1:].sum(dim=1)
    return losses.new_zeros(len(ids)).index_add(0, row, losses) / lengths


def answer_losses(
    peft_model: PeftModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> tuple[Tensor, Tensor]:
    """For the token ids of each prompt and answer, in one batch: the answer's mean negative log-likelihood, and whether
    every one of its tokens is the likeliest (pairs,)."""
    base = base_of(peft_model)
    ids, mask = pad([[*prompt, *answer] for prompt, answer in pairs], pad_id, input_device(base))
    starts = [len(prompt) - 1 for prompt, _ in pairs]
    return mean_losses(hidden_states(peft_model, ids, mask), head_of(base), [answer for _, answer in pairs], starts)


def mean_losses(
    states: Tensor, head: Head, answers: Sequence[Sequence[int]], starts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Of each row's answer the mean negative log-likelihood of its tokens, and whether each of them is the likeliest
    (rows,).

    Args:
        states: (rows, tokens, hidden), the last hidden states.
        answers: of each row, token ids.
        starts: of each row, where the state stands that predicts the first of them; by itself 0.
    """
    import torch

    from regrad_qdrant.model.loss import token_cross_entropy

    where, starts = head.weight.device, starts or [0] * len(answers)
    row = torch.tensor([i for i, answer in enumerate(answers) for _ in answer], device=where)
    at = torch.tensor([s + i for s, answer in zip(starts, answers, strict=True) for i in range(len(answer))])
    goal = torch.tensor([token for answer in answers for token in answer], device=where)
    losses, best = token_cross_entropy(states.to(where)[row, at.to(where)], head, goal)
    lengths = torch.bincount(row, minlength=len(answers))
    means = losses.new_zeros(len(answers)).index_add(0, row, losses) / lengths
    right = losses.new_zeros(len(answers)).index_add(0, row, (best == goal).to(losses.dtype))
    return means, (right == lengths).float()


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask (batch, longest), padded on the right."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """A document's tokens by the model's own rule (its BOS, no chat template).

    Raises:
        DataError: for a text of fewer than two tokens: there is no next token to predict.
    """
    try:
        ids: list[int] = tokenizer(text, verbose=False).input_ids
    except (TypeError, UnicodeError) as error:  # a lone surrogate
        raise DataError(f"the text {text[:40]!r} is no valid Unicode: {error}") from error
    if len(ids) < 2:
        raise DataError(f"the text {text[:40]!r} has {len(ids)} token(s); a gradient needs at least 2")
    return ids


@dataclass(frozen=True)
class EncodedDocument:
    """A document as its gradient sees it."""

    ids: list[int]
    truncated: bool  # the text had more than `max_length` tokens
    span: tuple[int, int] = (0, 0)  # of a window, its characters in the text


class GradientComputer:
    """Computes the knowledge atoms of texts in one meta-initialization's space.

    Args:
        peft_model: the base model with the plug-in (`plugin.plug_in`), carrying φ₀ unchanged.
        tokenizer: of the base model.
        space: over the model's own tensors (`plugin.live_space`).
        max_length: tokens of a document that its gradient sees; longer ones are cut.
        turn: a block in which the model carries φ₀, where it does not always.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        tokenizer: Any,
        space: AtomSpace,
        max_length: int,
        turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.model = peft_model
        self.tokenizer = tokenizer
        self.space = space
        self.max_length = max_length
        self._turn = turn

    def encode(self, text: str) -> EncodedDocument:
        """The text as its gradient sees it: cut to `max_length`.

        Raises:
            DataError: as `document_ids`.
        """
        ids = document_ids(self.tokenizer, text)
        return EncodedDocument(ids[: self.max_length], len(ids) > self.max_length)

    def windows(self, text: str, most: int | None = None) -> list[EncodedDocument]:
        """A text of at most `max_length` tokens as it is; a longer one in as few windows of like length as it needs.
        Each window begins as a text does (BOS).

        Args:
            most: tokens of a window; by default half of `max_length`. Initializations are trained on passages about
                that long, and an atom of one subject is worth more than one of several (`bench positions`).

        Raises:
            DataError: as `encode`.
        """
        ids = document_ids(self.tokenizer, text)
        if len(ids) <= (most or self.max_length):
            return [EncodedDocument(ids, False, (0, len(text)))]
        most = most or max(3, self.max_length // 2)
        start = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        rest = ids[len(start) :]
        count = math.ceil(len(rest) / (most - len(start)))
        edges = [len(rest) * i // count for i in range(count + 1)]
        bounds = [0, *self._begins(text, [len(start) + edge for edge in edges[1:-1]]), len(text)]
        return [
            EncodedDocument(start + rest[first:last], False, (begin, end))
            for first, last, begin, end in zip(edges, edges[1:], bounds, bounds[1:], strict=False)
        ]

    def _begins(self, text: str, tokens: Sequence[int]) -> list[int]:
        """The characters that these tokens of the text begin with."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
            return [int(offsets[token][0]) for token in tokens]
        ids = document_ids(self.tokenizer, text)  # no offsets: what the tokens before them say is about as long
        return [min(len(text), len(self.tokenizer.decode(ids[:token], skip_special_tokens=True))) for token in tokens]

    def atoms(self, documents: Sequence[EncodedDocument]) -> Tensor:
        """g(d) = ∇_φ L(d; θ, φ₀) of every document of one padded batch (paper, section 3): (batch, numel) float32.

        One forward and one backward pass, exact for each document; parameters and their `grad` stay untouched.
        """
        import torch

        base = base_of(self.model)
        device, factor = input_device(base), FLOAT16_FACTOR if base.dtype == torch.float16 else 1.0
        with self._turn(), torch.inference_mode(False), torch.enable_grad():
            ids, mask = pad([document.ids for document in documents], self.tokenizer.pad_token_id or 0, device)
            while True:
                atoms: dict[str, Tensor] = {}
                with _capture(self.model, self.space, atoms, len(documents)):
                    (factor * document_losses(self.model, ids, mask).sum()).backward()
                flat = self.space.flatten({name: atom.to(device).float() for name, atom in atoms.items()}) / factor
                if factor == 1.0 or bool(flat.isfinite().all()):
                    return flat
                factor = max(1.0, factor / 16)

    def atoms_in_batches(
        self,
        documents: Sequence[EncodedDocument],
        max_tokens: int,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """As `atoms`, for any number of documents, in batches of like length of at most `max_tokens` tokens each."""
        import torch

        atoms = torch.empty(len(documents), self.space.numel)
        for batch in batches([len(document.ids) for document in documents], max_tokens):
            atoms[batch] = self.atoms([documents[i] for i in batch]).to(atoms.device)
            on_batch(len(batch))
        return atoms


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length that hold at most `max_tokens` tokens with their padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@contextlib.contextmanager
def _capture(peft_model: PeftModel, space: AtomSpace, atoms: dict[str, Tensor], count: int) -> Iterator[None]:
    """Inside the block a backward pass of `count` rows leaves every module's part of the atoms in `atoms`."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            kept = space.keep(name, by_rows(inputs[0].detach(), count))
            if not output.requires_grad:  # a first adapted layer: the graph begins here, at its output
                output.requires_grad_(True)
            output.register_hook(
                lambda delta: space.accumulate(atoms, space.from_gradients(name, kept, by_rows(delta, count)))
            )
            return output

        return keep

    layers = lora_layers(peft_model)
    if not layers:
        raise AdapterError("the model carries no plug-in now: compute atoms inside `adapter.initial()`")
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
