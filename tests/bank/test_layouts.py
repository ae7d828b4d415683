import json

import pytest

from regrad_qdrant.bank.layouts import CORPUS, LAYOUTS, Layout, detect
from regrad_qdrant.errors import BankError, DataError

PAYLOADS = {
    "LangChain": {"page_content": "A text.", "metadata": {"source": "a", "text": "not this"}},
    "LlamaIndex": {
        "source": "a", "text": "metadata of the user's", "_node_type": "TextNode", "doc_id": "None",
        "_node_content": json.dumps({"id_": "x", "text": "A text.", "metadata": {}}),
    },
    "LlamaIndex, flat": {"text": "A text.", "_node_type": "TextNode", "_node_content": json.dumps({"id_": "x"})},
    "Haystack": {"id": "ab", "content": "A text.", "blob": None, "meta": {"source": "a"}, "score": None},
    "mcp-server-qdrant": {"document": "A text.", "metadata": None},
    "corpus": {"id": "d1", "text": "A text.", "state": "NY"},
    "plain": {"body": "A text.", "tenant": "t1", "lang": "en"},
}  # fmt: skip


def test_text_and_title():
    assert CORPUS.text_of({"text": "A text."}) == "A text."
    assert CORPUS.text_of({"text": "A text.", "title": "B"}) == "B\nA text."
    assert CORPUS.text_of({"text": "B is here.", "title": "B"}) == "B is here."


def test_payloads_without_text():
    for payload in ({}, {"text": ""}, {"text": " "}, {"text": 3}, {"text": None}):
        assert CORPUS.text_of(payload) is None


def test_a_path_descends_into_objects_and_into_json():
    layout = Layout("nested", "metadata.body")
    assert layout.text_of({"metadata": {"body": "x y"}}) == "x y"
    assert layout.text_of({"metadata": json.dumps({"body": "x y"})}) == "x y"
    for broken in ("x", "{", "[1]", "3", "9" * 5000, "[" * 100_000):
        assert layout.text_of({"metadata": broken}) is None
    assert layout.fields() == ["metadata"]


def test_keys_of_any_name_become_paths_that_qdrant_reads():
    payload = {"full text": "A text.", "a.b": {"c-d": "Another."}}
    assert Layout("spaced", "full text").text_of(payload) == "A text."
    assert Layout("spaced", "full text").fields() == ['"full text"']
    dotted = Layout("dotted", '"a.b".c-d')
    assert dotted.text_of(payload) == "Another." and dotted.fields() == ['"a.b"']
    assert dotted.state_of(payload) == {'"a.b".c-d': "Another."}


def test_a_title_that_is_not_there_is_part_of_what_a_text_was_read_from():
    assert CORPUS.state_of({"text": "A text."}) == {"text": "A text.", "title": None}
    assert CORPUS.state_of({"text": "A text.", "title": "B"}) == {"text": "A text.", "title": "B"}


def test_a_function_reads_the_keys_it_names():
    layout = Layout("mine", lambda payload: f"{payload['head']} {payload['tail']}", reads=("head", "tail"))
    assert layout.text_of({"head": "a", "tail": "b"}) == "a b" and layout.fields() == ["head", "tail"]
    with pytest.raises(DataError, match="`reads`"):
        Layout("mine", lambda payload: None)


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_layout_is_seen_in_the_payloads(name):
    layout = detect([PAYLOADS[name], PAYLOADS[name] | {"extra": 1}])
    assert layout.name == name and layout.text_of(PAYLOADS[name]) == "A text."


def test_every_framework_layout_is_tested():
    assert {layout.name for layout in LAYOUTS} < set(PAYLOADS)


def test_what_can_not_be_told_is_an_error_with_the_candidates():
    with pytest.raises(BankError, match=r"text \('a'…\), body \('b'…\): choose with --text-path"):
        detect([{"text": "a", "body": "b"}])
    with pytest.raises(BankError, match=r"found note \('n'…\)"):
        detect([{"note": "n", "count": 3}])
    with pytest.raises(BankError, match="no field of text"):
        detect([{"count": 3}])


def test_an_empty_collection_is_taken_for_a_corpus():
    assert detect([]) == CORPUS
