import json

import pytest

from regrad_loaders.bench import positions
from regrad_loaders.bench.positions import LENGTHS, PARTS, WAYS, made
from regrad_loaders.data.facts import generate
from regrad_qdrant.errors import DataError


def test_a_document_holds_its_passage_once_where_it_says_and_no_other_answer(measured):
    world = generate("demo", 40, 1, questions_per_person=1)
    documents = made(measured, world, world.questions[:8], 600)
    for document in documents:
        before = document.text.index(document.passage)
        assert document.text.count(document.passage) == 1
        assert abs(before / len(document.text) - (document.part + 0.5) / PARTS) < 0.25
        rest = document.text.replace(document.passage, "")
        assert not any(answer in rest for answer in document.question.answers)
        assert 550 < measured.count(document.text) < 900
    assert {document.part for document in documents} == set(range(PARTS))


def test_a_set_that_is_too_small_for_a_length_is_named(measured):
    world = generate("demo", 6, 1, questions_per_person=1)
    with pytest.raises(DataError, match="take a larger set"):
        made(measured, world, world.questions[:1], 4000)


def test_the_command_writes_every_way_and_its_plot(tiny_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(positions, "LENGTHS", (80, 160))
    world = generate("demo", 12, 1, questions_per_person=1)
    (tmp_path / "set").mkdir()
    rows = ({"id": p.id, "text": p.text} for p in world.passages)
    (tmp_path / "set" / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = (
        {"id": q.id, "question": q.question, "answers": list(q.answers), "gold_ids": list(q.gold_ids), "split": "dev"}
        for q in world.questions
    )
    (tmp_path / "set" / "qa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    tiny_bench("positions", "--data", "set", "--limit", "4", "--json", "positions.json", "--plot", "positions.png")
    found = json.loads((tmp_path / "positions.json").read_text())["rows"]
    whole = [(row["tokens"], row["way"]) for row in found if row["part"] is None]
    assert whole == [(tokens, way) for tokens in (80, 160) for way in WAYS]
    assert (tmp_path / "positions.png").stat().st_size > 1000 and LENGTHS == (500, 1000, 2000, 4000)
