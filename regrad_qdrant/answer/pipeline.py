"""The way of a question: search, decode and merge, apply, generate, restore.

direct      the bare model                         rag         the bare model, passages in the prompt
pe-rag      as rag, with a stronger prompt
regrad      atoms applied, question alone          regrad+icl  atoms applied, passages in the prompt
online      atoms computed now, none stored        random      atoms of other documents of the bank (a control)
init        φ₀ with no atoms (a control)           init+icl    φ₀ with no atoms, passages in the prompt
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.answer.filling import Filling, FillPolicy, OnMissing, OnStale
from regrad_qdrant.answer.generation import generate
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import relevances
from regrad_qdrant.errors import RegradError, WrongSpaceError
from regrad_qdrant.model.gradients import GradientComputer
from regrad_qdrant.model.prompts import Prompt, QuestionType

if TYPE_CHECKING:
    from qdrant_client.models import Filter
    from torch import Tensor, nn

    from regrad_qdrant.atoms.merge import MergeRule
    from regrad_qdrant.bank.async_bank import AsyncGradientBank
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.bank.stores.base import PointId, Vector
    from regrad_qdrant.model.initialization import MetaInitialization

Mode = Literal["direct", "rag", "pe-rag", "regrad", "regrad+icl", "online", "random", "init", "init+icl"]
MODES: tuple[Mode, ...] = get_args(Mode)
WITHOUT_DOCUMENTS = ("direct", "init")
BARE = ("direct", "rag", "pe-rag")  # the modes of the base model without its plug-in
WITHOUT_ATOMS = (*BARE, "init", "init+icl")
WITH_PASSAGES = ("rag", "pe-rag", "regrad+icl", "init+icl")  # in the prompt


@dataclass(frozen=True)
class Query:
    """One question, with what of `ReGrad.answer` belongs to it alone."""

    question: str
    mode: Mode = "regrad"
    type: QuestionType = "open"
    choices: tuple[str, ...] = ()
    query_filter: Filter | None = None
    query: str | Vector | Mapping[str, Vector] | None = None
    hits: Sequence[Hit] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RegradError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")

    def prompt(self, hits: Sequence[Hit]) -> Prompt:
        """What the model is asked, with the passages in the modes that show them."""
        passages = tuple(hit.text for hit in hits) if self.mode in WITH_PASSAGES else ()
        return Prompt(self.question, self.type, self.choices, passages, engineered=self.mode == "pe-rag")


@dataclass(frozen=True)
class Timings:
    """Seconds of each part of one answer; a part that the mode does not have is 0."""

    search: float = 0.0
    decode: float = 0.0
    apply: float = 0.0
    generate: float = 0.0
    restore: float = 0.0

    @property
    def total(self) -> float:
        return self.search + self.decode + self.apply + self.generate + self.restore


@dataclass(frozen=True)
class Answer:
    """An answer with what it came from."""

    text: str
    mode: Mode
    hits: list[Hit] = field(repr=False)  # best first; those of `random` are the documents whose atoms were applied
    timings: Timings
    prompt_tokens: int


class ReGrad:
    """Answers questions with the retrieved documents' gradients in the model's weights.

    Args:
        model: the plain base model; it gets the plug-in, and is frozen.
        tokenizer: of the model.
        bank: whose space is the initialization's; with an `AsyncGradientBank` use `aanswer`.
        initialization: φ₀, α and the merge rule that fit the model.
        merge: another rule than the one the initialization was trained with.
        on_stale: what to do with an atom whose text has changed since: `skip` it with a warning, `recompute` it
            for this query, or `refuse` the query.
        on_missing: what to do with a retrieved point that has no atom: `skip` it with a warning, `compute` its atom for
            this query, or also `store` it, so that a bank fills by use and needs no ingestion; where an atom of another
            space stands under the bank's key, it stays.
        store_after: with on_missing="store", how often a point must be retrieved before its atom is stored, so that
            the bank holds what is asked for often. Counted by this object, for the points met last.
        codec: of atoms that are computed at query time.
        check_model: compare the model's weights with those that the initialization was trained for.
        cache_bytes: of decoded atoms to keep from query to query, where a few documents are retrieved again and again.

    Raises:
        WrongModelError: if the initialization was trained for another model.
        WrongSpaceError: if the bank holds another space.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: GradientBank | AsyncGradientBank,
        initialization: MetaInitialization,
        *,
        merge: MergeRule | None = None,
        on_stale: OnStale = "skip",
        on_missing: OnMissing = "skip",
        store_after: int = 1,
        codec: str = DEFAULT_CODEC,
        check_model: bool = True,
        cache_bytes: int = 0,
    ) -> None:
        if bank.space != initialization.fingerprint:
            raise WrongSpaceError(
                f"the bank reads space {bank.space}, the initialization is {initialization.fingerprint}"
            )
        policy = FillPolicy(on_stale, on_missing, store_after, codec)  # checked before the model is touched
        self.adapter = Adapter(model, initialization, check_model=check_model, cache_bytes=cache_bytes)
        self.tokenizer = tokenizer
        self._async_bank = None if isinstance(bank, GradientBank) else bank
        self.bank = bank if isinstance(bank, GradientBank) else bank.blocking
        self.initialization = initialization
        self.merge = merge or initialization.merge
        # Computes atoms with this model; while other threads answer, use it inside `adapter.initial()`.
        self.gradients = GradientComputer(self.adapter.model, tokenizer, self.adapter.space, initialization.max_length)
        self.filling = Filling(self.bank, self.adapter, self.gradients, policy)
        if on_missing == "store" and self._async_bank is None:
            self.bank.index()
        self._all_ids: list[PointId] | None = None

    def answer(
        self,
        question: str,
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        type: QuestionType = "open",
        choices: Sequence[str] = (),
        query_filter: Filter | None = None,
        query: str | Vector | Mapping[str, Vector] | None = None,
        using: str | Sequence[str] | None = None,
        hits: Sequence[Hit] | None = None,
        seed: int = 0,
    ) -> Answer:
        """Answer one question, greedily.

        Args:
            mode: one of `MODES`.
            top_k: how many documents to retrieve.
            type: `open`, `yesno` or `choice` (with `choices`).
            query_filter: restricts the search.
            query: what to search with, if not the question itself: a text, a vector, or vectors by name.
            using: name of the vector to search; several names make it a hybrid search.
            hits: of a retriever of your own, best first (`bank.fetch(ids, scores)`), instead of a search.
            seed: of the documents that `random` draws.

        Raises:
            RegradError: for an unknown mode, or what the search and the atoms raise. The weights are φ₀ again.
            ValueError: for a prompt that makes no sense, such as an empty question.
        """
        asked = Query(question, mode, type, tuple(choices), query_filter, query, hits)
        started = time.perf_counter()
        found = self._retrieve(asked, top_k, using, seed)
        searched = time.perf_counter()
        prompt = asked.prompt(found)
        with contextlib.ExitStack() as stack:
            [atom_sum] = self._sums([(asked, found)])
            decoded_at = searched if atom_sum is None else time.perf_counter()
            if mode in BARE:
                stack.enter_context(self.adapter.disabled())
            elif atom_sum is None:
                stack.enter_context(self.adapter.initial())
            else:
                stack.enter_context(self.adapter.applied_sum(atom_sum))
            applied_at = time.perf_counter()
            [said] = generate(self.adapter.model, self.tokenizer, [prompt])
            generated_at = time.perf_counter()
        restored_at = time.perf_counter()
        timings = Timings(
            search=searched - started,
            decode=decoded_at - searched,
            apply=applied_at - decoded_at,
            generate=generated_at - applied_at,
            restore=restored_at - generated_at,
        )
        return Answer(said.text, mode, found, timings, said.prompt_tokens)

    def answer_many(
        self,
        questions: Sequence[str | Query],
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        using: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Answer]:
        """Answer a batch of questions together: every forward pass serves all of them, each row with its own update.

        The answers are those of `answer`. The batch is as large as what is given: memory for the keys and values of
        all rows is needed at once. `timings` are the batch's, divided by its size.

        Args:
            questions: texts, all in `mode`, or a `Query` each, of any modes.

        Raises:
            RegradError, ValueError: as `answer`.
        """
        if not questions:
            return []
        asked = [question if isinstance(question, Query) else Query(question, mode) for question in questions]
        times = [time.perf_counter()]
        found = [self._retrieve(query, top_k, using, seed) for query in asked]
        times.append(time.perf_counter())
        pairs = list(zip(asked, found, strict=True))
        sums = self._sums(pairs)
        times.append(time.perf_counter())
        with self.adapter.rows(sums, [query.mode in BARE for query in asked]) as names:
            times.append(time.perf_counter())
            prompts = [query.prompt(hits) for query, hits in pairs]
            said = generate(self.adapter.model, self.tokenizer, prompts, adapter_names=names)
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        timings = Timings(*((end - start) / len(asked) for start, end in itertools.pairwise(times)))
        return [
            Answer(text.text, query.mode, hits, timings, text.prompt_tokens)
            for text, (query, hits) in zip(said, pairs, strict=True)
        ]

    def _retrieve(self, asked: Query, top_k: int, using: str | Sequence[str] | None, seed: int) -> list[Hit]:
        """The documents that a question is answered from."""
        if asked.mode in WITHOUT_DOCUMENTS:
            return []
        if asked.hits is not None:
            found = list(asked.hits[:top_k])
        else:
            wants_atoms = asked.mode in ("regrad", "regrad+icl")  # not online: those are computed
            query = asked.query or asked.question
            found = self.bank.search(
                query, top_k, using=using, query_filter=asked.query_filter, with_records=wants_atoms
            )
        return self._random_hits(found, top_k, f"{seed}-{asked.question}") if asked.mode == "random" else found

    async def aanswer(self, question: str, **options: Any) -> Answer:
        """`answer` for asyncio, with the same arguments: search and generation run in a worker thread, and the requests
        of an `AsyncGradientBank` on the event loop. One answer at a time uses the model; the others wait for it.
        """
        import asyncio

        if self._async_bank is not None:
            self._async_bank.bind()
        return await asyncio.to_thread(self.answer, question, **options)

    def _sums(self, pairs: Sequence[tuple[Query, Sequence[Hit]]]) -> list[Tensor | None]:
        """Σ wᵢ·g(dᵢ) over the usable hits of each question, (numel,); None in the modes without atoms."""
        applied = [(query, hits) for query, hits in pairs if query.mode not in WITHOUT_ATOMS]
        usable = self.filling.usable([hits for _, hits in applied], [query.mode == "online" for query, _ in applied])
        sums = iter([self._merged(hits) for hits in usable])
        return [None if query.mode in WITHOUT_ATOMS else next(sums) for query, _ in pairs]

    def _merged(self, usable: Sequence[Hit]) -> Tensor:
        weights = self.merge.weights(relevances(usable))
        return self.adapter.decode([hit.record for hit in usable if hit.record is not None], weights)

    def _random_hits(self, hits: Sequence[Hit], count: int, seed: str) -> list[Hit]:
        """Other documents' points under the scores of the retrieved ones."""
        if self._all_ids is None:
            self._all_ids = [hit.id for hit in self.bank.points()]
        retrieved = {hit.id for hit in hits}
        others = [key for key in self._all_ids if key not in retrieved]
        drawn = random.Random(seed).sample(others, min(count, len(others)))
        like = [(hit.score, hit.relevance) for hit in hits] + [(1.0, None)] * count
        drawn_hits = self.bank.fetch(drawn)
        return [replace(hit, score=s, relevance=r) for hit, (s, r) in zip(drawn_hits, like, strict=False)]
