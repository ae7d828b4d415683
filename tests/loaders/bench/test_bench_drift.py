"""Documents taught step by step, into the weights and into a bank."""

import pytest
from conftest import tiny_initialization, tiny_model

from regrad_loaders.bench.drift import Kept, plot, report, study
from regrad_loaders.data.facts import generate
from regrad_qdrant.errors import DataError


def test_weights_drift_and_a_bank_does_not(tokenizer, tmp_path):
    model, world, other = tiny_model(), generate("train", 12, 1), generate("demo", 12, 2)
    kept = Kept([question.question for question in other.questions[:4]], [p.text for p in other.passages[:4]])
    start = tiny_initialization(model, "lora")
    told = []
    rows = study(
        model, tokenizer, tiny_initialization(model), start, world.passages, world.questions[:3], kept, [9, 12],
        told.append, epochs=8,
    )  # fmt: skip
    ways = [(row.way, row.documents) for row in rows]
    assert ways == [("cpt", 0), ("cpt", 9), ("regrad", 9), ("cpt", 12), ("regrad", 12)]
    assert told == [1, 1]
    bank = [row for row in rows if row.way == "regrad"]
    assert all(row.unchanged == 1 for row in bank)
    assert bank[0].perplexity == bank[1].perplexity
    assert rows[0].perplexity == bank[0].perplexity
    assert rows[1].perplexity != pytest.approx(bank[0].perplexity, rel=1e-3)
    plot(rows, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 1000
    assert len(report(rows, {"set": "facts"})["rows"]) == 5


def test_the_first_size_is_at_least_what_the_questions_find(tokenizer):
    model, world = tiny_model(), generate("train", 12, 1)
    start = tiny_initialization(model, "lora")
    kept = Kept(["Who is it?"], [world.passages[0].text])
    rows = study(model, tokenizer, start, start, world.passages, world.questions[:3], kept, [1, 2], epochs=1)
    assert len(rows) == 3 and 3 <= rows[1].documents <= 9
    with pytest.raises(DataError, match="no open question"):
        study(model, tokenizer, start, start, world.passages, world.questions[:3], Kept([], ["a b"]), [2])
