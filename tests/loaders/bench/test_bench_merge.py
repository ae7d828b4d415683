import json

import torch

from regrad_loaders.bench.merge import GOLD, HARD, RANDOM, documents, share, study, with_gold
from regrad_loaders.data.folders import Question
from regrad_qdrant.atoms.merge import MergeRule


def test_the_gold_passage_stands_among_the_hits_even_where_retrieval_missed_it():
    question = Question("q", "?", ("a",), gold_ids=("g",))
    assert with_gold(question, {"a": 3.0, "g": 2.0, "b": 1.0}, 2) == {"a": 3.0, "g": 2.0}
    assert with_gold(question, {"a": 3.0, "b": 2.0, "g": 1.0}, 2) == {"a": 3.0, "g": 2.0}
    assert with_gold(question, {"a": 3.0, "b": 2.0}, 3) == {"a": 3.0, "b": 2.0, "g": 2.0}


def test_a_share_is_of_the_same_questions():
    assert share([1, 0, 1, 0], [1, 1, 1, 1]).mean == 0.5
    whole = share([0.5, 1, 0], [0.5, 1, 0])
    assert (whole.mean, whole.low, whole.high) == (1, 1, 1)
    assert share([0, 0], [0, 0]).mean == 1


def test_every_rule_meets_every_k_and_every_noise(measured, task, monkeypatch):
    rules = [MergeRule("sum"), MergeRule("top1"), MergeRule("margin", 0.05)]
    advanced, given = [], []
    answers = measured.answers
    monkeypatch.setattr(
        measured, "answers", lambda questions, updates: given.append(updates) or answers(questions, updates)
    )
    rows = study(measured, task, "int8", rules, [1, 3], [2], advanced.append)
    assert sum(advanced) == len(documents(task, [1, 3], [2]))
    found = [(row.among, row.documents, row.rule) for row in rows]
    names = [rule.rule for rule in rules]
    assert found == [(GOLD, 1, "any"), *((HARD, 3, n) for n in names), *((RANDOM, 3, n) for n in names)]
    # Invented facts are found first, so `top1` is the gold passage alone, and nothing else is.
    assert all(next(iter(hits)) in question.gold_ids for question, hits in zip(task.questions, task.hits, strict=True))
    same = [torch.equal(updates, given[0]) for updates in given]
    assert same == [True, False, True, False, False, True, False]


def test_the_command_writes_what_it_measured(tiny_bench, tmp_path, capsys):
    tiny_bench("merge", "--rules", "sum,margin", "-k", "3", "--noise", "2", "--limit", "4", "--json", "merge.json")
    result = json.loads((tmp_path / "merge.json").read_text())
    assert len(result["rows"]) == 5 and result["settings"]["command"] == "bench merge"
    assert result["settings"]["dtype"] == "float32"
    assert "of gold alone" in capsys.readouterr().out
