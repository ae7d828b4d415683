"""Evaluation: the same questions in several modes, side by side."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.plots import new_figure
from regrad_loaders.evaluation.scores import Interval, accuracy, bootstrap, chosen, exact_match, f1
from regrad_qdrant.answer.pipeline import MODES, Answer, Mode, Query, ReGrad
from regrad_qdrant.bank.bank import GradientBank
from regrad_qdrant.bank.documents import Hit, point_id
from regrad_qdrant.bank.stores.base import PointId
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.prompts import INSTRUCTIONS

_Given = dict[PointId, float]  # what a question is answered from where it is not what its search returns: point → score


@dataclass(frozen=True)
class Prediction:
    """One question answered in one mode."""

    id: str
    mode: str
    kind: str  # open, yesno or choice
    type: str  # the set's own word for it
    question: str
    answers: tuple[str, ...]
    prediction: str
    f1: float
    em: float
    accuracy: float
    hits: tuple[str | int, ...]  # ids of the retrieved documents, best first
    seconds: float
    prompt_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The line of a predictions file."""
        names = ("id", "mode", "question", "answers", "prediction", "f1", "em", "hits")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured; `as_dict` is the contract of `--json`."""

    settings: dict[str, Any]
    predictions: list[Prediction]
    recall_at_k: float | None
    against: tuple[str, ...] = ()  # the modes that the others are paired with
    sweep: tuple[tuple[int, Evaluation], ...] = ()  # the same questions at other k

    def results(self) -> list[dict[str, Any]]:
        """One row a mode and kind of question, `all` first."""
        return self._rows(lambda prediction: ("all", prediction.kind))

    def types(self) -> list[dict[str, Any]]:
        """One row a mode and type that the set itself gives its questions, where that is not their kind."""
        return self._rows(lambda prediction: () if prediction.type in INSTRUCTIONS else (prediction.type,))

    def _rows(self, groups_of: Callable[[Prediction], tuple[str, ...]]) -> list[dict[str, Any]]:
        groups: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
        for prediction in self.predictions:
            for group in groups_of(prediction):
                groups[prediction.mode, group].append(prediction)
        return [
            {
                "mode": mode,
                "type": group,
                "n": len(rows),
                "f1": mean(row.f1 for row in rows),
                "em": mean(row.em for row in rows),
                "accuracy": mean(row.accuracy for row in rows) if group in ("yesno", "choice") else None,
                "seconds": sum(row.seconds for row in rows),
                "prompt_tokens": mean(row.prompt_tokens for row in rows),
            }
            for (mode, group), rows in groups.items()
        ]

    def intervals(self) -> list[dict[str, Any]]:
        """The 95 % bootstrap interval of each mode's F1."""
        scores: dict[str, list[float]] = defaultdict(list)
        for prediction in self.predictions:
            scores[prediction.mode].append(prediction.f1)
        return [{"mode": mode, "f1": mean(of), "f1_interval": _ends(bootstrap(of))} for mode, of in scores.items()]

    def differences(self) -> list[dict[str, Any]]:
        """Every mode's F1 minus that of each in `against`, over the same questions, with the paired interval."""
        scores: dict[str, dict[str, float]] = defaultdict(dict)
        for prediction in self.predictions:
            scores[prediction.mode][prediction.id] = prediction.f1
        rows = []
        for other in self.against:
            for mode in scores:
                if mode != other:
                    found = bootstrap([scores[mode][key] - there for key, there in scores[other].items()])
                    rows.append({"mode": mode, "minus": other, "f1": found.mean, "f1_interval": _ends(found)})
        return rows

    def as_dict(self) -> dict[str, Any]:
        found = {"settings": self.settings, "results": self.results(), "recall_at_k": self.recall_at_k}
        found["intervals"] = self.intervals()
        if types := self.types():
            found["types"] = types
        if self.sweep:
            found["sweep"] = [{"top_k": k} | row for k, other in self.sweep for row in other.intervals()]
        return found | ({"differences": self.differences()} if self.against else {})

    def named(self, names: Mapping[str, str]) -> Evaluation:
        """The same with its modes under other names."""
        return replace(self, predictions=[replace(p, mode=names[p.mode]) for p in self.predictions])

    def f1_of(self, mode: str) -> float:
        """Mean F1 of one mode over all its questions, 0 to 1."""
        return mean(prediction.f1 for prediction in self.predictions if prediction.mode == mode)


