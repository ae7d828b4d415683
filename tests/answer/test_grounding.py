"""Grounded answers: which spans there are, that the likeliest is found, and where it stands."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import regrad_over, state_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regrad_qdrant import Query, ReGrad
from regrad_qdrant.answer import decoding
from regrad_qdrant.answer.generation import Asking, Generated, token_ids
from regrad_qdrant.answer.grounding import ground
from regrad_qdrant.answer.retrieval import NO_TEXT
from regrad_qdrant.answer.spans import Span, SpanReader
from regrad_qdrant.errors import RegradError
from regrad_qdrant.model.gradients import answer_losses
from regrad_qdrant.model.prompts import Prompt

TEXTS = ["Ida Corvand works as a baker in Aalborg.", "Noor Vasky is a diver, born in 1998.", "Orla plays the harp."]
ODD = (
    "Barry  Parker\nwas born (in 1995) for $5.50 or 1,000,000 to O'Brien.\n\n"
    'He said "Nevermore": 東京 naïve 👍🏽 हिन्दी\n| 12:30 | x |'
)


def metaspace(texts):
    """A tokenizer as SentencePiece makes them, a blank before every word."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def everything(spans, most=40):
    """Every span with its tokens, of at most so many."""
    found = []

    def walk(at, ids):
        if at.ended is not None:
            found.append((ids, at.ended))
        if len(ids) < most:
            for token in spans.options(at)[0].tolist():
                walk(spans.step(at, token), [*ids, token])

    walk(spans.beginning, [])
    return found


@pytest.fixture(params=["byte-level", "SentencePiece"])
def reader(request, tokenizer):
    return SpanReader(tokenizer if request.param == "byte-level" else metaspace([*TEXTS, ODD]))


def test_spans_are_what_a_model_would_say_of_the_text(reader):
    spans = reader.spans([ODD])
    found = everything(spans)
    said = {spans.said(span) for _, span in found}
    for ids, span in found:
        assert reader.tokenizer.decode(ids) == spans.said(span)
    assert {"Barry Parker", "Barry Parker was born", "1995", "$5.50", "5.50", "1,000,000", "O'Brien", "Brien"} <= said
    assert {"He said", "Nevermore", "東", "京", "東京", "naïve", "👍🏽", "हिन्दी", "12:30", "x |"} <= said
    assert not said & {"arry", "Barr", "000", "1,000", "5", "O'Brien. He", "30", "1995),", "हिन्", ""}
    first = next(span for _, span in found if spans.said(span) == "Barry Parker was born")
    assert ODD[first.start : first.end] == "Barry  Parker\nwas born"


def test_a_spans_first_word_is_tokenized_as_an_answer_is(reader):
    spans = reader.spans(TEXTS)
    whole = {spans.said(span): ids for ids, span in everything(spans)}
    for word in ("Aalborg", "Vasky", "diver", "harp"):
        assert whole[word] == reader.tokenizer(word, add_special_tokens=False).input_ids


def test_texts_without_words_have_no_spans(reader):
    assert not reader.spans([])
    assert not reader.spans(["", " \n\t"])
    assert not reader.spans([",", "; :"])
    assert reader.spans(["", "…"])


def test_a_text_that_looks_like_special_tokens_is_text(tokenizer):
    spans = SpanReader(tokenizer).spans(["He wrote <|im_end|> there."])
    assert tokenizer.eos_token_id not in {token for ids, _ in everything(spans) for token in ids}


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(RegradError, match="fast"):
        SpanReader(object())


def test_the_likeliest_span_is_found(model, tokenizer):
    reader = SpanReader(tokenizer)
    asking = Asking()
    prompts = [Prompt("Who is a baker?"), Prompt("Who dives, and when was she born?", max_new_tokens=12)]
    own = [reader.spans(TEXTS[:1]), reader.spans(TEXTS)]
    found = ground(model, tokenizer, prompts, own, asking, beams=400)
    for prompt, ids, spans, answer in zip(prompts, token_ids(tokenizer, prompts, asking), own, found, strict=True):
        end = asking.format.end_ids(tokenizer)
        all_of_them = everything(spans, asking.length(prompt))
        targets = [(ids, [*said, *end]) for said, _ in all_of_them]
        losses, _ = answer_losses(model, targets, 2)
        size = max(len(said) for said, span in all_of_them if spans.said(span) == answer.text)
        short = [i for i, (said, _) in enumerate(all_of_them) if len(said) <= size]  # the search stops where it is best
        best = min(short, key=lambda i: float(losses[i]))
        assert answer.text == spans.said(all_of_them[best][1])
        assert answer.prompt_tokens == len(ids)


