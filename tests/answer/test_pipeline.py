import asyncio
import threading
from dataclasses import replace

import pytest
import torch
from conftest import state_of, tiny_initialization, tiny_model
from peft import PeftModel
from qdrant_client import QdrantClient, models

from regrad_qdrant import Bm25, Document, GradientBank, MergeRule, ReGrad
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.answer.filling import FillPolicy
from regrad_qdrant.answer.generation import generate
from regrad_qdrant.answer.query import MODES, Query
from regrad_qdrant.answer.retrieval import SEARCHERS, Found
from regrad_qdrant.answer.weighing import Weighing
from regrad_qdrant.atoms.merge import SHORT
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.bank.documents import point_id
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.bank.layouts import Layout
from regrad_qdrant.bank.stores.base import PayloadWrite
from regrad_qdrant.errors import (
    AdapterError,
    AdapterInUseError,
    BankError,
    DataError,
    RecordError,
    RegradError,
    StaleAtomError,
    WrongModelError,
    WrongSpaceError,
)
from regrad_qdrant.model.plugin import base_of
from regrad_qdrant.model.prompts import Prompt

TEXTS = (
    "Ida Corvand works as a baker.",
    "Noor Selowan works as a diver.",
    "Orla Thornaby plays the harp.",
    "Galen Zimuken likes plum cake.",
)


@pytest.fixture
def regrad(model, tokenizer, initialization, tmp_path):
    bank = GradientBank.open(tmp_path, "docs", initialization.fingerprint)
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    regrad = ReGrad(model, tokenizer, bank, initialization)
    attach_atoms(bank, regrad.gradients, "int8")
    yield regrad
    bank.close()


def weights(regrad):
    return state_of(regrad.adapter)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_and_leaves_the_weights_as_they_were(regrad, mode):
    before = weights(regrad)
    answer = regrad.answer("What is the job of Ida Corvand?", mode=mode, top_k=2)
    assert weights(regrad) == before
    assert answer.mode == mode and answer.prompt_tokens > 0 and answer.timings.generate > 0
    assert answer.timings.total < 60
    hits = [hit.document_id for hit in answer.hits]
    if mode in ("direct", "init"):
        assert not hits
    elif mode == "random":
        assert hits and "d0" not in hits
    else:
        assert hits[0] == "d0"


def test_the_prompt_holds_the_passages_in_rag_alone_and_in_icl(regrad):
    lengths = {mode: regrad.answer("Who is Ida Corvand?", mode=mode, top_k=1).prompt_tokens for mode in MODES}
    assert lengths["direct"] == lengths["regrad"] == lengths["random"] == lengths["init"]
    assert lengths["rag"] == lengths["regrad+icl"] > lengths["direct"]


def test_direct_is_the_bare_model_though_the_plug_in_is_there(regrad, tokenizer):
    from regrad_qdrant.model.prompts import Prompt

    prompt = Prompt("Who is Ida?")
    ids = tokenizer(prompt.render(tokenizer), return_tensors="pt", add_special_tokens=False).input_ids
    output = tiny_model().generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=2)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip().split("\n")[0].strip()
    assert regrad.answer("Who is Ida?", mode="direct").text == expected


def test_answers_are_the_same_each_time(regrad):
    for mode in ("regrad", "random"):
        first = regrad.answer("What is the job of Ida Corvand?", mode=mode)
        again = regrad.answer("What is the job of Ida Corvand?", mode=mode)
        assert first.text == again.text and [h.id for h in first.hits] == [h.id for h in again.hits]


def test_a_callers_inference_mode_leaves_nothing_behind(regrad):
    question = "What is the job of Ida Corvand?"
    with torch.inference_mode():
        first = regrad.answer(question, top_k=1)
        flat = regrad.gradients.atoms([regrad.gradients.encode(TEXTS[0])])
    assert regrad.answer(question, top_k=1).text == first.text
    torch.testing.assert_close(flat, regrad.gradients.atoms([regrad.gradients.encode(TEXTS[0])]))


def summed(regrad, query, hits):
    [merged] = regrad.merged([Found(query, hits, [])])
    return merged.total


