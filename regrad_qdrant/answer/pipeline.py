"""The way of a question: search, decode and merge, apply, generate, restore."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.answer.batching import Batcher
from regrad_qdrant.answer.decoding import Decoder, parts
from regrad_qdrant.answer.filling import (
    NONE_USABLE,
    Filling,
    FillPolicy,
    OnDamaged,
    OnMissing,
    OnStale,
    Usable,
    as_stored,
)
from regrad_qdrant.answer.generation import Asking, Generated
from regrad_qdrant.answer.grounding import BEAMS
from regrad_qdrant.answer.query import BARE, WITHOUT_ATOMS, Answer, Characters, Grounded, Mode, Query, Source, Timings
from regrad_qdrant.answer.retrieval import Found, Retrieval
from regrad_qdrant.answer.streaming import AnswerStream
from regrad_qdrant.answer.weighing import Weighing
from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.errors import DataError, RecordError, RegradError, WrongSpaceError
from regrad_qdrant.model.prompts import Prompt, PromptFormat, QuestionType, Style

if TYPE_CHECKING:
    from pathlib import Path

    from qdrant_client.models import Filter
    from torch import Tensor, nn

    from regrad_qdrant.atoms.merge import MergeRule
    from regrad_qdrant.bank.async_bank import AsyncGradientBank
    from regrad_qdrant.bank.documents import Hit
    from regrad_qdrant.bank.stores.base import PointId, Vector
    from regrad_qdrant.model.initialization import MetaInitialization


@dataclass(frozen=True)
class Merged:
    """The weighted sum of one question's atoms, (numel,); None in the modes without atoms."""

    total: Tensor | None
    weights: dict[PointId, float]
    notes: list[str]
    skipped: dict[PointId, str]
    windows: dict[PointId, dict[Characters, float]] = field(default_factory=dict)


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
        on_damaged: what to do with a value under the bank's key that can't be read as an atom: `skip` it with a
            warning, `recompute` it for this query, or `refuse` the query.
        codec: of atoms that are computed at query time.
        check_model: compare the model's weights with those that the initialization was trained for.
        cache_bytes: of decoded atoms to keep from query to query, where a few documents are retrieved again and again.
        batch_size: questions of `aanswer` that wait at the same time and share a forward pass, at most.
        batch_wait: seconds that the first of them waits for others.
        prompt: another prompt than the initialization was trained with: a format, or a function that returns a prompt's
            whole text. Its answers are worth less the more the prompt differs; compare with `regrad-qdrant eval`.
        beams: of the search for a grounded answer; one is fastest.
        beside: another one that goes on using the model, with an initialization of its own: the two take turns.

    A model that another `ReGrad` uses is taken over from it but for that. `close`, or leaving a `with` block, gives the
    model back.

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
        on_damaged: OnDamaged = "skip",
        batch_size: int = 16,
        batch_wait: float = 0.008,
        prompt: PromptFormat | Callable[[Prompt], str] | None = None,
        beams: int = BEAMS,
        beside: ReGrad | None = None,
    ) -> None:
        if bank.space != initialization.fingerprint:
            raise WrongSpaceError(
                f"the bank reads space {bank.space}, the initialization is {initialization.fingerprint}"
            )
        policy = FillPolicy(on_stale, on_missing, store_after, codec, on_damaged)  # checked before the model is touched
        if beams < 1:
            raise RegradError(f"beams must be at least 1, not {beams}")
        other = None if beside is None else beside.adapter
        self.adapter: Adapter = Adapter(
            model, initialization, check_model=check_model, cache_bytes=cache_bytes, beside=other
        )
        self.tokenizer = tokenizer
        self.retrieval = Retrieval(bank)
        self.bank = self.retrieval.bank
        self.initialization = initialization
        self.weighing = Weighing(merge or initialization.merge, tokenizer, self.bank)
        self.asking = Asking(initialization.prompt)
        if isinstance(prompt, PromptFormat):
            self.asking = Asking(prompt)
        elif prompt is not None:
            self.asking = replace(self.asking, function=prompt)
        self.gradients = self.adapter.gradients(tokenizer)
        self.filling = Filling(self.bank, self.adapter, self.gradients, policy)
        self.decoder = Decoder(self.adapter.model, tokenizer, self.asking, self.weighing, beams)
        self._batcher: Batcher[Found, Answer] = Batcher(self._answered_together, batch_size, batch_wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as the plain base model, and end the threads. The bank stays open: it is the caller's."""
        self._batcher.close()
        self.retrieval.close()
        self.adapter.release()

    def answer(
        self,
        question: str | Query,
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        type: QuestionType = "open",
        choices: Sequence[str] = (),
        query_filter: Filter | None = None,
        query: str | Vector | Mapping[str, Vector] | None = None,
        using: str | Sequence[str] | None = None,
        hits: Sequence[Hit] | None = None,
        max_new_tokens: int | None = None,
        grounded: Grounded = False,
        style: Style = "short",
        seed: int = 0,
    ) -> Answer:
        """Answer one question, greedily.

        Args:
            question: a text; or a `Query`, which says by itself what it says, so that only `top_k`, `using` and `seed`
                are read beside it.
            mode: one of `MODES`.
            top_k: how many documents to retrieve.
            type: `open`, `yesno` or `choice` (with `choices`). The last two are answered with the likeliest option, by
                the mean log-probability of its tokens.
            query_filter: restricts the search.
            query: what to search with, if not the question itself: a text, a vector, or vectors by name.
            using: name of the vector to search; several names make it a hybrid search.
            hits: of a retriever of your own, best first (`bank.fetch(ids, scores)`), instead of a search; the first
                `top_k` of them count.
            max_new_tokens: of the answer, instead of the prompt format's.
            grounded: the answer to an open question is a span of the retrieved texts, the one that the model finds
                best; `Answer.source` says where it stands. No text needs to stand in the prompt for that. With "auto"
                it is the free answer where the model is much surer of that: not every answer stands in a text.
            style: of the answer to an open question: `short`, a few words, or a `sentence`.
            seed: of the documents that `random` draws.

        Raises:
            RegradError: for an unknown mode, or what the search and the atoms raise. The weights are φ₀ again.
            ValueError: for a prompt that makes no sense, such as an empty question.
        """
        asked = _query(
            question, mode=mode, type=type, choices=choices, query_filter=query_filter, query=query, hits=hits,
            max_new_tokens=max_new_tokens, grounded=grounded, style=style,
        )  # fmt: skip
        started = time.perf_counter()
        [found] = self.retrieval.retrieve([asked], top_k, using, seed)
        return _warned([self._one(found, started)])[0]

    def _one(self, found: Found, started: float, streamer: Any = None, stopping: Any = None) -> Answer:
        """The answer to one question whose search is done; the update is written into the weights."""
        searched = time.perf_counter()
        task, mode = self.decoder.task(found), found.asked.mode
        with contextlib.ExitStack() as stack:
            [merged] = self.merged([found])
            decoded_at = searched if merged.total is None else time.perf_counter()
            if mode in BARE:
                stack.enter_context(self.adapter.disabled())
            elif merged.total is None:
                stack.enter_context(self.adapter.initial())
            else:
                stack.enter_context(self.adapter.applied_sum(merged.total))
            applied_at = time.perf_counter()
            [said] = self.decoder.answers([task], streamer=streamer, stopping=stopping)
            generated_at = time.perf_counter()
        restored_at = time.perf_counter()
        timings = Timings(
            search=searched - started,
            decode=decoded_at - searched,
            apply=applied_at - decoded_at,
            generate=generated_at - applied_at,
            restore=restored_at - generated_at,
        )
        return answer_of(said, found, merged, timings)

    def stream(
        self, question: str | Query, *, top_k: int = 3, using: str | Sequence[str] | None = None, seed: int = 0
    ) -> AnswerStream:
        """`answer`, piece by piece as the model writes it.

        Iterate over the result; its `answer` is the whole one when it ends. The model is restored when it ends, and
        when it is closed.

        Args:
            question: a text, or a `Query` with all that belongs to it.

        Raises:
            RegradError, ValueError: as `answer`: of the search at once, of the model while iterating.
        """
        self.adapter.check_free()  # the model runs in another thread, which would wait for this one
        asked = _query(question)
        started = time.perf_counter()
        [found] = self.retrieval.retrieve([asked], top_k, using, seed)

        def work(streamer: Any, stopping: Any) -> Answer:
            return _warned([self._one(found, started, streamer, stopping)])[0]

        return AnswerStream(work, self.tokenizer, self.asking, asked.prompt(found.hits))

    def answer_many(
        self,
        questions: Sequence[str | Query],
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        using: str | Sequence[str] | None = None,
        grounded: Grounded = False,
        style: Style = "short",
        seed: int = 0,
    ) -> list[Answer]:
        """Answer a batch of questions together: every forward pass serves all of them, each row with its own update.

        The answers are those of `answer`. The batch is as large as what is given: memory for the keys and values of
        all rows is needed at once. `timings` are the batch's, divided by its size.

        Args:
            questions: texts, all in the same `mode`, `grounded` and `style`, or a `Query` each, of any modes.

        Raises:
            RegradError, ValueError: as `answer`.
        """
        if not questions:
            return []
        asked = _queries(questions, mode, grounded, style)
        started = time.perf_counter()
        found = self.retrieval.retrieve(asked, top_k, using, seed)
        return _warned(self.answered(found, (time.perf_counter() - started) / len(asked)))

    async def aanswer(
        self,
        question: str | Query,
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        type: QuestionType = "open",
        choices: Sequence[str] = (),
        query_filter: Filter | None = None,
        query: str | Vector | Mapping[str, Vector] | None = None,
        using: str | Sequence[str] | None = None,
        hits: Sequence[Hit] | None = None,
        max_new_tokens: int | None = None,
        grounded: Grounded = False,
        style: Style = "short",
        seed: int = 0,
    ) -> Answer:
        """`answer` for asyncio, with the same arguments.

        The search never blocks the event loop (`Retrieval.aretrieve`). Questions that wait at the same time share
        forward passes, on one thread of their own (`batch_size`, `batch_wait`). The answers are those of `answer`.
        """
        self.adapter.check_free()
        asked = _query(
            question, mode=mode, type=type, choices=choices, query_filter=query_filter, query=query, hits=hits,
            max_new_tokens=max_new_tokens, grounded=grounded, style=style,
        )  # fmt: skip
        [found] = await self.retrieval.aretrieve([asked], top_k, using, seed)
        return await self._batcher.ask(found)

    async def aanswer_many(
        self,
        questions: Sequence[str | Query],
        *,
        mode: Mode = "regrad",
        top_k: int = 3,
        using: str | Sequence[str] | None = None,
        grounded: Grounded = False,
        style: Style = "short",
        seed: int = 0,
    ) -> list[Answer]:
        """`answer_many` for asyncio: in batches of at most `batch_size`, together with what else is asked meanwhile."""
        import asyncio

        self.adapter.check_free()
        asked = _queries(questions, mode, grounded, style)
        found = await self.retrieval.aretrieve(asked, top_k, using, seed) if asked else []
        return list(await asyncio.gather(*(self._batcher.ask(one) for one in found)))

    def _answered_together(self, found: list[Found]) -> list[Answer]:
        return _warned(self.answered(found, 0.0))

    def answered(self, found: Sequence[Found], search: float) -> list[Answer]:
        """One batch; `search` is the seconds that each question's search took."""
        asked = [one.asked for one in found]
        times = [time.perf_counter()]
        merged = self.merged(found)
        times.append(time.perf_counter())
        tasks = [self.decoder.task(one) for one in found]
        said: dict[int, Generated] = {}
        for part in parts(tasks):
            with self.adapter.rows([merged[i].total for i in part], [asked[i].mode in BARE for i in part]):
                times.append(time.perf_counter())
                answers = self.decoder.answers([tasks[i] for i in part])
                times.append(time.perf_counter())
            said |= dict(zip(part, answers, strict=True))
        times.append(time.perf_counter())
        decode, *rest = ((end - start) / len(found) for start, end in itertools.pairwise(times))
        *between, restore = rest  # of each part what precedes it, and the model
        timings = Timings(search, decode, sum(between[0::2]), sum(between[1::2]), restore)
        return [answer_of(said[i], one, merged[i], timings) for i, one in enumerate(found)]

    def merged(self, found: Sequence[Found]) -> list[Merged]:
        """Σ wᵢ·g(dᵢ) over the usable hits of each question."""
        applied = [one for one in found if one.asked.mode not in WITHOUT_ATOMS]
        online = [one.asked.mode == "online" for one in applied]
        usable = iter(self.filling.usable([one.hits for one in applied], online))
        merged = []
        for one in found:
            if one.asked.mode in WITHOUT_ATOMS:
                merged.append(Merged(None, {}, one.notes, {}))
                continue
            documents = next(usable)
            total = self._sum(replace(documents, notes=[*one.notes, *documents.notes]), one.asked.question)
            if one.hits and not total.weights:
                total.notes.append(NONE_USABLE)
            merged.append(total)
        return merged

    def export(self, folder: str | Path, question: str, hits: Sequence[Hit], base_model: str | None = None) -> None:
        """Write what answers this question with these documents as an ordinary PEFT LoRA adapter.

        Args:
            hits: as `GradientBank.search` gives them, best first.
            base_model: the base model's name where the adapter is served, if it has another one there.

        Raises:
            DataError: if none of them has a usable atom.
            RecordError: if one can't be decoded; nothing is written then.
        """
        usable = as_stored(hits)
        if not usable.hits:
            raise DataError(f"nothing to export: {'; '.join(usable.notes) or 'no document was given'}")
        weighed = self.weighing.weighed(usable.hits, question)
        self.adapter.export(folder, weighed.records, weighed.shares, base_model)

    def weights(self, hits: Sequence[Hit]) -> list[float]:
        """As `Weighing.weights`."""
        return self.weighing.weights(hits)

    def _sum(self, usable: Usable, question: str) -> Merged:
        """The sum of these hits' atoms; those that turn out to be damaged are left out, recomputed or refused."""
        weighed = self.weighing.weighed(usable.hits, question)
        try:
            total = self.adapter.decode(weighed.records, weighed.shares)
            return Merged(total, weighed.weights, usable.notes, usable.skipped, weighed.windows)
        except RecordError:
            examined = [replace(hit, damaged=self._damage(hit)) for hit in usable.hits]
            if self.filling.policy.on_damaged == "refuse" or not any(hit.damaged for hit in examined):
                raise  # in the second case it is their sum that overflows
        [left] = self.filling.usable([examined], [False])
        return self._sum(Usable(left.hits, [*usable.notes, *left.notes], usable.skipped | left.skipped), question)

    def _damage(self, hit: Hit) -> str | None:
        """Why a hit's record can't be decoded."""
        try:
            self.adapter.decode([hit.record] if hit.record else [], [1.0] if hit.record else [])
        except RecordError as error:
            return str(error)
        return None


def _queries(questions: Sequence[str | Query], mode: Mode, grounded: Grounded, style: Style) -> list[Query]:
    if isinstance(questions, str):
        raise DataError("questions go in a list; one alone is `answer`'s")
    return [_query(question, mode=mode, grounded=grounded, style=style) for question in questions]


def _query(question: str | Query, **said: Any) -> Query:
    """What is asked: a query as it is, a text with what is said of it."""
    return question if isinstance(question, Query) else Query(question, **said)


def _warned(answers: list[Answer]) -> list[Answer]:
    """The same answers; what they lack is warned of, once for each."""
    for notes in filter(None, (answer.notes for answer in answers)):
        warnings.warn("; ".join(notes), stacklevel=3)
    return answers


def answer_of(said: Generated, found: Found, merged: Merged, timings: Timings) -> Answer:
    """What the model said, with all that it came from."""
    return Answer(
        said.text,
        found.asked.mode,
        found.hits,
        timings,
        said.prompt_tokens,
        weights=merged.weights,
        notes=tuple(merged.notes),
        skipped=merged.skipped,
        windows=merged.windows,
        source=_source(said, found),
        finish=said.finish,
    )


def _source(said: Generated, found: Found) -> Source | None:
    if said.span is None:
        return None
    return Source(found.sources[said.span.text].document_id, said.span.start, said.span.end)
