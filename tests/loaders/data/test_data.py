import json

import pytest

from regrad_loaders.data.folders import Question, read_folder, read_questions
from regrad_qdrant.bank.corpus import read_corpus
from regrad_qdrant.errors import DataError

PASSAGE = {"id": "p1", "text": "Ida works as a baker.", "title": "Ida", "state": "x"}
QUESTION = {"id": "q1", "question": "Who bakes?", "answers": ["Ida"], "gold_ids": ["p1"], "split": "dev", "state": "x"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_reads_a_folder(tmp_path):
    write(tmp_path / "corpus.jsonl", PASSAGE, "", {**PASSAGE, "id": "p2", "title": "The Corvands"})
    write(tmp_path / "qa.jsonl", QUESTION)
    dataset = read_folder(tmp_path)
    assert dataset.passages[0].payload == PASSAGE and dataset.passages[0].text == PASSAGE["text"]
    assert dataset.passages[1].text == "The Corvands\nIda works as a baker."  # a title that the text does not hold
    assert dataset.split("dev")[0].fields == {"state": "x"} and not dataset.split("train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PASSAGE, {"id": "p2"}], "line 2: the field 'text' must be a string; found the fields id"),
        ([{"text": "x"}], "the field 'id' must be a string; found the fields text"),
        ([{**PASSAGE, "text": "  "}], "the text of 'p1' is empty"),
        ([PASSAGE, PASSAGE], "'p1' is there twice"),
        (["{"], "not valid JSON"),
        (["[1]"], "expected a JSON object, found list"),
        ([], "no passages"),
    ],
)
def test_bad_corpora_are_refused_with_their_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_corpus(write(tmp_path / "corpus.jsonl", *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**QUESTION, "answers": []}], "'answers' must be a list"),
        ([{**QUESTION, "answers": "Ida"}], "'answers' must be a list"),
        ([{**QUESTION, "answers": [None]}], "'answers' must be a list of texts"),
        ([{**QUESTION, "gold_ids": "p1"}], "'gold_ids' must be a list of texts"),
        ([{**QUESTION, "choices": {"A": "Ida"}}], "'choices' must be a list of texts"),
        ([QUESTION, QUESTION], "line 2: the id 'q1' is there twice"),
        ([{"id": "q", "answers": ["a"]}], "'question' must be a string; found the fields id, answers"),
        ([], "no questions"),
    ],
)
def test_bad_questions_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "qa.jsonl", *rows))


def test_ids_of_passages_may_be_numbers(tmp_path):
    [question] = read_questions(write(tmp_path / "qa.jsonl", {**QUESTION, "gold_ids": [1]}))
    assert question.gold_ids == ("1",)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        read_corpus(tmp_path / "nowhere.jsonl")


def test_the_kind_of_a_question_follows_from_its_answers():
    assert Question("q", "Is it?", ("yes",)).kind == "yesno"
    assert Question("q", "Is it?", ("maybe",), type="yesnomaybe").kind == "yesno"
    assert Question("q", "Who?", ("Ida",), type="bridge").kind == "open"
    assert Question("q", "Which?", ("A",), choices=("A", "B")).kind == "choice"
