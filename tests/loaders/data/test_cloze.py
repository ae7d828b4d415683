from regrad_loaders.data.cloze import BLANK, cloze_questions
from regrad_loaders.data.folders import Dataset, Question
from regrad_qdrant.bank.corpus import Passage

TEXT = (
    "Ida Marlow was born in the harbour town of Vexford in 1871. She studied botany in Vexford under Professor "
    "Jonas Pell. Ida Marlow published four books about mosses, and the last was printed in Upper Corrin."
)


def made(count=9, questions=None, texts=(TEXT,)):
    passages = [Passage(f"p{i}", text) for i, text in enumerate(texts)]
    train = [Question("q", "?", ("a",), ("p0",), split="train")]
    return cloze_questions(Dataset("set", passages, train + (questions or [])), train, count)


def test_what_is_left_out_fills_the_blank_and_stands_once_in_the_passage():
    found = made()
    answers = {question.answers[0] for question in found}
    assert {"1871", "Professor Jonas Pell", "Upper Corrin"} <= answers
    assert not answers & {"Ida Marlow", "Vexford", "She"}  # twice in the text, or where any word could stand
    for question in found:
        whole = question.question.replace(BLANK, question.answers[0])
        assert whole.removeprefix("Fill in the blank: ") in TEXT and question.gold_ids == ("p0",)
    assert len({question.id for question in found}) == len(found)


def test_as_many_as_wanted_and_the_same_every_time():
    assert len(made(2)) == 2 and made(2) == made(2) and made(0) == []


def test_passages_that_another_splits_questions_need_are_left_alone():
    assert made(questions=[Question("d", "?", ("a",), ("p0",), split="dev")]) == []
    assert made(questions=[Question("t", "?", ("a",), ("p0",), split="train", type="other")]) == made()
    assert made(texts=["Short. Very short."]) == []
