"""What the model says: ends, greed, options, streams, prompts of one's own."""

import copy
import functools
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import regrad_over, state_of, tiny_model

from regrad_qdrant import Prompt, Query, ReGrad
from regrad_qdrant.answer.generation import Asking, choose, encoded, generate, mean_log_probabilities, next_logits
from regrad_qdrant.errors import ContextLengthError, DataError, RegradError
from regrad_qdrant.model.gradients import answer_losses
from regrad_qdrant.model.plugin import base_of
from regrad_qdrant.model.prompts import PromptFormat

TEXTS = ["Ida Corvand works as a baker in Aalborg.", "Noor Vasky is a diver.", "Orla Finch plays the harp."]


@pytest.fixture
def regrad(model, tokenizer, tmp_path):
    with regrad_over(TEXTS, model, tokenizer, tmp_path) as regrad:
        yield regrad


def ids_of(model, tokenizer, prompt, format=None):
    ids = tokenizer(prompt.render(tokenizer, format), return_tensors="pt", add_special_tokens=False).input_ids
    return ids, model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=2)[0, ids.shape[1] :].tolist()


def test_an_answer_ends_at_every_token_that_the_model_names(model, tokenizer):
    prompt = Prompt("Who is Ida?")
    _, said = ids_of(model, tokenizer, prompt)
    third = said[2]
    model.generation_config.eos_token_id = [2, third]
    [found] = generate(model, tokenizer, [prompt])
    assert found.text == tokenizer.decode(said[: said.index(third)], skip_special_tokens=True).strip().split("\n")[0]
    assert found.finish == "stop"
    assert model.generation_config.eos_token_id == [2, third]


def test_greedy_is_greedy_whatever_the_models_own_generation_config_says(model, tokenizer):
    prompt = Prompt("Who is Ida?")
    [plain] = generate(model, tokenizer, [prompt])
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample = 5.0, 1, True
    assert generate(model, tokenizer, [prompt]) == [plain]
    assert model.generation_config is config and config.repetition_penalty == 5.0


def test_the_output_embedding_gets_no_cut_of_other_memory(model, tokenizer):
    base = base_of(model)
    output, strides = base.get_output_embeddings(), []
    prompts = [Prompt("Who is Ida?"), Prompt("Who is Noor, and where does she dive?")]
    handle = output.register_forward_hook(lambda _module, inputs, _out: strides.append(inputs[0].stride()))
    try:
        generate(model, tokenizer, prompts)
        next_logits(base, *encoded(base, tokenizer, prompts[:1]), None)
    finally:
        handle.remove()
    hidden = base.config.hidden_size
    assert len(strides) > 2 and set(strides) == {(hidden, hidden, 1)}  # as strides of (rows, 1, hidden) are
    assert not output._forward_pre_hooks


