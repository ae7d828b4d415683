"""The plan of an evaluation: which questions, in which modes, and which initialization answers which of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from regrad_loaders.data.folders import Question
from regrad_qdrant.answer.query import MODES, WITHOUT_DOCUMENTS, Grounded, Mode
from regrad_qdrant.bank.layouts import value_at
from regrad_qdrant.errors import DataError

ICL = "regrad+icl"  # the mode that has an initialization of its own, trained with the passages in the prompt


Made = Literal["raw", "cpt", "instruction-cpt", "prag"]  # on the spot, from the corpus
Reads = Literal["key values"] | int  # passages otherwise than in the prompt as they are: an int is how many tokens


@dataclass(frozen=True)
class Baseline:
    """A mode of evaluations alone: a mode of the pipeline's with an initialization made for comparison."""

    name: str
    runs: Mode
    fine_tuned: str | None = None  # the baseline whose folder its initialization is, or begins with
    made: Made | None = None  # what is made of that, or of fresh tensors in the layers of --init
    reads: Reads | None = None


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("raw", "regrad", made="raw"),  # no meta-training
        Baseline("ft-direct", "init", "ft-direct"),
        Baseline("ft-rag", "init+icl", "ft-rag"),
        Baseline("cpt", "init", made="cpt"),
        Baseline("instruction-cpt", "init", made="instruction-cpt"),
        Baseline("ft-cpt", "init", "ft-direct", made="cpt"),
        Baseline("prag", "regrad", made="prag"),
        Baseline("ft-prag", "regrad", "ft-direct", made="prag"),
        Baseline("rag-kv", "rag", reads="key values"),
        Baseline("ft-rag-kv", "init+icl", "ft-rag", reads="key values"),
        Baseline("ft-rag-64", "init+icl", "ft-rag", reads=64),
        Baseline("ft-rag-128", "init+icl", "ft-rag", reads=128),
    )
}
FINE_TUNED = ("ft-direct", "ft-rag")  # the baselines that are folders
# What ends the name of a mode whose answers are spans of the retrieved texts, or may be.
GROUNDED: dict[str, Grounded] = {"/grounded": True, "/auto": "auto"}
_FREE: tuple[str, ...] = (*MODES, *BASELINES)
_IN_TWO_WAYS = [mode for mode in _FREE if mode not in BASELINES or BASELINES[mode].reads != "key values"]
EVALUATION_MODES = (*_FREE, *(f"{mode}{ending}" for ending in GROUNDED for mode in _IN_TWO_WAYS))


@dataclass(frozen=True)
class Party:
    """One initialization, and what it answers."""

    init: str  # a shipped name or a folder
    modes: dict[str, str]  # what it runs, and under which name that stands in the results
    fills: bool  # whether the bank holds its atoms under the payload key that was given
    made: Made | None
    reads: Reads | None
    starts: bool  # whether what is made begins with `init`; otherwise it only has its layers


def parties(modes: Sequence[str], init: str, icl_init: str, fine_tuned: Mapping[str, str | None]) -> list[Party]:
    """Who answers, in the order in which they do: first the one whose atoms a named bank is filled with, so that the
    others find its passages there.

    Args:
        init: the initialization of all modes but the baselines and `regrad+icl`.
        fine_tuned: the folders of the fine-tuned baselines, None where there is none.

    Raises:
        DataError: for a fine-tuned baseline without a folder.
    """
    groups: dict[tuple[str, Made | None, Reads | None, bool], dict[str, str]] = {}
    for mode in modes:
        name, _ = free(mode)
        baseline = BASELINES.get(name, Baseline(name, name))
        folder = fine_tuned.get(baseline.fine_tuned) if baseline.fine_tuned else icl_init if name == ICL else init
        if folder is None:
            raise DataError(
                f"the mode {mode} needs a fine-tuned baseline: --{baseline.fine_tuned} FOLDER, of a recipe with "
                "`atoms: false`; ours stand in the repository, under benchmarks/baselines"
            )
        kind = (folder, baseline.made, baseline.reads, baseline.fine_tuned is not None)
        groups.setdefault(kind, {})[f"{baseline.runs}{mode.removeprefix(name)}"] = mode
    wanted = [(init, None, None, False), (icl_init, None, None, False), *groups]
    own = next((kind for kind in wanted if kind in groups and kind[1] is None), None)  # what is made here fills none
    order = sorted(groups, key=lambda kind: kind != own)  # stable: the others stay in theirs
    return [Party(kind[0], groups[kind], kind == own, *kind[1:]) for kind in order]


def retrieves(mode: str) -> bool:
    """Whether a mode of an evaluation looks anything up."""
    name, grounded = free(mode)
    return bool(grounded) or (BASELINES[name].runs if name in BASELINES else name) not in WITHOUT_DOCUMENTS


def free(mode: str) -> tuple[Any, Grounded]:
    """A mode's name without its ending, and whether its answers are grounded."""
    name, slash, ending = mode.partition("/")
    return name, GROUNDED[slash + ending] if slash else False


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
    skip_samples: Sequence[int] = (),
) -> list[Question]:
    """The questions of a split and type: the first `limit` of them, or `sample` drawn at random, the same every time.

    Args:
        skip_samples: leave out those that samples of these sizes draw (a smaller one is not a part of a larger): what
            was chosen on those is judged by others.

    Raises:
        DataError: if there are none; the error lists the splits or types there are.
    """
    chosen = [question for question in questions if split is None or question.split == split]
    if not chosen:
        raise DataError(f"no questions of split {split!r}; splits found: {sorted({q.split for q in questions})}")
    typed = [question for question in chosen if of_type is None or question.type == of_type]
    if not typed:
        raise DataError(f"no questions of type {of_type!r}; types found: {sorted({q.type for q in chosen})}")
    if skip_samples:
        seen = {question.id for count in skip_samples for question in _drawn(typed, count)}
        typed = [question for question in typed if question.id not in seen]
        if not typed:
            raise DataError(f"--skip-sample {' '.join(map(str, skip_samples))} leaves no question")
    return (typed if sample is None else _drawn(typed, sample))[:limit]


def _drawn(questions: list[Question], count: int) -> list[Question]:
    """So many of the questions, at random, the same every time, in their order."""
    if count >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(0).sample(range(len(questions)), count))]


def field_filter(question: Question, field: str | None) -> Any:
    """The filter on passages that share the question's own value of a field; dots descend into objects.

    Raises:
        DataError: as `own_value`.
    """
    from qdrant_client import models

    if field is None:
        return None
    match = models.MatchValue(value=own_value(question, field))
    return models.Filter(must=[models.FieldCondition(key=field, match=match)])


def own_value(question: Question, field: str) -> str | int:
    """What a question has in a field; dots descend into objects.

    Raises:
        DataError: if the question has no such field, or no text, whole number or truth value there.
    """
    value = question.fields[field] if field in question.fields else value_at(question.fields, field)
    if value is None:
        raise DataError(f"question {question.id!r} has no field {field!r}; it has {sorted(question.fields)}")
    if not isinstance(value, str | int):
        raise DataError(f"question {question.id!r}: can't filter on {field!r} = {value!r}")
    return value
