import json

import pytest

from regrad_loaders.bench.lengths import SENTENCES, text_of
from regrad_loaders.bench.scores import AS_IT_WAS, BM25, KINDS
from regrad_loaders.data.facts import generate

SCORES = [20.0, 11.0, 9.0, 8.5, 7.0, 6.0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != AS_IT_WAS])
def test_every_kind_of_score_keeps_the_order_and_tells_the_best_from_the_rest(kind):
    found = KINDS[kind](SCORES)
    assert found[0] == 1 and found == sorted(found, reverse=True) and found[1] < 0.85


def test_the_control_can_hardly_tell_them_apart():
    assert KINDS[AS_IT_WAS](SCORES)[1] > 0.95 > KINDS[BM25](SCORES)[1]


def test_the_benches_run_and_say_what_they_measured(tiny_bench, tmp_path):
    tiny_bench("scores", "--limit", "3", "--json", "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == list(KINDS) and rows[0]["behind"]["mean"] == 0
    tiny_bench("lengths", "--limit", "2", "--json", "lengths.json")
    rows = json.loads((tmp_path / "lengths.json").read_text())["rows"]
    assert [row["sentences"] for row in rows] == list(SENTENCES)
    assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)


def test_the_answer_stands_in_the_first_sentence_under_the_full_name():
    world = generate("demo", 12, 1, questions_per_person=1)
    for question in world.questions:
        text = text_of(world, question, 1)
        assert question.answers[0] in text and text.count(".") == 1
        assert " ".join(text_of(world, question, 6).split()[:3]) == " ".join(text.split()[:3])
