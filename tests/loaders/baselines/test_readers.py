"""Passages as keys and values, and passages cut short."""

from dataclasses import replace

import pytest
import torch
from conftest import regrad_over, tiny_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from regrad_loaders.baselines.key_values import KeyValueReader
from regrad_loaders.baselines.shortened import ShortenedReader, shortened
from regrad_loaders.data.facts import generate
from regrad_qdrant import Query
from regrad_qdrant.bank.documents import Hit
from regrad_qdrant.bank.embed import Bm25
from regrad_qdrant.errors import UnsupportedModelError

WORLD = generate("train", 8, 1)
TEXTS = [passage.text for passage in WORLD.passages]


@pytest.fixture
def regrad(tokenizer, tmp_path):
    with regrad_over(TEXTS, tiny_model(), tokenizer, tmp_path) as regrad:
        yield regrad


@pytest.mark.parametrize("mode", ["rag", "init+icl"])
def test_with_one_passage_it_is_rag(regrad, mode):
    reader = KeyValueReader(regrad)
    asked = [Query(question.question, mode) for question in WORLD.questions[:4]]
    name = WORLD.questions[0].question
    asked += [Query(f"{name} Surely?", mode, "yesno"), Query(name, mode, "choice", ("Oslo", "Lima", "Rome"))]
    for one in asked:
        [own], [theirs] = reader.answer_many([one], top_k=1), regrad.answer_many([one], top_k=1)
        assert own.text == theirs.text
        assert [hit.id for hit in own.hits] == [hit.id for hit in theirs.hits]
        assert own.prompt_tokens < theirs.prompt_tokens


def test_keys_stand_where_their_passage_stands_now(regrad, tokenizer):
    reader = KeyValueReader(regrad)
    found = regrad.retrieval.retrieve([Query(WORLD.questions[0].question, "rag")], 3, None, 0)
    begin, passages, asked = reader._pieces(found[0].asked.prompt(found[0].hits))
    past, length = reader.joined([begin, *passages])
    assert length == begin.tokens + sum(piece.tokens for piece in passages)
    ids = [token for before, text in reader._kept for token in reader._ids(text or before)]
    assert len(ids) == length
    with torch.no_grad():
        whole = reader._model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    # A first layer's keys and values depend on their own tokens and places alone.
    torch.testing.assert_close(past.layers[0].keys, whole.layers[0].keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(past.layers[0].values, whole.layers[0].values)
    assert not torch.allclose(past.layers[2].values, whole.layers[2].values)  # passages never read each other
    assert asked


def test_a_passage_is_read_once(regrad):
    reader = KeyValueReader(regrad)
    question = WORLD.questions[0].question
    first = reader.answer_many([Query(question, "rag")], top_k=3)
    assert len(reader.seconds) == len(reader.sizes) == 3
    again = reader.answer_many([Query(question, "rag")], top_k=3)
    assert len(reader.seconds) == 3
    assert first[0].text == again[0].text
    config = regrad.adapter.model.config
    width = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    assert all(size % per_token == 0 for size in reader.sizes)
    small = KeyValueReader(regrad, kept_bytes=1)
    assert small.answer_many([Query(question, "rag")], top_k=3)[0].text == first[0].text
    assert len(small._kept) == 1


def test_a_model_with_windows_is_refused(regrad, monkeypatch):
    config = Gemma3TextConfig(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    monkeypatch.setattr("regrad_loaders.baselines.key_values.base_of", lambda _: Gemma3ForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match="use the mode rag"):
        KeyValueReader(regrad)


def test_the_best_sentences_are_kept_in_their_order(tokenizer):
    hits = [
        Hit("a", 2.0, "Ada lives in Oslo. She paints. Her dog barks loudly at night.", {}),
        Hit("b", 1.0, "Bo lives in Rome. He rows.", {}),
    ]
    length = len(tokenizer("Ada lives in Oslo.", add_special_tokens=False).input_ids)
    [only] = shortened(hits, "Where does Ada live in Oslo?", Bm25(), tokenizer, length)
    assert only == replace(hits[0], text="Ada lives in Oslo.")
    whole = shortened(hits, "Where does Ada live?", Bm25(), tokenizer, 1000)
    assert [hit.text for hit in whole] == [hit.text for hit in hits]
    [cut] = shortened(hits, "Where does Ada live in Oslo?", Bm25(), tokenizer, 2)
    assert cut.text
    assert hits[0].text.startswith(cut.text)
    long = [Hit("a", 2.0, "Ada lives in Oslo, and there she paints, and paints again.", {}), hits[1]]
    room = len(tokenizer("He rows.", add_special_tokens=False).input_ids) + 1
    [best] = shortened(long, "Where does Ada live in Oslo?", Bm25(), tokenizer, room)  # not the shorter "He rows."
    assert best.text and long[0].text.startswith(best.text)
    assert shortened([], "Where?", Bm25(), tokenizer, 10) == []


def test_a_shorter_prompt_keeps_whole_hits(regrad):
    asked = [Query(question.question, "init+icl") for question in WORLD.questions[:3]]
    short = ShortenedReader(regrad, 8).answer_many(asked, top_k=3)
    whole = regrad.answer_many(asked, top_k=3)
    for one, other in zip(short, whole, strict=True):
        assert one.prompt_tokens < other.prompt_tokens
        assert [hit.text for hit in one.hits] == [hit.text for hit in other.hits]
