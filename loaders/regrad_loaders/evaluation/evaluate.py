"""Evaluation: the same questions in several modes, side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, Literal

from regrad_loaders.data.folders import Question
from regrad_loaders.data.scores import words_found
from regrad_loaders.evaluation.answering import Answering
from regrad_loaders.evaluation.plan import field_filter, free
from regrad_loaders.evaluation.protocol import OWN, OwnProtocol
from regrad_loaders.evaluation.results import Evaluation, Prediction
from regrad_qdrant.answer.query import Answer, Query
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Hit, point_id
from regrad_qdrant.bank.stores.base import PointId
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import Style

# What a question is answered from where it is not what its search returns: point → (score, relevance).
_Given = dict[PointId, tuple[float, float | None]]


def evaluate(
    regrad: Answering,
    questions: Sequence[Question],
    modes: Sequence[str],
    *,
    top_k: int = 3,
    using: str | Sequence[str] | None = None,
    filter_field: str | None = None,
    oracle: bool = False,
    retrieved: bool = False,
    distractors: int = 0,
    batch: int = 1,
    style: Style = "short",
    protocol: OwnProtocol = OWN,
    settings: dict[str, Any] | None = None,
    on_progress: Callable[[Prediction], None] = lambda _: None,
    known: Mapping[tuple[str, str], Prediction] = {},
) -> Evaluation:
    """Ask every question in every mode.

    Args:
        modes: the pipeline's, each also as `MODE/grounded` and `MODE/auto`; of a grounded `random` the texts are those
            of the search, the atoms alone are others'.
        filter_field: restricts each question's search to passages with the question's own value of this field.
        oracle: answer from the gold passages instead of what is retrieved, with equal scores; with `distractors` all of
            them under the scores of a search among them alone.
        retrieved: answer from the first `top_k` passages that the question names as retrieved for it.
        distractors: random documents added to those of every question, under the lowest of their scores (the paper's
            noise test).
        batch: questions answered together; the answers do not depend on it, the seconds do.
        style: of the answers to open questions.
        protocol: how questions are put, and answers scored.
        settings: recorded with the results.
        on_progress: called with each prediction that is made.
        known: of an earlier run, by mode and question: those are not asked again.

    Raises:
        DataError: for no questions, a question without the filter field, or one without the gold passages of an oracle
            or the retrieved ones.
    """
    if not questions:
        raise DataError("no questions to evaluate on: check --split and --limit")
    filters = [field_filter(question, filter_field) for question in questions]
    searched = [
        regrad.bank.search(question.question, top_k, using=using, query_filter=only, with_records=False)
        for question, only in zip(questions, filters, strict=True)
    ]
    given: list[_Given | None] = [None] * len(questions)
    if oracle or retrieved or distractors:
        kind = "gold_ids" if oracle else "retrieved" if retrieved else None
        given = list(_given(regrad.bank, questions, searched, filters, kind, top_k, distractors, using))
    used = [
        points or {hit.id: (hit.score, hit.relevance) for hit in hits}
        for points, hits in zip(given, searched, strict=True)
    ]
    others = given
    if any(free(mode)[0] == "random" for mode in modes):
        others = _of_others(regrad.bank, questions, used, filters)
    most = max([top_k, *(len(points) for points in given if points)])
    # Questions whose prompts are about as long are answered together: little of a batch is padding.
    by_length = sorted(range(len(questions)), key=lambda i: sum(len(hit.text) for hit in searched[i]))
    predictions: list[Prediction] = []
    for mode in modes:
        run, grounded = free(mode)
        is_random = run == "random"
        answered = {i: known[mode, one.id] for i, one in enumerate(questions) if (mode, one.id) in known}
        left = [i for i in by_length if i not in answered]
        for start in range(0, len(left), batch):
            part = left[start : start + batch]
            queries = []
            for i in part:
                # Fetched now and not before: an atom that the mode before left in the bank is not computed again.
                hits = _fetched(regrad.bank, (others if is_random else given)[i])
                queries.append(
                    Query(
                        mode="regrad" if is_random else run,
                        query=None if hits is not None else questions[i].question,
                        query_filter=filters[i],
                        hits=hits,
                        grounded=grounded,
                        sources=_fetched(regrad.bank, used[i]) if is_random and grounded else None,
                        style=style,
                        **protocol.asks(questions[i], run),
                    )
                )
            started = time.perf_counter()
            answers = regrad.answer_many(queries, top_k=most, using=using)
            seconds = (time.perf_counter() - started) / len(part)
            for i, answer in zip(part, answers, strict=True):
                answered[i] = _scored(questions[i], answer, mode, seconds, protocol)
                on_progress(answered[i])
        predictions += [answered[i] for i in range(len(questions))]
    return Evaluation(
        settings or {}, predictions, None if oracle or retrieved else recall(regrad.bank, questions, searched)
    )


def recall(bank: GradientBank, questions: Sequence[Question], searched: Sequence[Sequence[Hit]]) -> float | None:
    """The mean share of each question's gold passages among its hits, by the ids of points or of documents.

    None where no question names any, or the collection knows none of them.
    """
    shares = []
    for question, hits in zip(questions, searched, strict=True):
        if golds := set(question.gold_ids):
            found = {str(hit.document_id) for hit in hits} | {str(hit.id) for hit in hits}
            shares.append(len(found & golds) / len(golds))
    if shares and not any(shares):
        golds = {key for question in questions for key in question.gold_ids}
        if not any({str(hit.document_id), str(hit.id)} & golds for hit in bank.points()):
            return None
    return mean(shares) if shares else None


def _given(
    bank: GradientBank,
    questions: Sequence[Question],
    searched: Sequence[Sequence[Hit]],
    filters: Sequence[Any],
    kind: Literal["gold_ids", "retrieved"] | None,
    top_k: int,
    distractors: int,
    using: str | Sequence[str] | None,
) -> Iterator[_Given]:
    """What each question is answered from: the passages that it names, or what its search found, and others.

    Args:
        kind: the field of a question whose passages take the place of what its search found.
    """
    passing = _Passing(bank)
    named = [_named(question, kind, top_k) for question in questions]
    known = _points_of(bank, {key for keys in named for key in keys})
    for question, keys, hits, only in zip(questions, named, searched, filters, strict=True):
        points: _Given = {hit.id: (hit.score, hit.relevance) for hit in hits}
        if kind is not None:
            if not keys:
                raise DataError(f"question {question.id!r} names no passages ({kind})")
            if absent := [key for key in keys if key not in known]:
                raise DataError(
                    f"question {question.id!r}: its passage {absent[0]!r} is not in the collection, neither as a "
                    "point's id nor in its id field (--id-field)"
                )
            relevance = 1.0 if kind == "gold_ids" else None  # of retrieved ones the order alone is known
            points = {known[key]: (1.0, relevance) for key in keys}
        lowest = list(points.values())[-1] if points else (1.0, 1.0)
        left = [key for key in passing.ids(only) if key not in points] if distractors else []
        drawn = random.Random(question.id).sample(left, min(distractors, len(left)))
        if kind == "gold_ids" and drawn:
            yield _ranked(bank, question, [*points, *drawn], using)
        else:
            yield points | dict.fromkeys(drawn, lowest)


def _ranked(
    bank: GradientBank, question: Question, ids: Sequence[PointId], using: str | Sequence[str] | None
) -> _Given:
    """These documents as a search among them alone ranks them, and below them those that it does not find."""
    from qdrant_client import models

    only = models.Filter(must=[models.HasIdCondition(has_id=list(ids))])
    hits = bank.search(question.question, len(ids), using=using, query_filter=only, with_records=False)
    if not hits:
        return dict.fromkeys(ids, (1.0, 1.0))
    found: _Given = {hit.id: (hit.score, hit.relevance) for hit in hits}
    return found | dict.fromkeys([key for key in ids if key not in found], (0.0, 0.0))


def _named(question: Question, kind: str | None, top_k: int) -> Sequence[str]:
    """The passages that a question names: all that are gold, or the first of those that were retrieved for it."""
    if kind is None:
        return ()
    return question.gold_ids if kind == "gold_ids" else question.fields.get("retrieved", ())[:top_k]


def _points_of(bank: GradientBank, wanted: set[str]) -> dict[str, PointId]:
    """The points of these passages: by the id that a document of that name gets, or else by looking."""
    direct = {point_id(key): key for key in wanted}
    found = {direct[hit.id]: hit.id for hit in bank.fetch(list(direct))} if direct else {}
    if len(found) < len(wanted):
        for hit in bank.points():
            found |= {str(key): hit.id for key in (hit.id, hit.document_id) if str(key) in wanted}
    return found


class _Passing:
    """The ids of all points that pass a filter, looked up once for each filter."""

    def __init__(self, bank: GradientBank) -> None:
        self.bank = bank
        self._ids: dict[str, list[PointId]] = {}

    def ids(self, only: Any) -> list[PointId]:
        key = "" if only is None else only.model_dump_json()
        if key not in self._ids:
            self._ids[key] = sorted((hit.id for hit in self.bank.points(only)), key=str)
        return self._ids[key]


def _fetched(bank: GradientBank, points: _Given | None) -> list[Hit] | None:
    if points is None:
        return None
    hits = bank.fetch(list(points)) if points else []
    return [replace(hit, score=points[hit.id][0], relevance=points[hit.id][1]) for hit in hits]


def _of_others(
    bank: GradientBank, questions: Sequence[Question], used: Sequence[_Given], filters: Sequence[Any] = ()
) -> list[_Given | None]:
    """For each question as many documents as it is answered from, under the same scores, drawn from those of the other
    questions, so that their atoms are there already; where these are too few, from the whole bank. Neither its own
    documents nor its gold passages, and none that its filter excludes."""
    # Sorted: the engine leaves the order of equal scores open, and the draw must not depend on it.
    pool = sorted({key for points in used for key in points}, key=str)
    passing = _Passing(bank)
    golds = _points_of(bank, {key for question in questions for key in question.gold_ids})
    found: list[_Given | None] = []
    for i, (question, points) in enumerate(zip(questions, used, strict=True)):
        own = set(points) | {golds[key] for key in question.gold_ids if key in golds}
        only = filters[i] if filters else None
        allowed = None if only is None else set(passing.ids(only))
        left = [key for key in pool if key not in own and (allowed is None or key in allowed)]
        if len(left) < len(points):
            left = [key for key in passing.ids(only) if key not in own]
        drawn = random.Random(question.id).sample(left, min(len(points), len(left)))
        found.append(dict(zip(drawn, points.values(), strict=False)))
    return found


def _scored(question: Question, answer: Answer, mode: str, seconds: float, protocol: OwnProtocol) -> Prediction:
    scores = protocol.scores(question, answer.text)
    return Prediction(
        id=question.id,
        mode=mode,
        kind=question.kind,
        type=question.type,
        question=question.question,
        answers=question.answers,
        prediction=answer.text,
        f1=scores.f1,
        em=scores.em,
        accuracy=scores.accuracy,
        found=words_found(scores.said, scores.answers),
        hits=tuple(hit.document_id for hit in answer.hits),
        seconds=seconds,
        prompt_tokens=answer.prompt_tokens,
    )
