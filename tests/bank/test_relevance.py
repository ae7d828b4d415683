import math

import pytest

from regrad_qdrant import Document, GradientBank, MergeRule
from regrad_qdrant.bank.bank import Asked
from regrad_qdrant.bank.documents import relevances
from regrad_qdrant.bank.relevance import DEPTH, TYPICAL, by_rank, from_candidates, from_zero
from regrad_qdrant.bank.stores.base import Point, VectorNames

SCORES = [18.0, 9.0, 7.5, 6.0, 5.8, 5.1, 5.0, 4.9, 4.2, 4.0]


def test_scores_with_a_zero_are_taken_relative_to_the_best():
    assert from_zero([8.0, 4.0, 2.0]) == [1.0, 0.5, 0.25]
    assert from_zero([]) == [] and from_zero([-1.0, -2.0]) == by_rank(2)


@pytest.mark.parametrize(
    "written",
    [lambda s: 0.001 * s, lambda s: 0.8 + 0.002 * s, lambda s: -3 * s, lambda s: 100 - s],
    ids=["scaled", "close together", "a distance", "a distance with an offset"],
)
def test_scale_offset_and_direction_of_a_score_change_nothing(written):
    there = [written(score) for score in SCORES]
    assert from_candidates(there[:3], there) == pytest.approx(from_candidates(SCORES[:3], SCORES))


def test_the_deepest_candidate_has_what_its_rank_typically_has():
    assert from_candidates(SCORES, SCORES)[-1] == pytest.approx(TYPICAL[len(SCORES) - 1])
    assert from_candidates(SCORES, SCORES)[0] == 1


def test_equal_scores_are_equally_relevant_and_one_candidate_says_nothing():
    assert from_candidates([0.7, 0.7], [0.7, 0.7]) == [1, 1]
    assert from_candidates([0.7], [0.7]) == [1]
    assert len(by_rank(40)) == 40 and all(a >= b for a, b in zip(by_rank(40), by_rank(40)[1:], strict=False))


# -- in every engine ------------------------------------------------------------------------------------

ANGLES = {f"d{i}": 0.1 + 0.06 * i for i in range(30)}
QUESTION = [1.0, 0.0]


@pytest.fixture(params=["Cosine", "Dot", "Euclid", "Manhattan"])
def bank(request, store):
    """Thirty points on a circle, the first nearest to the question."""
    store.create(VectorNames({"dense": 2}, (), {"dense": request.param}))
    rows = [(key, [math.cos(angle), math.sin(angle)]) for key, angle in ANGLES.items()]
    store.upsert([Point(i, {"dense": vector}, {"id": key, "text": key}) for i, (key, vector) in enumerate(rows)])
    return GradientBank(store, store.name, "a" * 16, embedders={})


def test_the_nearest_weighs_most_whatever_the_distance(bank):
    hits = bank.search(QUESTION, 3, using="dense", with_records=False)
    assert [hit.document_id for hit in hits] == ["d0", "d1", "d2"]
    assert hits[0].relevance == 1 > hits[1].relevance > hits[2].relevance > TYPICAL[DEPTH - 1]
    weights = MergeRule("margin", 0.1).weights(relevances(hits))
    assert weights[0] == 1 > weights[1] > weights[2]


def test_three_payloads_are_read_however_deep_the_scores_are_looked_at(bank, monkeypatch):
    read = []
    search = bank.store.search

    def watched(searches):
        read.extend(one.limit for one in searches if one.with_payload)
        return search(searches)

    monkeypatch.setattr(bank.store, "search", watched)
    bank.search(QUESTION, 3, using="dense")
    assert read == [3]


def test_several_questions_are_one_request_and_each_gets_its_own(bank, monkeypatch):
    asked = [Asked(QUESTION), Asked([0.0, 1.0], with_records=False)]
    alone = [bank.search(one.query, 2, using="dense", with_records=one.with_records) for one in asked]
    requests = []
    search = bank.store.search
    monkeypatch.setattr(bank.store, "search", lambda searches: requests.append(len(searches)) or search(searches))
    assert bank.search_many(asked, 2, using="dense") == alone
    assert requests == [4]  # two searches each: with payloads, and for the deeper scores


def test_a_retriever_of_ones_own_may_say_where_its_scores_begin(store):
    bank = GradientBank(store, store.name, "a" * 16)
    bank.create()
    bank.add(Document(i, {"text": text}) for i, text in enumerate(["a diver", "a judge", "a baker"]))
    assert relevances(bank.fetch([2, 0])) == by_rank(2)
    assert relevances(bank.fetch([2, 0], [0.831, 0.827])) == by_rank(2)
    assert relevances(bank.fetch([2, 0], [8.0, 2.0], zero=0.0)) == [1, 0.25]
