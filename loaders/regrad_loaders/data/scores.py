"""Scores of answers: SQuAD's exact match and token F1, and accuracy for yes/no and choices."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LETTER = re.compile(r"([A-Za-z])(?:[).:]|$)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def chosen(prediction: str, choices: Sequence[str]) -> str:
    """The choice that an answer such as "B", "B)" or "B) London" means; any other answer, or a choice itself, as it
    is."""
    if prediction.strip() in choices:
        return prediction
    found = _LETTER.match(prediction.strip())
    if found and ord(found[1].upper()) - ord("A") < len(choices):
        return choices[ord(found[1].upper()) - ord("A")]
    return prediction


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space (as SQuAD's own script does)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalization, else 0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 of the prediction against any of the answers."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def words_found(prediction: str, answers: Sequence[str]) -> float:
    """The largest share of an answer's words that the prediction has: of a sentence, what it tells."""
    said = Counter(normalize(prediction).split())
    shares = []
    for answer in answers:
        wanted = normalize(answer).split()
        shares.append(sum((said & Counter(wanted)).values()) / len(wanted) if wanted else 0.0)
    return max(shares)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction begins with one of the answers (for yes/no), else 0."""
    said = normalize(prediction)
    return float(any(said == wanted or said.startswith(f"{wanted} ") for wanted in map(normalize, answers)))


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def in_percent(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} … {100 * self.high:.1f})"


def bootstrap(values: Sequence[float], rounds: int = 2000, seed: int = 0) -> Interval:
    """The mean over questions and its 95 % percentile interval. For a difference of two modes give the paired
    differences."""
    rng = np.random.default_rng(seed)
    numbers = np.asarray(values, dtype=float)
    means = numbers[rng.integers(len(numbers), size=(rounds, len(numbers)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(numbers.mean()), float(low), float(high))


def pooled(found: Sequence[Interval]) -> Interval:
    """The mean of several sets' means, with the interval of independent sets."""
    middle = mean(interval.mean for interval in found)
    half = math.sqrt(sum(((interval.high - interval.low) / 2) ** 2 for interval in found)) / len(found)
    return Interval(middle, middle - half, middle + half)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))
