"""Answers as sentences, made of question and answer by rule: "Who wrote Hamlet?", "Shakespeare" → "Shakespeare wrote
Hamlet."

Rules that can go wrong are not here: a question that none of them fits has no sentence, and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from regrad_loaders.data.folders import Question

LONG = 8  # words of an answer that is taken for a sentence, or nearly one, as it stands
_AUXILIARY = r"(?:did|does|do|had|has|have|would|could|should)"
_BE = r"(?P<be>is|was|are|were)"
_PARTICIPLE = (
    r"\w+ed|born|built|begun|bought|brought|caught|chosen|cut|drawn|driven|fought|found|given|grown|held|hidden|hit|"
    r"hung|kept|known|laid|led|lost|made|met|paid|put|read|run|seen|sent|set|shot|shown|sold|spent|spoken|sung|sunk|"
    r"taken|taught|thrown|told|won|written"
)
_PREPOSITION = re.compile(r"(?:in|on|at|from|near|by|under|over|after|before|during|between|around|since)\b", re.I)
_DAY = re.compile(r"\b\d{1,2}(?:st|nd|rd|th)?\b(?!\d)")


def sentence_of(question: str, answer: str) -> str | None:
    """The answer as a sentence; None where no rule fits the question.

    The first letter of an answer stays as it is where the sentence begins with something else.
    """
    asked = " ".join(question.split()).rstrip("?").strip()
    for pattern, made in _RULES:
        if found := pattern.fullmatch(asked):
            said = made(found, answer.strip().rstrip("."))
            return f"{said[:1].upper()}{said[1:]}."
    return None


def with_sentences(questions: Iterable[Question]) -> list[Question]:
    """The open questions that can be answered with a sentence, with that for their answer: their own (facts know it),
    an answer that is long already, or one made by rule. The field `in_text` keeps what may stand in a passage."""
    found = []
    for question in questions:
        if question.kind != "open":
            continue
        own = question.fields.get("sentence")
        said = [own] if own else [_said(question.question, answer) for answer in question.answers]
        if answers := tuple(sentence for sentence in said if sentence):
            fields = question.fields | {"in_text": question.answers}
            found.append(replace(question, answers=answers, fields=fields))
    return found


def _said(question: str, answer: str) -> str | None:
    return sentence_of(question, answer) or (answer if len(answer.split()) >= LONG else None)


def _when(found: re.Match[str], answer: str) -> str:
    return f"{found['what']} {found['be']} {found['done']} {_placed(answer, 'on' if _DAY.search(answer) else 'in')}"


def _where(found: re.Match[str], answer: str) -> str:
    return f"{found['what']} {found['be']} {found['done']} {_placed(answer, 'in')}"


def _placed(answer: str, preposition: str) -> str:
    return answer if _PREPOSITION.match(answer) else f"{preposition} {answer}"


# What is asked for stands first, or last; each pattern is of a whole question without its mark.
_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], str]], ...] = (
    (re.compile(rf"when {_BE} (?P<what>.+?) (?P<done>{_PARTICIPLE})", re.I), _when),
    (re.compile(rf"(?:where|in wh(?:ich|at) \w+) {_BE} (?P<what>.+?) (?P<done>{_PARTICIPLE})", re.I), _where),
    # A noun phrase ends the question: no verb that could belong to another clause, no preposition left hanging.
    (
        re.compile(
            rf"(?:who|what) {_BE} (?P<what>(?:the|an?|[\w.' -]+'s) (?!.*\b{_AUXILIARY}\b).+?)"
            r"(?<! of)(?<! for)(?<! in)(?<! to)(?<! as)(?<! by)(?<! with)(?<! from)(?<! called)(?<! known)",
            re.I,
        ),
        lambda found, answer: f"{found['what']} {found['be']} {answer}",
    ),
    (
        re.compile(rf"who (?P<does>(?!(?:is|was|are|were|am|{_AUXILIARY}|to)\b)\w+(?:s|ed|t|e|d|k|w|n|g)? .+)", re.I),
        lambda found, answer: f"{answer} {found['does']}",
    ),
)
