"""Modes of an evaluation: who answers which, and what grounds an answer."""

import pytest
from conftest import regrad_over

from regrad_loaders.data.facts import generate
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_loaders.evaluation.plan import EVALUATION_MODES, parse_modes, parties, retrieves
from regrad_qdrant.errors import DataError


def test_a_baseline_answers_its_grounded_twin():
    modes = parse_modes(
        "regrad,regrad/grounded,ft-direct/grounded,ft-rag,raw/grounded,ft-rag/grounded", EVALUATION_MODES
    )
    found = parties(modes, "ours", "ours-icl", {"ft-direct": "direct-folder", "ft-rag": "rag-folder"})
    assert {party.init: party.modes for party in found} == {
        "ours": {"regrad": "regrad", "regrad/grounded": "regrad/grounded"},
        "direct-folder": {"init/grounded": "ft-direct/grounded"},
        "rag-folder": {"init+icl": "ft-rag", "init+icl/grounded": "ft-rag/grounded"},
        "raw": {"regrad/grounded": "raw/grounded"},
    }
    assert [mode for mode in ("direct", "ft-direct", "direct/grounded", "ft-direct/grounded") if retrieves(mode)] == [
        "direct/grounded", "ft-direct/grounded"
    ]  # fmt: skip
    with pytest.raises(DataError, match="unknown modes"):
        parse_modes("regrad/ground", EVALUATION_MODES)
    with pytest.raises(DataError, match="ft-direct/grounded needs .* --ft-direct FOLDER"):
        parties(["ft-direct/grounded"], "ours", "ours", {"ft-direct": None})


def test_grounded_answers_are_of_the_texts_that_were_retrieved_whatever_atoms_are_applied(model, tokenizer, tmp_path):
    world = generate("train", 8, 1)
    modes = ["regrad", "regrad/grounded", "random/grounded", "direct/grounded"]
    with regrad_over([passage.text for passage in world.passages], model, tokenizer, tmp_path) as regrad:
        bank = regrad.bank
        result = evaluate(regrad, world.questions[:6], modes, top_k=2, batch=4)
        for question in world.questions[:6]:
            own = {prediction.mode: prediction for prediction in result.predictions if prediction.id == question.id}
            texts = [hit.text for hit in bank.search(question.question, 2)]
            assert list(own) == modes
            for mode in modes[1:]:
                assert any(own[mode].prediction in text for text in texts)
            assert not set(own["random/grounded"].hits) & set(own["regrad/grounded"].hits)
