"""Questions made of passages themselves: a sentence with a name, a number or a date left out.

Real questions are few, and a passage often has only one; these ask for whatever else it says, so that one gradient
serves several questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from regrad_loaders.data.folders import Dataset, Question

BLANK = "____"
INSTRUCTION = "Fill in the blank:"
MIN_WORDS, MAX_WORDS = 7, 24  # of a sentence that is asked

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])|\n+")
# Names of up to four capitalized words, which may be joined by "of", "the" or "and"; numbers and dates.
_NAME = r"[A-Z][\w’'-]+(?: (?:(?:of|the|and|de|von) ){0,2}[A-Z][\w’'-]+){0,3}"
_NUMBER = r"\d[\d,.]*\d|\d"
_ANSWER = re.compile(rf"(?<![\w-])(?:{_NAME}|{_NUMBER})(?![\w-])")


def cloze_questions(dataset: Dataset, questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """At most `count` of each gold passage of the questions, unless it is also one of a question of another split.

    What is left out stands once in its passage and is not the first word of its sentence, which any word could be.
    """
    splits = {question.split for question in questions}
    golds = dict.fromkeys(key for question in questions for key in question.gold_ids)
    kept_out = {key for question in dataset.questions if question.split not in splits for key in question.gold_ids}
    texts = {passage.id: passage.text for passage in dataset.passages}
    found = []
    for key in golds:
        if key in kept_out or key not in texts:
            continue
        rng = random.Random(f"{seed}-{key}")
        found_here = blanks(texts[key])
        for i, (sentence, answer) in enumerate(rng.sample(found_here, min(count, len(found_here)))):
            found.append(Question(f"{key}-cloze{i}", f"{INSTRUCTION} {sentence}", (answer,), (key,), type="cloze"))
    return found


def blanks(text: str) -> list[tuple[str, str]]:
    """(the sentence with a blank, what stood there) for everything that can be left out."""
    found = []
    for sentence in _SENTENCE.split(text):
        sentence = sentence.strip()
        if not MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            continue
        for match in _ANSWER.finditer(sentence):
            answer = match[0]
            if match.start() == 0 or text.count(answer) > 1:
                continue
            found.append((sentence[: match.start()] + BLANK + sentence[match.end() :], answer))
    return found
