"""What a framework may give for one call."""

from qdrant_client import models

from regrad_qdrant.bridges.options import fields_of, merged

TENANT = models.Filter(must=[models.FieldCondition(key="tenant", match=models.MatchValue(value="b"))])
WIDER = {"must_not": [{"key": "tenant", "match": {"value": "zzz"}}]}


def test_a_calls_filter_narrows_a_fixed_one_and_never_replaces_it():
    found = merged({"query_filter": TENANT, "top_k": 3}, {"query_filter": WIDER, "top_k": 5})
    assert found["top_k"] == 5
    assert found["query_filter"].must == [TENANT, models.Filter.model_validate(WIDER)]


def test_a_frameworks_metadata_are_an_object_or_else_the_whole_payload_is():
    assert fields_of({"metadata": {"a": 1}, "text": "x"}, "metadata") == {"a": 1}
    assert fields_of({"metadata": None, "text": "x"}, "metadata") == {}
    for payload in ({"metadata": "2021", "text": "x"}, {"text": "x"}):
        assert fields_of(payload, "metadata") == payload


def test_one_filter_stays_as_it_is():
    assert merged({"query_filter": TENANT}, None, {"query_filter": None}) == {"query_filter": TENANT}