def evaluate(
    regrad: ReGrad,
    questions: Sequence[Question],
    modes: Sequence[Mode],
    *,
    top_k: int = 3,
    using: str | None = None,
    filter_field: str | None = None,
    oracle: bool = False,
    distractors: int = 0,
    batch: int = 1,
    settings: dict[str, Any] | None = None,
    on_progress: Callable[[Prediction], None] = lambda _: None,
) -> Evaluation:
    """Ask every question in every mode.

    Args:
        filter_field: restricts each question's search to passages with the question's own value of this field.
        oracle: answer from the gold passages instead of what is retrieved, with equal scores.
        distractors: random documents added to those of every question, under the lowest of their scores (the paper's
            noise test).
        batch: questions answered together; the answers do not depend on it, the seconds do.
        settings: recorded with the results.
        on_progress: called with each prediction.

    Raises:
        DataError: for no questions, a question without the filter field, or an oracle without gold passages.
    """
    if not questions:
        raise DataError("no questions to evaluate on: check --split and --limit")
    filters = [field_filter(question, filter_field) for question in questions]
    searched = [
        regrad.bank.search(question.question, top_k, using=using, query_filter=only, with_records=False)
        for question, only in zip(questions, filters, strict=True)
    ]
    given: list[_Given | None] = [None] * len(questions)
    if oracle or distractors:
        given = list(_given(regrad.bank, questions, searched, oracle, distractors))
    used = [points or {hit.id: hit.score for hit in hits} for points, hits in zip(given, searched, strict=True)]
    others = _of_others(regrad.bank, questions, used) if "random" in modes else given
    most = max([top_k, *(len(points) for points in given if points)])
    # Questions whose prompts are about as long are answered together: little of a batch is padding.
    by_length = sorted(range(len(questions)), key=lambda i: sum(len(hit.text) for hit in searched[i]))
    predictions: list[Prediction] = []
    for mode in modes:
        run: Mode = "regrad" if mode == "random" else mode
        answered: dict[int, Prediction] = {}
        for start in range(0, len(by_length), batch):
            part = by_length[start : start + batch]
            queries = []
            for i in part:
                # Fetched now and not before: an atom that the mode before left in the bank is not computed again.
                hits = _fetched(regrad.bank, (others if mode == "random" else given)[i])
                asked = questions[i]
                queries.append(Query(asked.question, run, asked.kind, tuple(asked.choices), filters[i], hits=hits))
            started = time.perf_counter()
            answers = regrad.answer_many(queries, top_k=most, using=using)
            seconds = (time.perf_counter() - started) / len(part)
            for i, answer in zip(part, answers, strict=True):
                answered[i] = _scored(questions[i], replace(answer, mode=mode), seconds)
                on_progress(answered[i])
        predictions += [answered[i] for i in range(len(questions))]
    recalls = []
    for question, hits in zip(questions, searched, strict=True):
        if question.gold_ids:
            found = {str(hit.document_id) for hit in hits}
            recalls.append(len(found & set(question.gold_ids)) / len(set(question.gold_ids)))
    return Evaluation(settings or {}, predictions, mean(recalls) if recalls else None)


def _given(
    bank: GradientBank, questions: Sequence[Question], searched: Sequence[Sequence[Hit]], oracle: bool, distractors: int
) -> Iterator[_Given]:
    everything = [hit.id for hit in bank.points()] if distractors else []
    for question, hits in zip(questions, searched, strict=True):
        points: _Given = {hit.id: hit.score for hit in hits}
        if oracle:
            if not question.gold_ids:
                raise DataError(f"question {question.id!r} names no gold passages (gold_ids), which --oracle needs")
            points = {point_id(key): 1.0 for key in question.gold_ids}
        lowest = min(points.values(), default=1.0)
        left = [key for key in everything if key not in points]
        drawn = random.Random(question.id).sample(left, min(distractors, len(left)))
        yield points | dict.fromkeys(drawn, lowest)


def _fetched(bank: GradientBank, points: _Given | None) -> list[Hit] | None:
    if points is None:
        return None
    return bank.fetch(list(points), list(points.values())) if points else []