def test_a_stale_atom_is_skipped_recomputed_or_refused(regrad):
    question = "Who works as a baker, Ida Corvand or Noor Selowan?"
    regrad.bank.store.set_payload([PayloadWrite(point_id("d0"), {"text": "Ida Corvand works as a judge."})])
    with pytest.warns(UserWarning, match="has changed"):
        regrad.answer(question, top_k=2)
    regrad.filling.policy = FillPolicy(on_stale="refuse")
    with pytest.raises(StaleAtomError, match="ingest again"):
        regrad.answer(question, top_k=2)
    regrad.filling.policy = FillPolicy(on_stale="recompute")
    before = weights(regrad)
    regrad.answer(question, top_k=2)
    assert weights(regrad) == before
    [hit] = [hit for hit in regrad.bank.search(question, 2) if hit.stale]
    expected = regrad.gradients.atoms([regrad.gradients.encode("Ida Corvand works as a judge.")])[0]
    regrad.filling.policy = replace(regrad.filling.policy, codec="fp32")
    found = summed(regrad, Query(question), [hit])
    [weight] = regrad.weighing.weights([hit])
    torch.testing.assert_close(found, weight * expected)


def test_documents_without_atoms_are_reported(regrad):
    regrad.bank.drop()
    with pytest.warns(UserWarning) as caught:
        answer = regrad.answer("What is the job of Ida Corvand?", top_k=1)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and "; ".join(answer.notes) == messages[0]  # one a question, not one a document
    assert "has no atom of this initialization: run regrad-qdrant ingest" in messages[0]
    assert "with φ₀ alone" in messages[0]
    assert answer.text == regrad.answer("What is the job of Ida Corvand?", mode="init").text


def test_another_merge_rule_can_be_given(model, tokenizer, initialization, regrad):
    regrad.weighing.merge = MergeRule("top1")
    query = Query("Ida Corvand works as a diver")
    alone = summed(regrad, query, regrad.bank.search(query.question, 2))
    assert (alone == summed(regrad, query, regrad.bank.search(query.question, 1))).all()


def test_wrong_settings_are_refused(regrad, model, tokenizer, initialization):
    with pytest.raises(RegradError, match="regrad\\+icl"):
        regrad.answer("x", mode="magic")
    with pytest.raises(RegradError, match="recompute"):
        ReGrad(tiny_model(), tokenizer, regrad.bank, initialization, on_stale="ignore")
    with pytest.raises(WrongModelError):
        ReGrad(tiny_model(seed=5), tokenizer, regrad.bank, initialization)
    with pytest.raises(WrongSpaceError):
        ReGrad(tiny_model(), tokenizer, regrad.bank, tiny_initialization(tiny_model(), "lora"))


def test_atoms_computed_at_query_time_are_those_of_ingestion(regrad):
    stored = regrad.answer(QUESTIONS[0], mode="regrad", top_k=2)
    regrad.filling.policy = replace(regrad.filling.policy, codec="int8")  # as the fixture ingests
    online = regrad.answer(QUESTIONS[0], mode="online", top_k=2)
    assert online.text == stored.text and [hit.id for hit in online.hits] == [hit.id for hit in stored.hits]
    assert all(hit.record is None for hit in online.hits)


@pytest.mark.filterwarnings("ignore:document:UserWarning", "ignore:none of:UserWarning")
def test_a_bank_without_atoms_fills_by_use(regrad):
    expected = regrad.answer(QUESTIONS[0], top_k=2).text
    regrad.bank.drop()
    without = regrad.answer(QUESTIONS[0], mode="regrad", top_k=2).text
    assert without == regrad.answer(QUESTIONS[0], mode="init").text
    regrad.filling.policy = FillPolicy(codec="int8", on_missing="compute")
    assert regrad.answer(QUESTIONS[0], top_k=2).text == expected and regrad.bank.status().atoms == 0
    regrad.filling.policy = FillPolicy(codec="int8", on_missing="store")
    answer = regrad.answer(QUESTIONS[0], top_k=2)
    assert answer.text == expected and regrad.bank.status().atoms == len(answer.hits) > 0
    stored = regrad.bank.fetch([hit.id for hit in answer.hits])
    assert all(hit.record is not None and not hit.stale for hit in stored)


