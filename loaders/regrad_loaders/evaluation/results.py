"""What an evaluation measured: predictions, and the rows, intervals and paired differences made of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from regrad_loaders.data.scores import Interval, bootstrap
from regrad_qdrant.model.prompts import QUESTION_TYPES


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
    found: float  # the share of the answer's words that are said
    hits: tuple[str | int, ...]  # ids of the retrieved documents, best first
    seconds: float
    prompt_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """The line of a predictions file."""
        names = ("id", "mode", "question", "answers", "prediction", "f1", "em", "hits")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class Stored:
    """What a baseline keeps of each document in place of an atom."""

    documents: int  # that it was made of
    bytes: int  # the median
    seconds: float  # that one took to make, the mean


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured; `as_dict` is the contract of `--json`."""

    settings: dict[str, Any]
    predictions: list[Prediction]
    recall_at_k: float | None
    against: tuple[str, ...] = ()  # the modes that the others are paired with
    sweep: tuple[tuple[int, Evaluation], ...] = ()  # the same questions at other k
    stored: Mapping[str, Stored] = field(default_factory=dict)  # by mode, of baselines that store something else

    @classmethod
    def joined(cls, settings: dict[str, Any], parts: Sequence[Evaluation], modes: Sequence[str]) -> Evaluation:
        """Several parts of one evaluation, their predictions in the order of the modes."""
        found = sorted((p for part in parts for p in part.predictions), key=lambda p: modes.index(p.mode))
        return cls(settings, found, None)

    @property
    def of_sentences(self) -> bool:
        """Whether open questions were answered with sentences: what these have of the answer's words is shown too."""
        return self.settings.get("style") == "sentence"

    def results(self) -> list[dict[str, Any]]:
        """One row a mode and kind of question, `all` first."""
        return self._rows(lambda prediction: ("all", prediction.kind))

    def types(self) -> list[dict[str, Any]]:
        """One row a mode and type that the set itself gives its questions, where that is not their kind."""
        return self._rows(lambda prediction: () if prediction.type in QUESTION_TYPES else (prediction.type,))

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
            | ({"words_found": mean(row.found for row in rows)} if self.of_sentences else {})
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
        if self.stored:
            found["stored"] = {mode: asdict(kept) for mode, kept in self.stored.items()}
        return found | ({"differences": self.differences()} if self.against else {})

    def named(self, names: Mapping[str, str]) -> Evaluation:
        """The same with its modes under other names."""
        return replace(self, predictions=[replace(p, mode=names[p.mode]) for p in self.predictions])

    def f1_of(self, mode: str) -> float:
        """Mean F1 of one mode over all its questions, 0 to 1."""
        return mean(prediction.f1 for prediction in self.predictions if prediction.mode == mode)


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """One JSON line a question and mode."""
    with path.open("w", encoding="utf-8") as file:
        for prediction in evaluation.predictions:
            file.write(json.dumps(prediction.as_dict(), ensure_ascii=False) + "\n")