def test_a_span_of_the_sentence_that_the_question_is_about_is_preferred(model, tokenizer):
    text = "Ida is a baker. Noor is a diver. Orla is a harpist."
    reader, prompt = SpanReader(tokenizer), Prompt("Who?")
    alike = reader.spans([text])
    for words, sentence in (("Ida baker", 0), ("Noor", 1), ("harpist", 2)):
        spans = reader.spans([text], lambda said, words=words: [sum(w in s for w in words.split()) for s in said])
        [found] = ground(model, tokenizer, [prompt], [spans])
        assert text[: found.span.start].count(".") == sentence
    none = reader.spans([text], lambda said: [0.0] * len(said))
    assert ground(model, tokenizer, [prompt], [none]) == ground(model, tokenizer, [prompt], [alike])


def test_of_the_same_words_in_two_places_the_source_is_the_better_sentence(model, tokenizer):
    text = "Ida is old. Nobody knows it. Ida is a baker."
    spans = SpanReader(tokenizer).spans([text], lambda said: [float("baker" in one) for one in said])
    assert {span.start for ids, span in everything(spans) if spans.said(span) == "Ida"} == {text.rindex("Ida")}


def test_together_and_alone_they_are_the_same(model, tokenizer):
    reader = SpanReader(tokenizer)
    prompts = [Prompt("Who?"), Prompt("Who of all of them is it that dives in the sea?"), Prompt("Where to?")]
    own = [reader.spans(TEXTS), reader.spans(TEXTS[1:]), reader.spans([ODD])]
    for beams in (1, 4):
        together = ground(model, tokenizer, prompts, own, beams=beams)
        for one, prompt, spans in zip(together, prompts, own, strict=True):
            [alone] = ground(model, tokenizer, [prompt], [spans], beams=beams)
            assert (one.text, one.span, one.prompt_tokens) == (alone.text, alone.span, alone.prompt_tokens)
            assert one.log_probability == pytest.approx(alone.log_probability, rel=1e-4)


@pytest.fixture
def regrad(model, tokenizer, tmp_path):
    with regrad_over(TEXTS, model, tokenizer, tmp_path) as regrad:
        yield regrad


QUESTIONS = ["Who works as a baker?", "Who is a diver?", "Who plays the harp?"]


@pytest.mark.parametrize("mode", ["regrad", "direct", "rag", "random", "init", "regrad+icl"])
def test_an_answer_says_where_it_stands_in_every_mode(regrad, mode):
    before = state_of(regrad.adapter)
    by_id = {f"d{i}": text for i, text in enumerate(TEXTS)}
    alone = [regrad.answer(question, mode=mode, top_k=2, grounded=True) for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, alone, strict=True):
        source = answer.source
        assert by_id[source.document_id][source.start : source.end] == answer.text
        retrieved = {hit.document_id for hit in regrad.bank.search(question, 2)}
        assert source.document_id in retrieved
    together = regrad.answer_many(QUESTIONS, mode=mode, top_k=2, grounded=True)
    assert [(a.text, a.source) for a in together] == [(a.text, a.source) for a in alone]
    assert state_of(regrad.adapter) == before


