"""How questions are put and answers scored: our own way, or as the paper's evaluation does.

The paper's: every question is answered freely, in at most 20 tokens, up to the first line break. Yes and no count
wherever they stand in that line, choices by their letters; F1 is 0 where exactly one of prediction and answer is yes,
no or "noanswer". Its retrieval (Elasticsearch's English analyzer over title and text) is not part of it: a bank
searches as it does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrad_loaders.data.folders import Question
from regrad_loaders.data.scores import accuracy, chosen, exact_match, f1, normalize
from regrad_qdrant.answer.query import WITH_PASSAGES
from regrad_qdrant.model.prompts import PromptFormat

MAX_NEW_TOKENS = 20
CLOSED = ("yes", "no", "noanswer")


@dataclass(frozen=True)
class Scores:
    """Of one answer, 0 to 1 each."""

    said: str  # what counted as the answer
    answers: tuple[str, ...]  # what it was compared with
    f1: float
    em: float
    accuracy: float


class OwnProtocol:
    """Of questions with options the likeliest one; F1 as SQuAD's."""

    def asks(self, question: Question, run: str) -> dict[str, Any]:
        """The fields of the query beside its mode and filter."""
        return {"question": question.question, "type": question.kind, "choices": question.choices}

    def scores(self, question: Question, text: str) -> Scores:
        said = chosen(text, question.choices)
        gold = tuple(chosen(answer, question.choices) for answer in question.answers)  # letters, or the choices' texts
        em = exact_match(said, gold)
        return Scores(said, gold, f1(said, gold), em, em if question.choices else accuracy(said, gold))


OWN = OwnProtocol()


class PaperProtocol(OwnProtocol):
    """The paper's.

    Args:
        questions: all that are asked: whether "maybe" is an answer, as in PubMedQA, is seen from them.
    """

    def __init__(self, questions: Sequence[Question], format: PromptFormat) -> None:
        golds = {answer.strip().lower() for question in questions for answer in question.answers}
        options = "yes|no|maybe" if "maybe" in golds else "yes|no"
        self._options = re.compile(rf"\b({options})\b", re.IGNORECASE)
        self._format = format

    def asks(self, question: Question, run: str) -> dict[str, Any]:
        format, kind = self._format, question.kind
        listed = [format.choice.format(letter=chr(65 + i), text=text) for i, text in enumerate(question.choices)]
        system = format.system_message(kind, shows=run in WITH_PASSAGES, engineered=run == "pe-rag")
        if kind == "choice":
            system = f"{system} Its letter is enough."
        return {
            "question": question.question + "".join(listed),
            "type": "open",
            "system": system,
            "max_new_tokens": MAX_NEW_TOKENS,
        }

    def scores(self, question: Question, text: str) -> Scores:
        line = text.strip().split("\n")[0].strip()
        if question.kind == "choice":
            gold = tuple(_letter(answer, question.choices) for answer in question.answers)
            last = chr(64 + min(len(question.choices), 26))  # "I think it is B" is B, where there are fewer than nine
            found = re.search(rf"\b([A-{last}])\b", line)
            said = found[1] if found else _letter(line, question.choices)
            right = float(bool(said) and said in gold)
            return Scores(said, gold, right, right, right)
        if all(self._options.fullmatch(answer.strip()) for answer in question.answers):
            found = self._options.search(line)
            said = found[1].lower() if found else line
            right = float(said in {answer.strip().lower() for answer in question.answers})
            return Scores(said, question.answers, right, right, right)
        em = exact_match(line, question.answers)
        return Scores(line, question.answers, _open_f1(line, question.answers), em, accuracy(line, question.answers))


def protocol_of(is_papers: bool, questions: Sequence[Question], format: PromptFormat) -> OwnProtocol:
    """The paper's protocol, or ours."""
    return PaperProtocol(questions, format) if is_papers else OWN


def _letter(text: str, choices: Sequence[str]) -> str:
    """The letter of a choice, given by its text or by its letter already; of anything else none."""
    same = [i for i, choice in enumerate(choices) if normalize(choice) == normalize(text)]
    found = re.match(r"\W*([a-zA-Z])(?:\W*$|\s*[).:])", text)
    return chr(65 + same[0]) if same else found[1].upper() if found else ""


def _open_f1(said: str, answers: Sequence[str]) -> float:
    allowed = [a for a in answers if (normalize(said) in CLOSED) == (normalize(a) in CLOSED)]
    return f1(said, allowed) if allowed else 0.0
