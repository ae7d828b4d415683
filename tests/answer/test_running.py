"""A running batch says what each of its rows would say alone, whenever they join and leave."""

import pytest
import torch
from conftest import regrad_over, state_of

from regrad_qdrant import Query
from regrad_qdrant.answer.generation import generate
from regrad_qdrant.answer.running import Row, RunningBatch, Sampling
from regrad_qdrant.errors import RegradError
from regrad_qdrant.model.prompts import Prompt

TEXTS = ["Ida Corvand works as a baker in Aalborg.", "Noor Vasky is a diver.", "Orla Finch plays the harp."]
QUESTIONS = ["Who is Ida?", "What does Noor Vasky do for a living, and since when?", "What does Orla play?"]


@pytest.fixture
def regrad(model, tokenizer, tmp_path):
    with regrad_over(TEXTS, model, tokenizer, tmp_path) as regrad:
        yield regrad


def row_of(regrad, question, mode="regrad", sampling=None, **asked):
    [found] = regrad.retrieval.retrieve([Query(question, mode, **asked)], 2, None, 0)
    [merged] = regrad.merged([found])
    prompt = found.asked.prompt(found.hits)
    return Row(prompt, regrad.tokenizer, regrad.asking, merged.total, mode in ("direct", "rag"), sampling)


def finished(batch, *arrivals):
    """The texts of all rows, where one joins after every token until none is left to join."""
    left, texts = list(arrivals), {}
    while left or batch.rows:
        if left:
            batch.join([left.pop(0)])
        else:
            batch.step()
        for row in [row for row in batch.rows if row.finish]:
            texts[id(row)] = row.text
            batch.leave([row])
    return [texts[id(row)] for row in arrivals]


@pytest.mark.parametrize("mode", ["regrad", "direct", "rag", "init"])
def test_rows_that_join_one_by_one_say_what_each_says_alone(regrad, mode):
    before = state_of(regrad.adapter)
    rows = [row_of(regrad, question, mode) for question in QUESTIONS]
    said = finished(RunningBatch(regrad.adapter, regrad.tokenizer), *rows)
    assert said == [regrad.answer(question, mode=mode, top_k=2).text for question in QUESTIONS]
    assert state_of(regrad.adapter) == before


def test_the_rows_have_their_own_updates(regrad):
    alone = [regrad.answer("Who is Ida?", mode=mode).text for mode in ("regrad", "init")]
    rows = [row_of(regrad, "Who is Ida?", mode) for mode in ("regrad", "init")]
    assert rows[0].atom_sum is not None and rows[1].atom_sum is None
    assert finished(RunningBatch(regrad.adapter, regrad.tokenizer), *rows) == alone
    assert alone[0] != alone[1]


def test_a_row_that_leaves_before_its_end_changes_nothing_for_the_others(regrad):
    rows = [row_of(regrad, question) for question in QUESTIONS]
    batch = RunningBatch(regrad.adapter, regrad.tokenizer)
    batch.join(rows)
    batch.step()
    batch.leave([rows[1]])
    assert batch.rows == [rows[0], rows[2]]
    while batch.rows:
        batch.leave([row for row in batch.rows if row.finish])
        if batch.rows:
            batch.step()
    assert [rows[i].text for i in (0, 2)] == [regrad.answer(QUESTIONS[i], top_k=2).text for i in (0, 2)] != ["", ""]


def test_the_cache_forgets_what_only_gone_rows_had(regrad):
    long, short = row_of(regrad, " ".join(QUESTIONS * 3)), row_of(regrad, "Who is Ida?")
    batch = RunningBatch(regrad.adapter, regrad.tokenizer)
    batch.join([long, short])
    batch.leave([long])
    assert batch._mask.shape == (1, len(short.prompt_ids))
    assert batch._cache.layers[0].keys.shape[2] == len(short.prompt_ids)


