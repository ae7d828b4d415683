from regrad_qdrant.layouts import CORPUS, Layout


def test_text_and_title():
    assert CORPUS.text_of({"text": "A text."}) == "A text."
    assert CORPUS.text_of({"text": "A text.", "title": "B"}) == "B\nA text."
    assert CORPUS.text_of({"text": "B is here.", "title": "B"}) == "B is here."


def test_payloads_without_text():
    for payload in ({}, {"text": ""}, {"text": " "}, {"text": 3}, {"text": None}):
        assert CORPUS.text_of(payload) is None


def test_a_path_descends():
    layout = Layout("nested", "metadata.body")
    assert layout.text_of({"metadata": {"body": "x y"}}) == "x y"
    assert layout.text_of({"metadata": "x"}) is None
    assert layout.fields() == ["metadata"]
