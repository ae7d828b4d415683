"""Modes of an evaluation: who answers which, and what grounds an answer."""

from dataclasses import replace

import pytest
from conftest import regrad_over

from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.evaluate import evaluate
from regrad_loaders.evaluation.plan import EVALUATION_MODES, parse_modes, parties, retrieves, select
from regrad_qdrant.errors import DataError


def test_a_baseline_answers_its_grounded_twin():
    modes = parse_modes(
        "regrad,regrad/grounded,ft-direct/grounded,ft-rag,raw/grounded,ft-rag/grounded", EVALUATION_MODES
    )
    found = parties(modes, "ours", "ours-icl", {"ft-direct": "direct-folder", "ft-rag": "rag-folder"})
    assert {(party.init, party.made): party.modes for party in found} == {
        ("ours", None): {"regrad": "regrad", "regrad/grounded": "regrad/grounded"},
        ("direct-folder", None): {"init/grounded": "ft-direct/grounded"},
        ("rag-folder", None): {"init+icl": "ft-rag", "init+icl/grounded": "ft-rag/grounded"},
        ("ours", "raw"): {"regrad/grounded": "raw/grounded"},
    }
    assert [party.fills for party in found] == [True, False, False, False]
    assert [mode for mode in ("direct", "ft-direct", "direct/grounded", "ft-direct/grounded") if retrieves(mode)] == [
        "direct/grounded", "ft-direct/grounded"
    ]  # fmt: skip
    with pytest.raises(DataError, match="unknown modes"):
        parse_modes("regrad/ground", EVALUATION_MODES)
    with pytest.raises(DataError, match="ft-direct/grounded needs .* --ft-direct FOLDER"):
        parties(["ft-direct/grounded"], "ours", "ours", {"ft-direct": None})


def test_what_is_made_of_a_fine_tuned_model_begins_with_it():
    folders = {"ft-direct": "direct-folder", "ft-rag": "rag-folder"}
    found = parties(["prag", "ft-prag", "rag", "rag-kv", "ft-rag-64", "ft-rag-128"], "ours", "ours-icl", folders)
    assert [(party.init, party.made, party.reads, party.starts, party.fills) for party in found] == [
        ("ours", None, None, False, True),
        ("ours", "prag", None, False, False),
        ("direct-folder", "prag", None, True, False),
        ("ours", None, "key values", False, False),
        ("rag-folder", None, 64, True, False),
        ("rag-folder", None, 128, True, False),
    ]


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


def test_random_documents_are_never_the_gold_ones_whatever_their_ids_are(model, tokenizer, tmp_path):
    world = generate("train", 4, 1)
    with regrad_over([passage.text for passage in world.passages], model, tokenizer, tmp_path) as regrad:
        ids = [hit.id for hit in regrad.bank.points()]
        asked = [replace(q, gold_ids=(str(ids[number % 4]),)) for number, q in enumerate(world.questions)]
        found = evaluate(regrad, asked, ["random"], top_k=1, batch=4)
        golds = {question.id: question.gold_ids[0] for question in asked}
        documents = {str(hit.id): hit.document_id for hit in regrad.bank.points()}
        assert not any(documents[golds[one.id]] in one.hits for one in found.predictions)


def test_gold_passages_among_random_ones_are_weighed_as_a_search_among_them_ranks_them(
    model, tokenizer, tmp_path, monkeypatch
):
    world = generate("train", 8, 1)
    with regrad_over([passage.text for passage in world.passages], model, tokenizer, tmp_path) as regrad:
        [gold] = regrad.bank.search(world.questions[0].question, 1)
        asked, answer_many = [], regrad.answer_many
        monkeypatch.setattr(regrad, "answer_many", lambda all, **given: asked.extend(all) or answer_many(all, **given))
        question = replace(world.questions[0], gold_ids=(str(gold.id),))
        found = evaluate(regrad, [question], ["regrad"], oracle=True, distractors=2)
        [best, *others] = asked[0].hits
        assert best.id == gold.id and best.relevance == 1.0 and len(others) == 2
        assert all(hit.relevance < 0.9 for hit in others)
        assert found.recall_at_k is None


def test_a_sample_can_be_left_out():
    asked = [Question(f"q{i}", "Who?", ("Ida",), split="dev") for i in range(20)]
    first, others = select(asked, "dev", sample=8), select(asked, "dev", skip_samples=[8])
    assert len(first) == 8 and {q.id for q in first} | {q.id for q in others} == {q.id for q in asked}
    assert len(others) == 12 and len(select(asked, "dev", sample=5, skip_samples=[8])) == 5
    with pytest.raises(DataError, match="--skip-sample 20 leaves no question"):
        select(asked, "dev", skip_samples=[20])
    many = [Question(f"q{i}", "Who?", ("Ida",), split="dev") for i in range(300)]
    small, large = ({q.id for q in select(many, "dev", sample=count)} for count in (80, 160))
    left = {q.id for q in select(many, "dev", skip_samples=[80, 160])}
    assert small - large and not left & (small | large)