def test_a_batch_of_sliding_windows_is_closed_until_it_is_empty(regrad):
    from transformers.cache_utils import DynamicSlidingWindowLayer

    batch = RunningBatch(regrad.adapter, regrad.tokenizer)
    assert batch.is_open
    batch.join([row_of(regrad, "Who is Ida?")])
    assert batch.is_open
    batch._cache.layers[1] = DynamicSlidingWindowLayer(8)
    assert not batch.is_open
    with pytest.raises(RegradError, match="before it is empty"):
        batch.join([row_of(regrad, "Who is Ida?")])


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(regrad):
    def drawn(seed):
        row = row_of(regrad, "Who is Ida?", sampling=Sampling(temperature=2.0, seed=seed), max_new_tokens=12)
        finished(RunningBatch(regrad.adapter, regrad.tokenizer), row)
        return row.tokens

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_smallest_nucleus_is_greedy(regrad):
    greedy = row_of(regrad, "Who is Ida?")
    drawn = row_of(regrad, "Who is Ida?", sampling=Sampling(temperature=1.0, top_p=1e-9))
    finished(RunningBatch(regrad.adapter, regrad.tokenizer), greedy, drawn)
    assert greedy.tokens == drawn.tokens


def test_only_the_nucleus_is_drawn_from(tokenizer, regrad):
    row = row_of(regrad, "Who is Ida?", sampling=Sampling(temperature=1.0, top_p=0.6, seed=0))
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert {row.choose(logits, 0) for _ in range(200)} == {0, 1}


def test_an_answer_ends_before_a_stop_text_and_none_of_it_is_shown(regrad):
    free = row_of(regrad, "Who is Ida?", max_new_tokens=20)
    finished(RunningBatch(regrad.adapter, regrad.tokenizer), free)
    stop = free.text[6:9]
    row = row_of(regrad, "Who is Ida?", max_new_tokens=20, sampling=Sampling(stop=(stop,)))
    batch, shown = RunningBatch(regrad.adapter, regrad.tokenizer), []
    batch.join([row])
    while row.finish is None:
        shown.append(row.shown)
        batch.step()
    assert row.text == free.text[: free.text.index(stop)] and row.finish == "stop"
    assert all(row.text.startswith(text) for text in shown)


def test_what_may_be_the_beginning_of_thoughts_or_of_a_stop_is_not_shown_yet(regrad):
    row = row_of(regrad, "Who is Ida?", sampling=Sampling(stop=("END",)))
    for text, shown in (("a <th", "a"), ("a <b", "a <b"), ("a ENX", "a ENX"), ("ab", "ab")):
        row.text = text
        assert row.shown == shown
    row.text = "a EN"
    assert row.shown == "a"
    row.text, row.finish = "a EN", "stop"
    assert row.shown == "a EN"


def test_an_answer_that_is_cut_says_so(regrad):
    row = row_of(regrad, "Who is Ida?", max_new_tokens=2)
    finished(RunningBatch(regrad.adapter, regrad.tokenizer), row)
    assert row.finish == "length" and len(row.tokens) == 2


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_a_way_to_draw_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(RegradError, match="top_p above 0"):
        Sampling(**wrong)


def test_a_conversation_and_a_system_message_stand_in_the_prompt(model, tokenizer):
    turns = (("user", "Who is Ida?"), ("assistant", "A baker."))
    text = Prompt("Where?", system="Be kind.", turns=turns).render(tokenizer)
    parts = ["system\nBe kind.", "user\nWho is Ida?", "assistant\nA baker.", "user\nWhere?"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and "few words" not in text
    assert generate(model, tokenizer, [Prompt("Where?", turns=turns)])[0].prompt_tokens > 20
    with pytest.raises(ValueError, match="a turn is the user's"):
        Prompt("Where?", turns=(("tool", "x"),))


def test_where_a_row_cant_join_the_others_do_not_go_on_with_half_a_cache(regrad, monkeypatch):
    from regrad_qdrant.answer import running

    batch, calls = RunningBatch(regrad.adapter, regrad.tokenizer), []
    batch.join([row_of(regrad, "Who is Ida?")])

    def failing(ours, theirs, dim):
        calls.append(dim)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return beside(ours, theirs, dim)

    beside = running._beside
    monkeypatch.setattr(running, "_beside", failing)
    late = row_of(regrad, "Who is Noor?")
    with pytest.raises(RuntimeError, match="memory"):
        batch.join([late])
    assert batch.rows == [] and late.tokens == []
    monkeypatch.undo()
    assert finished(batch, late) == [regrad.answer("Who is Noor?", top_k=2).text]