def _of_others(bank: GradientBank, questions: Sequence[Question], used: Sequence[_Given]) -> list[_Given | None]:
    """For each question as many documents as it is answered from, under the same scores, drawn from those of the other
    questions, so that their atoms are there already; where these are too few, from the whole bank. Neither its own
    documents nor its gold passages."""
    # Sorted: the engine leaves the order of equal scores open, and the draw must not depend on it.
    pool = sorted({key for points in used for key in points}, key=str)
    everything: list[PointId] = []
    found: list[_Given | None] = []
    for question, points in zip(questions, used, strict=True):
        own = set(points) | {point_id(key) for key in question.gold_ids}
        left = [key for key in pool if key not in own]
        if len(left) < len(points):
            everything = everything or sorted((hit.id for hit in bank.points()), key=str)
            left = [key for key in everything if key not in own]
        drawn = random.Random(question.id).sample(left, min(len(points), len(left)))
        found.append(dict(zip(drawn, points.values(), strict=False)))
    return found


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def plot(evaluation: Evaluation, path: Path) -> None:
    """A bar for each mode's F1, with its 95 % interval.

    Raises:
        DataError: without matplotlib.
    """
    rows = evaluation.intervals()
    count = len(evaluation.predictions) // len(rows)
    figure = new_figure(1.2 + 0.9 * len(rows), 3.6)
    panel = figure.subplots()
    values = [100 * row["f1"] for row in rows]
    spread = [[100 * abs(row["f1"] - row["f1_interval"][end]) for row in rows] for end in (0, 1)]
    names = [f"{row['mode']}\n{value:.1f}" for row, value in zip(rows, values, strict=True)]
    panel.bar(names, values, yerr=spread, capsize=4, color="#5b7fa6")
    panel.set(ylabel="F1", title=f"{count} questions, 95 % intervals")
    figure.savefig(path, dpi=120)


def _scored(question: Question, answer: Answer, seconds: float) -> Prediction:
    said = chosen(answer.text, question.choices)
    return Prediction(
        id=question.id,
        mode=answer.mode,
        kind=question.kind,
        type=question.type,
        question=question.question,
        answers=question.answers,
        prediction=answer.text,
        f1=f1(said, question.answers),
        em=exact_match(said, question.answers),
        accuracy=accuracy(said, question.answers),
        hits=tuple(hit.document_id for hit in answer.hits),
        seconds=seconds,
        prompt_tokens=answer.prompt_tokens,
    )


RAW = "raw"  # regrad without meta-training
# Modes of an evaluation alone, and what they run with another initialization than --init.
OTHERS: dict[str, Mode] = {RAW: "regrad", "ft-direct": "init", "ft-rag": "init+icl"}
EVALUATION_MODES: tuple[str, ...] = (*MODES, *OTHERS)


def parse_modes(text: str, known: Sequence[str] = MODES) -> list[Any]:
    """Modes from a comma-separated list.

    Raises:
        DataError: for an unknown one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise DataError(f"unknown modes {unknown}: choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def select(
    questions: Sequence[Question],
    split: str | None,
    limit: int | None = None,
    *,
    sample: int | None = None,
    of_type: str | None = None,
) -> list[Question]:
    """The questions of a split and type: the first `limit` of them, or `sample` drawn at random, the same every time.

    Raises:
        DataError: if there are none; the error lists the splits or types there are.
    """
    chosen = [question for question in questions if split is None or question.split == split]
    if not chosen:
        raise DataError(f"no questions of split {split!r}; splits found: {sorted({q.split for q in questions})}")
    typed = [question for question in chosen if of_type is None or question.type == of_type]
    if not typed:
        raise DataError(f"no questions of type {of_type!r}; types found: {sorted({q.type for q in chosen})}")
    if sample is not None and sample < len(typed):
        drawn = random.Random(0).sample(range(len(typed)), sample)
        typed = [typed[i] for i in sorted(drawn)]
    return typed[:limit]


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """One JSON line a question and mode."""
    with path.open("w", encoding="utf-8") as file:
        for prediction in evaluation.predictions:
            file.write(json.dumps(prediction.as_dict(), ensure_ascii=False) + "\n")


def field_filter(question: Question, field: str | None) -> Any:
    """The filter on passages that share the question's own value of a field.

    Raises:
        DataError: if the question has no such field, or no text, whole number or truth value there.
    """
    from qdrant_client import models

    if field is None:
        return None
    if not isinstance(question.fields.get(field, ""), str | int):
        raise DataError(f"question {question.id!r}: can't filter on {field!r} = {question.fields[field]!r}")
    if field not in question.fields:
        raise DataError(f"question {question.id!r} has no field {field!r}; it has {sorted(question.fields)}")
    return models.Filter(must=[models.FieldCondition(key=field, match=models.MatchValue(value=question.fields[field]))])