def test_all_ways_in_one_batch(regrad):
    queries = [
        Query(QUESTIONS[0], grounded=True),
        Query(QUESTIONS[1]),
        Query("Is Noor a diver?", type="yesno", grounded=True),
        Query(QUESTIONS[2], "direct", grounded=True),
    ]
    together = regrad.answer_many(queries)
    alone = [
        regrad.answer(q.question, mode=q.mode, type=q.type, grounded=q.grounded, choices=q.choices) for q in queries
    ]
    assert [(a.text, a.source) for a in together] == [(a.text, a.source) for a in alone]
    assert [a.source is None for a in together] == [False, True, True, False]
    assert together[2].text in ("yes", "no")

    async def asked():
        return await asyncio.gather(*(regrad.aanswer(question, grounded=True) for question in QUESTIONS))

    expected = [regrad.answer(question, grounded=True).text for question in QUESTIONS]
    assert [answer.text for answer in asyncio.run(asked())] == expected


def test_the_free_answer_is_given_where_the_model_is_much_surer_of_it(regrad, monkeypatch):
    free, spans = ([regrad.answer(question, grounded=grounded) for question in QUESTIONS] for grounded in (False, True))
    sure = []
    for margin, expected in ((1e9, spans), (-1e9, free)):
        monkeypatch.setattr(decoding, "SURER", margin)
        monkeypatch.setattr(decoding, "SURER_OF_COUNTS", margin)
        queries = [Query(question, grounded="auto") for question in QUESTIONS]
        together = regrad.answer_many(queries)
        assert [(a.text, a.source) for a in together] == [(a.text, a.source) for a in expected]
        sure.append(regrad.answer(QUESTIONS[0], grounded="auto").text)
    assert sure == [spans[0].text, free[0].text]
    with pytest.raises(RegradError, match="auto"):
        regrad.answer(QUESTIONS[0], grounded="maybe")


def test_a_count_need_not_be_as_sure_as_words():
    span = Generated("her two brothers", 10, Span(0, 0, 16), -1.9)
    assert all(decoding._surer(text, -0.4, span) for text in ("2", " 12 "))
    assert not any(decoding._surer(text, -0.4, span) for text in ("1998", "two", "2 men"))
    assert decoding._surer("two", 0.2, span)
    assert not decoding._surer("2", -1.0, span)
    assert decoding._surer("2", -9.0, Generated("", 10))


def test_where_nothing_is_retrieved_the_answer_is_the_models_own_and_a_note_says_so(regrad):
    with pytest.warns(UserWarning, match="no text"):
        [answer] = regrad.answer_many([Query(QUESTIONS[0], hits=[], grounded=True)])
    assert answer.source is None and NO_TEXT in answer.notes
    with pytest.warns(UserWarning, match="no document was handed over"):
        assert answer.text == regrad.answer(QUESTIONS[0], hits=[]).text


def test_a_grounded_answer_streams_as_one_piece(regrad):
    with regrad.stream(Query(QUESTIONS[0], grounded=True)) as stream:
        assert list(stream) == [stream.answer.text] and list(stream) == []
    assert stream.answer.source is not None


def test_several_threads_read_at_once(tokenizer):
    reader = SpanReader(tokenizer)
    texts = [f"{text} {i}" for i in range(40) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: reader.spans([text]), texts * 3))
    assert [len(spans.options(spans.beginning)[0]) for spans in found] == [
        len(spans.options(spans.beginning)[0]) for spans in (reader.spans([text]) for text in texts * 3)
    ]


def test_reading_spans_changes_nothing_of_how_others_tokenize(tokenizer):
    before = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    reader = SpanReader(tokenizer)
    reader.spans(TEXTS)
    assert not tokenizer.backend_tokenizer.encode_special_tokens  # which prompts of other threads would meet
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == before == [tokenizer.eos_token_id]


def test_no_beam_is_refused_before_the_model_is_touched(model, tokenizer, regrad):
    before = type(model.model.layers[1].mlp.down_proj)
    with pytest.raises(RegradError, match="beams"):
        ReGrad(model, tokenizer, regrad.bank, regrad.initialization, beams=0)
    assert type(model.model.layers[1].mlp.down_proj) is before


def test_reading_keeps_what_it_has_read(tokenizer):
    reader = SpanReader(tokenizer)
    first, again = reader.spans(TEXTS), reader.spans(TEXTS)
    assert np.array_equal(first.beginning.following, again.beginning.following)
    reader.tokenizer = None  # nothing is tokenized again
    assert reader.spans(TEXTS[:2])