def test_what_can_not_be_stored_is_answered_all_the_same_and_said(regrad, monkeypatch):
    expected = regrad.answer(QUESTIONS[0], top_k=2).text
    regrad.bank.drop()
    regrad.filling.policy = FillPolicy(codec="int8", on_missing="store")

    def refused(*_arguments, **_options):
        raise BankError("this API key may not do that")

    monkeypatch.setattr(regrad.bank, "put", refused)
    with pytest.warns(UserWarning, match="could not be stored: this API key"):
        answer = regrad.answer(QUESTIONS[0], top_k=2)
    assert answer.text == expected and answer.weights and len(answer.notes) == 1


def test_what_fills_a_sidecar_says_where_it_is(model, tokenizer, initialization):
    client = QdrantClient(":memory:")
    bank = GradientBank(client, "docs", initialization.fingerprint, sidecar="docs-atoms")
    bank.create()
    bank.add(Document(f"d{i}", {"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS))
    with ReGrad(model, tokenizer, bank, initialization, on_missing="store") as regrad:
        hits = regrad.answer(QUESTIONS[0], top_k=2).hits
    reader = GradientBank(client, "docs", initialization.fingerprint)
    assert reader.status().atoms == len(hits) > 0


def test_after_the_end_asyncio_is_told_so_too(regrad):
    regrad.close()
    with pytest.raises(AdapterError, match="make a new one"):
        asyncio.run(regrad.aanswer(QUESTIONS[0]))


def test_only_what_is_asked_for_often_is_stored(regrad):
    regrad.bank.drop()
    regrad.filling.policy = FillPolicy(codec="int8", on_missing="store", store_after=3)
    for asked in (1, 2):
        regrad.answer(QUESTIONS[0], top_k=1)
        assert regrad.bank.status().atoms == 0, f"asked {asked} times"
    regrad.answer(QUESTIONS[1], top_k=1)
    regrad.answer(QUESTIONS[0], top_k=1)
    assert regrad.bank.status().atoms == 1


def test_a_batch_computes_what_is_missing_once_for_all_its_questions(regrad, monkeypatch):
    expected = [answer.text for answer in regrad.answer_many(QUESTIONS, top_k=2)]
    regrad.bank.drop()
    regrad.filling.policy = FillPolicy(codec="int8", on_missing="store")
    atoms, computed = regrad.gradients.atoms, []
    monkeypatch.setattr(regrad.gradients, "atoms", lambda documents: (computed.extend(documents), atoms(documents))[1])
    answers = regrad.answer_many(QUESTIONS, top_k=2)
    assert [answer.text for answer in answers] == expected
    assert len(computed) == len({hit.id for answer in answers for hit in answer.hits}) == regrad.bank.status().atoms


QUESTIONS = ["What is the job of Ida Corvand?", "Who plays the harp?", "Who likes plum cake, and of what kind?"]


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_answered_as_its_questions_one_by_one(regrad, mode):
    before = weights(regrad)
    batch = regrad.answer_many(QUESTIONS, mode=mode, top_k=2)
    singles = [regrad.answer(question, mode=mode, top_k=2) for question in QUESTIONS]
    assert [answer.text for answer in batch] == [answer.text for answer in singles]
    assert [answer.hits for answer in batch] == [answer.hits for answer in singles]
    assert [answer.prompt_tokens for answer in batch] == [answer.prompt_tokens for answer in singles]
    assert weights(regrad) == before and batch[0].timings.generate > 0


def test_a_batch_may_mix_modes_kinds_and_retrievers(regrad):
    hits = regrad.bank.fetch([point_id("d2")], [1.0])
    queries = [Query(QUESTIONS[0], mode) for mode in MODES]
    queries += [Query("Is Ida a baker?", "regrad", "yesno"), Query(QUESTIONS[1], "regrad+icl", hits=hits)]
    queries += [Query("Which harp?", "rag", "choice", ("red", "blue"))]
    for query, found in zip(queries, regrad.answer_many(queries, top_k=2), strict=True):
        expected = regrad.answer(
            query.question, mode=query.mode, type=query.type, choices=query.choices, hits=query.hits, top_k=2
        )
        assert (found.text, found.mode, found.hits) == (expected.text, expected.mode, expected.hits)
    assert regrad.answer_many([]) == []
    with pytest.raises(RegradError, match="mode 'loud'"):
        regrad.answer_many(QUESTIONS, mode="loud")


def test_a_batch_ends_each_answer_at_its_own_end_though_padding_is_an_ordinary_token(tokenizer, monkeypatch):
    """Rows that end early are filled up; with a tokenizer that has no padding token that is token 0, some word."""
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    ordinary = [i for i in range(len(bare)) if bare.convert_ids_to_tokens(i) not in bare.all_special_tokens]
    prompts = [Prompt("Who is Ida?"), Prompt("Who is Noor, the diver of the harbour?")]

    def said(input_ids, **_):
        """One word and the end, or word after word."""
        said = torch.tensor([[ordinary[5], bare.eos_token_id, 0, 0], [ordinary[5]] * 4])
        return torch.cat([input_ids, said], dim=1)

    model = tiny_model()
    monkeypatch.setattr(model, "generate", said)
    found = generate(model, bare, prompts)
    assert found[0].text == bare.decode([ordinary[5]]).strip() and found[1].text != found[0].text


@pytest.mark.filterwarnings("ignore:document:UserWarning", "ignore:none of:UserWarning")
def test_a_retrieved_text_that_can_have_no_atom_is_passed_over(regrad, tokenizer):
    short = next(token for token in ("a", "I", "x") if len(tokenizer(token).input_ids) == 1)
    regrad.bank.store.set_payload([PayloadWrite(point_id("d0"), {"text": short})])
    hits = [*regrad.bank.fetch([point_id("d0")], [2.0]), *regrad.bank.fetch([point_id("d1")], [1.0])]
    both = regrad.answer_many([Query(QUESTIONS[0], "online", hits=hits), Query(QUESTIONS[1], "online", hits=hits[1:])])
    with pytest.warns(UserWarning, match="can have no atom"):
        single = regrad.answer(QUESTIONS[0], mode="online", hits=hits)
    assert single.text == both[0].text


# -- tenants, damage, nothing found, one model for several ----------------------------------------------


BROAD = "Who works as a baker, works as a diver, plays the harp or likes plum cake?"  # all documents, of either tenant


def only(tenant):
    return models.Filter(must=[models.FieldCondition(key="tenant", match=models.MatchValue(value=tenant))])


@pytest.fixture
def tenants(regrad):
    """Every document belongs to one of two tenants, whose documents say nearly the same."""
    for i in range(len(TEXTS)):
        regrad.bank.store.set_payload([PayloadWrite(point_id(f"d{i}"), {"tenant": "ab"[i % 2]})])
    return regrad


def owners(answers):
    return {hit.payload["tenant"] for answer in answers for hit in answer.hits}


def test_a_filter_may_be_the_json_of_the_rest_interface(tenants):
    as_json = only("b").model_dump(exclude_none=True)
    assert owners([tenants.answer(BROAD, top_k=4, query_filter=as_json)]) == {"b"}
    assert {hit.payload["tenant"] for hit in tenants.bank.search(BROAD, 4, query_filter=as_json)} == {"b"}
    with pytest.raises(DataError, match="or its JSON, found 'tenant=b'"):
        tenants.answer(BROAD, query_filter="tenant=b")


WITH_DOCUMENTS = [mode for mode in MODES if mode not in ("direct", "init")]


@pytest.mark.parametrize("mode", WITH_DOCUMENTS)
def test_no_way_of_asking_returns_a_document_that_the_filter_excludes(tenants, mode):
    ask = {"mode": mode, "query_filter": only("b")}
    top_k = 1 if mode == "random" else 4  # which draws from the others that the filter lets pass
    several = [Query(question, mode, query_filter=only("b")) for question in (BROAD, BROAD[:40])]
    assert owners([tenants.answer(question, top_k=top_k, **ask) for question in (BROAD, BROAD[:40])]) == {"b"}
    assert owners(tenants.answer_many(several, top_k=top_k)) == {"b"}
    assert owners([asyncio.run(tenants.aanswer(BROAD, top_k=top_k, **ask))]) == {"b"}
    assert owners(asyncio.run(tenants.aanswer_many(several, top_k=top_k))) == {"b"}


def test_in_a_batch_every_question_has_its_own_filter(tenants):
    asked = [Query(BROAD, "rag", query_filter=only(tenant)) for tenant in "abba"]
    answers = tenants.answer_many(asked, top_k=4)
    assert [owners([answer]) for answer in answers] == [{"a"}, {"b"}, {"b"}, {"a"}]


@pytest.mark.parametrize("on_missing", ["compute", "store"])
def test_atoms_that_are_computed_are_those_of_the_filtered_documents(tenants, on_missing):
    tenants.bank.drop()
    tenants.filling.policy = FillPolicy(on_missing=on_missing)
    answer = tenants.answer(BROAD, top_k=4, query_filter=only("b"))
    assert set(answer.weights) == {hit.id for hit in answer.hits} and owners([answer]) == {"b"}
    stored = {hit.id for state, hit in tenants.bank.examined()}
    assert stored == (set(answer.weights) if on_missing == "store" else set())


def test_a_query_is_answered_as_its_parts_are(regrad):
    asked = Query(QUESTIONS[0], "rag", max_new_tokens=5)
    expected = regrad.answer(QUESTIONS[0], mode="rag", max_new_tokens=5, top_k=2)
    for found in (regrad.answer(asked, top_k=2), asyncio.run(regrad.aanswer(asked, top_k=2))):
        assert (found.text, found.mode, found.hits) == (expected.text, "rag", expected.hits)


def test_where_nothing_is_found_the_answer_and_a_warning_say_so(tenants):
    of_nobody = models.Filter(must=[models.FieldCondition(key="metadata.tenant", match=models.MatchValue(value="b"))])
    with pytest.warns(UserWarning, match=r"nothing was retrieved.*no point has the filter's field metadata\.tenant"):
        answer = tenants.answer(BROAD, query_filter=of_nobody)
    assert answer.hits == [] and "nothing was retrieved" in answer.notes[0]
    with pytest.warns(UserWarning, match="no document passes the filter"):
        tenants.answer(BROAD, query_filter=only("c"))
    with pytest.warns(UserWarning, match="no document was handed over: the answer comes from the model alone"):
        assert tenants.answer(BROAD, hits=[]).hits == []


def test_a_document_that_is_handed_over_again_counts_once(regrad):
    [best, other] = regrad.bank.search(BROAD, 2)
    once = regrad.answer(BROAD, hits=[best, other], top_k=2)
    again = regrad.answer(BROAD, hits=[best, best, other], top_k=2)
    assert (again.text, again.weights, again.hits) == (once.text, once.weights, once.hits)
    with pytest.raises(BankError, match="top_k must be at least 1, found 0"):
        regrad.answer(BROAD, hits=[best], top_k=0)


def test_half_a_letter_is_refused_wherever_it_stands():
    for of_query in ({"question": "\ud83d"}, {"choices": ("\ud83d", "b"), "type": "choice"}, {"system": "\ud83d"}):
        with pytest.raises(DataError, match="no valid Unicode"):
            Query(**{"question": "Who?"} | of_query)


def test_retrieved_points_without_text_are_an_error_that_names_their_fields(regrad, model):
    bank = GradientBank(regrad.bank.store, "docs", regrad.bank.space, layout=Layout("mine", "body"))
    regrad.bank = regrad.filling.bank = regrad.retrieval.bank = bank
    with pytest.raises(BankError, match=r"none of the retrieved points has a text.*'text'.*layout=Layout"):
        regrad.answer(BROAD)


def test_a_document_without_a_text_is_told_of_and_the_other_questions_are_answered(regrad):
    regrad.bank.add([Document("d9", {"id": "d9", "text": "Una Brel"})])
    regrad.bank.store.set_payload([PayloadWrite(point_id("d9"), {"text": ""})])
    with pytest.warns(UserWarning, match="no document that was retrieved has a text"):
        good, other = regrad.answer_many(["What is the job of Ida Corvand?", "Una Brel?"], top_k=1)
    assert good.weights and not other.weights and not good.notes


DAMAGES = {
    "a later version": lambda value: value | {"v": 3},
    "no atom in it": lambda value: {"v": 1, "space": value["space"]},
    "cut short": lambda value: value | {"atom": value["atom"][:40]},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_one_damaged_atom_is_skipped_recomputed_or_refused(regrad, damage):
    [first, second] = regrad.bank.search(BROAD, 2)
    regrad.bank.store.set_payload([PayloadWrite(first.id, {"regrad": damage(first.record.to_payload())})])
    with pytest.warns(UserWarning, match=f"document {first.document_id!r} has a damaged atom"):
        skipped = regrad.answer(BROAD, top_k=2)
    assert set(skipped.weights) == {second.id} and [hit.id for hit in skipped.hits] == [first.id, second.id]
    with pytest.warns(UserWarning, match="damaged"):
        both = regrad.answer_many([BROAD, QUESTIONS[1]], top_k=2)
    assert both[0].text == skipped.text and both[1].text
    regrad.filling.policy = FillPolicy(on_damaged="recompute", codec="int8")
    assert set(regrad.answer(BROAD, top_k=2).weights) == {first.id, second.id}
    regrad.filling.policy = FillPolicy(on_damaged="refuse")
    before = weights(regrad)
    with pytest.raises(RecordError):
        regrad.answer(BROAD, top_k=2)
    assert weights(regrad) == before


def test_where_sound_atoms_overflow_together_that_is_an_error_and_no_loop(regrad, monkeypatch):
    monkeypatch.setattr(regrad.weighing, "weights", lambda hits: [1.0] * len(hits))
    hits = regrad.bank.search(BROAD, 2)
    space = regrad.adapter.space
    [huge] = make_records(torch.full((1, space.numel), 3e38), [hits[0].text], regrad.bank.space, "fp32", space.layout)
    hits = [replace(hit, record=replace(huge, sha=hit.record.sha), relevance=1.0) for hit in hits]
    before = weights(regrad)
    with pytest.raises(RecordError, match="not finite"):
        regrad.answer(BROAD, hits=hits)
    assert weights(regrad) == before


def test_a_question_that_reads_no_document_waits_for_no_search(regrad):
    free = threading.Event()
    for _ in range(SEARCHERS):
        regrad.retrieval._searchers.submit(free.wait, 60)
    try:
        answer = asyncio.run(asyncio.wait_for(regrad.aanswer(BROAD, mode="direct"), 30))
        assert answer.text == regrad.answer(BROAD, mode="direct").text
    finally:
        free.set()


def test_windows_and_sentences_are_weighed_in_the_language_of_the_banks_words_whatever_their_vector_is_called(regrad):
    german = Bm25("german")
    bank = GradientBank(regrad.bank.store, regrad.bank.store.name, regrad.bank.space, embedders={"words": german})
    assert Weighing(regrad.weighing.merge, regrad.tokenizer, bank).bm25 is german


def test_a_model_is_taken_over_and_given_back_bit_for_bit(model, tokenizer, initialization, regrad):
    base = regrad.adapter.model.get_base_model()
    expected = regrad.answer(BROAD, mode="direct").text
    again = ReGrad(base, tokenizer, regrad.bank, initialization)  # the same cell of a notebook, run twice
    assert again.answer(BROAD, mode="direct").text == expected
    with pytest.raises(AdapterError, match="taken over"):
        regrad.answer(BROAD)
    with again:
        again.answer(BROAD)
    assert not any("lora" in name for name, _ in base.named_modules())
    plain = tiny_model().state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in base.state_dict().items())
    ReGrad(base, tokenizer, regrad.bank, initialization).close()
    again.close()


def test_a_short_text_weighs_less_and_a_long_one_in_full(regrad):
    hit = replace(regrad.bank.search(BROAD, 1)[0], text="Ida is a diver.")
    tokens = len(regrad.gradients.encode(hit.text).ids)
    assert regrad.weighing.weights([hit]) == [tokens / SHORT] and tokens < SHORT
    assert regrad.weighing.weights([replace(hit, text="Ida is a diver. " * 20)]) == [1]


def test_documents_that_were_read_without_atoms_are_applied(regrad):
    expected = regrad.answer("What is the job of Ida Corvand?", top_k=2)
    read = regrad.answer("What is the job of Ida Corvand?", mode="rag", top_k=2).hits
    found = regrad.answer("What is the job of Ida Corvand?", hits=read)
    assert all(hit.record is None for hit in read) and not found.notes
    assert (found.text, found.weights) == (expected.text, expected.weights)


def test_an_export_is_what_answers(regrad, tmp_path):
    question = "What is the job of Ida Corvand, and where does she live?"
    long = Document("long", {"id": "long", "text": "Noor is a diver. " * 40 + "Ida Corvand lives in Aalborg."})
    regrad.bank.add([long])
    attach_atoms(regrad.bank, regrad.gradients, "int8")
    hits = regrad.bank.search(question, 2)
    assert any(hit.record.rest for hit in hits)  # of several windows
    expected = regrad.answer(question, hits=hits)
    regrad.export(tmp_path / "q", question, hits)
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "q")
    assert generate(plain, regrad.tokenizer, [Prompt(question)])[0].text == expected.text
    bare = [replace(hit, record=None) for hit in hits]
    with pytest.raises(DataError, match="nothing to export: each of the documents .* has no atom"):
        regrad.export(tmp_path / "none", question, bare)
    with pytest.raises(DataError, match="no document was given"):
        regrad.export(tmp_path / "none", question, [])
    assert not (tmp_path / "none").exists()


def test_where_no_gradient_is_finite_the_answer_says_so(regrad, monkeypatch):
    atoms = regrad.gradients.atoms_in_batches
    monkeypatch.setattr(regrad.gradients, "atoms_in_batches", lambda *given: atoms(*given) * float("inf"))
    with pytest.warns(UserWarning, match="its gradient is not finite"):
        answer = regrad.answer(QUESTIONS[0], mode="online", top_k=1)
    assert not answer.weights and list(answer.skipped.values()) == ["can have no atom: its gradient is not finite"]


def test_what_would_wait_for_its_own_thread_is_refused(regrad, initialization):
    for block in (regrad.adapter.initial(), regrad.adapter.disabled()):
        with block:
            with pytest.raises(AdapterInUseError):
                regrad.stream(QUESTIONS[0])
            with pytest.raises(AdapterInUseError):
                asyncio.run(regrad.aanswer(QUESTIONS[0]))
            with pytest.raises(AdapterInUseError):
                asyncio.run(regrad.aanswer_many(QUESTIONS[:1]))
            with pytest.raises(AdapterInUseError):
                Adapter(base_of(regrad.adapter.model), initialization, beside=regrad.adapter)
    assert "".join(regrad.stream(QUESTIONS[0])) == regrad.answer(QUESTIONS[0]).text


def test_what_goes_in_a_list_is_not_taken_for_letters(regrad):
    with pytest.raises(DataError, match="questions go in a list"):
        regrad.answer_many("Who is Ida?")
    with pytest.raises(DataError, match=r"choices go in a list: \['abc'\]"):
        regrad.answer("Who is Ida?", type="choice", choices="abc")


def test_random_draws_from_what_is_there_now(regrad):
    question = "Is Ida a baker?"
    assert len(regrad.answer(question, mode="random", top_k=3).hits) == 3  # all but Ida's
    assert len(regrad.answer(question, mode="random", top_k=1).hits) == 1
    regrad.bank.remove(["d1", "d2"])
    assert [hit.key for hit in regrad.answer(question, mode="random", top_k=3).hits] == ["d3"]
    regrad.bank.add([Document("new", {"id": "new", "text": "Elin Marsk plays chess."})])
    attach_atoms(regrad.bank, regrad.gradients, "int8")
    assert {hit.key for hit in regrad.answer(question, mode="random", top_k=3).hits} == {"d3", "new"}