def test_answers_that_go_on_from_one_reading_of_their_prompt_have_the_log_probabilities_of_a_whole_pass(
    model, tokenizer
):
    prompts = [Prompt("Is it so?"), Prompt("Which of the two houses by the sea is red, and since when?")]
    said = ["a red house", "no"]
    found = mean_log_probabilities(model, tokenizer, prompts, said, Asking())
    ids = [tokenizer(prompt.render(tokenizer), add_special_tokens=False).input_ids for prompt in prompts]
    targets = [[*tokenizer(one, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for one in said]
    losses, _ = answer_losses(model, list(zip(ids, targets, strict=True)), 0)
    assert found == pytest.approx((-losses).tolist(), abs=1e-5)


def test_a_spread_model_whose_forward_is_wrapped_is_asked_for_its_last_logits_alone(model, tokenizer):
    base = base_of(model)
    ids, mask = encoded(base, tokenizer, [Prompt("Is it so?")])
    expected, _ = next_logits(base, ids, mask, None)
    asked, own = [], base.forward

    def wrapped(*args, **options):  # as accelerate's hooks do
        asked.append(options)
        return own(*args, **options)

    base.forward = functools.partial(wrapped)
    try:
        found, _ = next_logits(base, ids, mask, None)
    finally:
        del base.forward
    assert torch.equal(found, expected) and asked[0]["logits_to_keep"] == 1 and "position_ids" in asked[0]


def test_options_are_chosen_by_the_mean_log_probability_of_their_tokens_and_end(model, tokenizer):
    prompts = [Prompt("Is it so?", "yesno"), Prompt("Which?", "choice", ("a red house", "blue", "the sea"))]
    for prompt, found in zip(prompts, choose(model, tokenizer, prompts), strict=True):
        scores = {}
        for said, option in prompt.spellings:
            ids = tokenizer(prompt.render(tokenizer), add_special_tokens=False).input_ids
            target = [*tokenizer(said, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            logits = model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            scores[option] = max(float(logits[range(len(target)), target].mean()), scores.get(option, -math.inf))
        assert found.text == max(scores, key=scores.get)
    assert [said for said, _ in prompts[0].spellings] == ["yes", "Yes", "no", "No"]


@pytest.mark.parametrize("mode", ["direct", "rag", "regrad", "regrad+icl", "init"])
def test_a_question_with_options_is_answered_with_one_of_them_alone_and_in_a_batch(regrad, mode):
    asked = [
        Query("Is Ida a baker?", mode, "yesno"),
        Query("What is Noor?", mode),
        Query("What does Orla play?", mode, "choice", ("harp", "horn", "bells", "drum")),
    ]
    before = state_of(regrad.adapter)
    together = regrad.answer_many(asked, top_k=2)
    alone = [regrad.answer(a.question, mode=mode, type=a.type, choices=a.choices, top_k=2) for a in asked]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[0].text in ("yes", "no") and together[2].text in asked[2].choices
    assert state_of(regrad.adapter) == before


def test_an_option_is_weighed_whole_however_short_an_answer_may_be(regrad):
    places = ("the Alps", "the Caucasus", "the Andes")
    texts = {
        regrad.answer("Where is Ida?", type="choice", choices=choices, top_k=2, max_new_tokens=most).text
        for choices in (places, places[::-1])
        for most in (None, 1)
    }
    assert len(texts) == 1


def test_an_answer_of_one_line_ends_with_it(model, tokenizer, monkeypatch):
    prompts = [Prompt("Who?"), Prompt("Who?", system="Answer in lines.")]
    verdicts = []

    def written(input_ids, attention_mask, stopping_criteria, **_options):
        said = tokenizer(["\nIda\nNoor"] * 2, return_tensors="pt", add_special_tokens=False).input_ids
        for end in range(1, said.shape[1] + 1):
            ids = torch.cat([input_ids, said[:, :end]], dim=1)
            verdicts.append([bool(over) for over in stopping_criteria[0](ids, None)])
        return ids

    monkeypatch.setattr(base_of(model), "generate", written)
    assert [found.text for found in generate(model, tokenizer, prompts)] == ["Ida", "Ida\nNoor"]
    assert verdicts[0] == [False, False] and verdicts[-1] == [True, False]


def test_a_template_that_takes_no_system_message_gets_it_with_the_question(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    )
    asked = Prompt("Who?").render(own)
    assert asked.startswith("[user] ") and PromptFormat().system["open"] in asked and "Who?" in asked
    own.chat_template = "{{ raise_exception('No conversation is right') }}"
    with pytest.raises(Exception, match="No conversation is right"):
        Prompt("Who?").render(own)


def test_a_stream_is_the_answer_in_pieces_and_restores_on_every_way_out(regrad, tokenizer):
    expected = regrad.answer("What is Noor?", top_k=2)
    before = state_of(regrad.adapter)
    stream = regrad.stream("What is Noor?", top_k=2)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == expected.text and len(pieces) > 1 and list(stream) == []
    assert stream.answer.weights == expected.weights and state_of(regrad.adapter) == before
    with regrad.stream(Query("What is Noor?", max_new_tokens=60)) as broken:
        next(iter(broken))
    assert state_of(regrad.adapter) == before and regrad.answer("What is Noor?", top_k=2).text == expected.text
    assert "".join(regrad.stream(Query("Is Noor here?", type="yesno"))) in ("yes", "no")
    with pytest.raises(RegradError, match="mode"):
        regrad.stream(Query("What?", "loud"))


def test_what_fails_while_streaming_reaches_the_reader(regrad, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(regrad.adapter.model.get_base_model(), "generate", fail)
    before = state_of(regrad.adapter)
    with pytest.raises(RuntimeError, match="no memory"):
        list(regrad.stream("What is Noor?"))
    assert state_of(regrad.adapter) == before


def test_the_answers_length_and_the_whole_prompt_can_be_ones_own(model, tokenizer, regrad):
    longest = regrad.answer("Who?", mode="direct", max_new_tokens=40).text
    short = regrad.answer("Who?", mode="direct", max_new_tokens=3)
    assert longest.startswith(short.text) and short.finish == "length"
    [again] = regrad.answer_many([Query("Who?", "direct", max_new_tokens=3)])
    assert (again.text, again.finish) == (short.text, "length")
    assert regrad.answer("Who?", mode="direct", type="yesno").finish == "stop"
    asked = []
    own = ReGrad(
        model, tokenizer, regrad.bank, regrad.initialization, prompt=lambda p: asked.append(p) or "Q:" + p.question
    )
    answer = own.answer("Who is Ida?", mode="rag", top_k=1)
    assert answer.prompt_tokens == len(tokenizer("Q:Who is Ida?", add_special_tokens=False).input_ids)
    assert asked[0].passages == (TEXTS[0],)
    with pytest.raises(ValueError, match="max_new_tokens"):
        own.answer("Who?", max_new_tokens=0)


def test_thoughts_are_no_answer():
    format = PromptFormat()
    assert format.said("<think>\nHm, Ida.\n</think>\n\nA baker\nIndeed") == "A baker"
    assert format.said("<think>never ending") == ""
    assert PromptFormat(first_line=False, end="##").said("two\nlines ## rest") == "two\nlines"
    said = "<think>\nHm, Ida.\n</think>\n\nA baker\n"
    assert [end for end in range(len(said) + 1) if format.is_over(said[:end])] == [len(said)]


def test_a_format_is_data_and_says_what_it_needs(tokenizer, tmp_path):
    values = {
        "system": {"open": "Reply briefly."},
        "user": "Question: {question}{choices}",
        "answer": "It is ",
        "end": ".",
    }
    (tmp_path / "prompt.json").write_text(json.dumps(values))
    format = PromptFormat.load(tmp_path / "prompt.json")
    text = Prompt("Who?").render(tokenizer, format)
    assert text.startswith("<|im_start|>system\nReply briefly.<|im_end|>\n<|im_start|>user\nQuestion: Who?<|im_end|>")
    assert text.endswith("<|im_start|>assistant\nIt is ")
    assert format.target(tokenizer, "Ida", 40) == tokenizer("Ida").input_ids + tokenizer(".").input_ids
    assert PromptFormat.of(format.differences()) == format and PromptFormat().differences() == {}
    for wrong in ({"user": "{query}"}, {"system": {"essay": "x"}}, {"colour": 1}, [], {"user": 3}):
        with pytest.raises(DataError):
            PromptFormat.of(wrong)


def test_an_initialization_keeps_its_prompt(initialization, tmp_path):
    from dataclasses import replace

    from regrad_qdrant import MetaInitialization

    own = replace(initialization, prompt=PromptFormat(user="Q: {question}{choices}"))
    own.save(tmp_path)
    assert MetaInitialization.load(tmp_path).prompt == own.prompt
    assert own.fingerprint == initialization.fingerprint  # atoms do not depend on it


def test_an_answer_names_what_was_skipped(regrad):
    [hit] = regrad.bank.search("Noor diver", 1)
    regrad.bank.store.delete_keys([f"{regrad.bank.payload_key}"], id_filter(hit.id))
    with pytest.warns(UserWarning, match="has no atom"):
        answer = regrad.answer("Noor diver", top_k=2)
    assert list(answer.skipped) == [hit.id] and "has no atom" in answer.skipped[hit.id]
    assert hit.id not in answer.weights


def id_filter(key):
    from qdrant_client import models

    return models.Filter(must=[models.HasIdCondition(has_id=[key])])


def test_an_asking_renders_alike_for_one_and_many(model, tokenizer):
    prompts = [Prompt(q) for q in ("Who?", "Where is the harbour of Aalborg?")]
    asking = Asking(PromptFormat(end="\n"))
    together = generate(model, tokenizer, prompts, asking)
    assert together == list(itertools.chain(*(generate(model, tokenizer, [p], asking) for p in prompts)))
    assert tiny_model().generation_config.eos_token_id == 2


def test_a_stream_goes_on_over_lines_where_the_system_message_is_ones_own(regrad, monkeypatch):
    def canned(found, started, streamer, stopping):
        for line in ("First", " line\nSec", "ond line\n", "Third"):
            streamer.on_finalized_text(line)
        assert not bool(stopping(torch.zeros(1, 1), None).any()) or found.asked.system is None
        text = regrad.asking.said(found.asked.prompt(found.hits), "First line\nSecond line\nThird")
        return SimpleNamespace(text=text, notes=[], skipped={})

    monkeypatch.setattr(regrad, "_one", canned)
    assert "".join(regrad.stream(Query("Who?", system="Answer in lines."))) == "First line\nSecond line\nThird"
    assert "".join(regrad.stream("Who?")) == "First line"


@pytest.mark.parametrize("grounded", [False, True])
def test_a_prompt_that_the_model_has_no_room_for_is_refused(regrad, grounded):
    before = state_of(regrad.adapter)
    with pytest.raises(DataError, match="more than the 512 of the model's context; let less stand"):
        regrad.answer("Who is it? " * 300, grounded=grounded)
    with pytest.raises(DataError, match="more than the 512"):
        regrad.answer_many(["Who is it? " * 300], mode="direct")
    with pytest.raises(ContextLengthError, match=r"ask for 4\d\d at most, or let less"):
        regrad.answer("Who is it?", max_new_tokens=5000)
    assert state_of(regrad.adapter) == before
