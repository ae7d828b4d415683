"""Answers as sentences."""

import pytest

from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Question
from regrad_loaders.data.sentences import sentence_of, with_sentences

MADE = [
    ("Who wrote Hamlet?", "Shakespeare", "Shakespeare wrote Hamlet."),
    ("When was Lars Holstein born?", "5 May 1763", "Lars Holstein was born on 5 May 1763."),
    ("when was the bridge built", "1894", "The bridge was built in 1894."),
    ("When was the town founded?", "around 1200", "The town was founded around 1200."),
    ("Where was Ida Corvand born?", "Aalborg", "Ida Corvand was born in Aalborg."),
    ("In which city was Ida Corvand born?", "Aalborg", "Ida Corvand was born in Aalborg."),
    ("What is the voice type of Georges Thill?", "tenor", "The voice type of Georges Thill is tenor."),
    ("What was Warsaw's population in 1901?", "711,988", "Warsaw's population in 1901 was 711,988."),
]


@pytest.mark.parametrize(("question", "answer", "sentence"), MADE)
def test_a_sentence_is_made_of_question_and_answer(question, answer, sentence):
    assert sentence_of(question, answer) == sentence


@pytest.mark.parametrize(
    "question",
    [
        "How many people live there?", "Why did she leave?", "When did the war begin?", "Where does Ida live?",
        "What is the city that she comes from?", "Who is it?", "Who did she marry?", "What is it called?",
        "What is a wing made of?",
    ],
)  # fmt: skip
def test_where_no_rule_fits_there_is_none(question):
    assert sentence_of(question, "x") is None


def test_only_open_questions_with_a_sentence_are_kept():
    long = "She had lost the golden ring in the deep well."
    asked = [
        Question("a", "Who wrote Hamlet?", ("Shakespeare", "William Shakespeare")),
        Question("b", "Is it so?", ("yes",)),
        Question("c", "Why did she weep?", ("a ring", long)),
        Question("d", "How many?", ("two",)),
    ]
    assert {q.id: q.answers for q in with_sentences(asked)} == {
        "a": ("Shakespeare wrote Hamlet.", "William Shakespeare wrote Hamlet."),
        "c": (long,),
    }


def test_every_invented_fact_has_its_sentence():
    world = generate("train", 5, 1)
    told = with_sentences(world.questions)
    assert len(told) == len(world.questions)
    for question, sentence in zip(world.questions, told, strict=True):
        assert question.answers[0] in sentence.answers[0] and sentence.answers[0].endswith(".")
