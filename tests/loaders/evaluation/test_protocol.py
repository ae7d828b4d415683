"""Answers put and scored as the paper does."""

import pytest
from conftest import regrad_over

from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_loaders.evaluation.protocol import MAX_NEW_TOKENS, OwnProtocol, protocol_of
from regrad_qdrant.model.prompts import ENGINEERED_INSTRUCTION, PromptFormat

CHOICE = Question("c", "Where?", ("Rome",), choices=("Oslo", "Rome"))


def scored(question, text, *others):
    scores = protocol_of(True, [question, *others], PromptFormat()).scores(question, text)
    return scores.f1, scores.em, scores.accuracy


@pytest.mark.parametrize(
    ("answers", "text", "f1"),
    [
        (("yes",), "I think yes, of course", 1), (("yes",), "No.\nyes", 0), (("yes",), "maybe", 0),
        (("no",), "It is not known", 0), (("Oslo",), "in Oslo\nor Rome", 2 / 3), (("no way",), "no", 0),
        (("Oslo",), "noanswer", 0), (("B",), "The answer is B", 0.5), (("yes", "Oslo"), "Oslo", 1),
        (("yes", "Oslo"), "yes", 1),
    ],
)  # fmt: skip
def test_one_line_counts_and_yes_or_no_alone_earns_nothing_beside_other_words(answers, text, f1):
    assert scored(Question("q", "?", answers), text)[0] == pytest.approx(f1)


def test_maybe_is_an_answer_where_it_is_one_of_the_sets():
    question, other = Question("q", "?", ("yes",), type="yesno"), Question("r", "?", ("maybe",), type="yesno")
    assert scored(question, "maybe yes", other) == (0, 0, 0)
    assert scored(question, "maybe yes") == (1, 1, 1)
    assert scored(other, "Maybe it does", question) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [("B", 1), ("b.", 1), ("B) Oslo", 1), ("Rome", 1), ("A", 0), ("", 0), ("Because it is", 0), ("But why", 0)],
)
def test_choices_are_letters(text, right):
    assert scored(CHOICE, text) == (right, right, right)


def test_where_no_choice_is_gold_nothing_is_right():
    assert scored(Question("q", "?", ("Paris",), choices=("Oslo", "Rome")), "But why") == (0, 0, 0)


def test_a_choice_that_begins_as_the_right_one_does_is_another():
    question = Question("q", "?", ("no",), choices=("no", "no effect", "yes"))
    found = [OwnProtocol().scores(question, said) for said in ("no", "no effect", "A")]
    assert [(one.em, one.accuracy) for one in found] == [(1, 1), (0, 0), (1, 1)]


def test_a_pronoun_is_no_letter_of_two_choices():
    assert scored(CHOICE, "I think that it is B") == (1, 1, 1)


def test_everything_is_asked_freely(model, tokenizer, tmp_path):
    world = generate("train", 6, 1)
    name = world.questions[0].question
    questions = [
        world.questions[0],
        Question("c", name, ("Rome",), choices=("Oslo", "Rome")),
        Question("y", name, ("yes",)),
    ]
    paper = protocol_of(True, questions, PromptFormat())
    asked = [paper.asks(question, "rag") for question in questions]
    assert all(one["type"] == "open" and one["max_new_tokens"] == MAX_NEW_TOKENS for one in asked)
    assert asked[1]["question"] == f"{name}\nA) Oslo\nB) Rome"
    assert asked[2]["system"] == "Use the passages. Answer with yes or no only."
    assert paper.asks(questions[2], "regrad")["system"] == "Answer with yes or no only."
    assert paper.asks(questions[2], "pe-rag")["system"] == f"{ENGINEERED_INSTRUCTION} Answer with yes or no only."
    assert OwnProtocol().asks(questions[1], "rag")["choices"] == ("Oslo", "Rome")
    with regrad_over([passage.text for passage in world.passages], model, tokenizer, tmp_path) as regrad:
        found = evaluate(regrad, questions, ["rag", "regrad", "random"], top_k=2, protocol=paper)
    assert len(found.predictions) == 9
    assert all(prediction.f1 in (0, 1) for prediction in found.predictions if prediction.id == "c")
