"""Continued pre-training, on raw texts and on reading comprehension made of them."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_initialization, tiny_model

from regrad_loaders.baselines.comprehension import MOST, comprehension_text
from regrad_loaders.baselines.continued import continued
from regrad_loaders.data.facts import generate
from regrad_loaders.data.folders import Question
from regrad_loaders.evaluation.making import injected
from regrad_qdrant.bank.corpus import Passage
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.gradients import document_losses, pad
from regrad_qdrant.model.plugin import plug_in


@pytest.fixture
def texts():
    return [passage.text for passage in generate("train", 6, 1).passages]


def loss(model, tokenizer, initialization, texts):
    peft_model = plug_in(model, initialization)
    with torch.no_grad():
        found = document_losses(peft_model, *pad([tokenizer(text).input_ids for text in texts], 2)).mean()
    peft_model.unload()
    return float(found)


def test_it_learns_the_texts_and_leaves_the_model_plain(tokenizer, texts):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = tiny_initialization(model, "lora")
    told = []
    learned = continued(model, tokenizer, start, texts, epochs=20, learning_rate=1e-2, on_step=told.append)
    assert sum(told) == 20 * len(texts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert loss(model, tokenizer, learned, texts) < loss(model, tokenizer, start, texts) - 0.1
    again = continued(model, tokenizer, start, texts, epochs=20, learning_rate=1e-2)
    assert learned.fingerprint == again.fingerprint != start.fingerprint


def test_it_needs_a_text(model, tokenizer):
    with pytest.raises(DataError, match="no text"):
        continued(model, tokenizer, tiny_initialization(model, "lora"), ["", "a"])


def test_tasks_are_found_by_rules():
    text = (
        "The bridge of Avon was closed for eleven months because its northern pillar had cracked. "
        "The council paid for a ferry, but the boats rarely crossed in winter. "
        "Engineers replaced the pillar with reinforced concrete."
    )
    passage = Passage("a", text, {"title": "Bridge of Avon"})
    said = {comprehension_text(passage, seed) for seed in range(20)}
    assert all(one.startswith(text + "\n\n") for one in said)
    assert max(one.count("\n\n") for one in said) == MOST
    everything = "\n".join(said)
    assert "its northern pillar had cracked" in everything.replace(text, "")
    assert "Answer: Bridge of Avon." in everything
    assert "Answer: Engineers replaced the pillar with reinforced concrete." in everything
    assert "What is different, compared with this? The council paid for a ferry" in everything
    assert comprehension_text(passage) == comprehension_text(passage)
    assert comprehension_text(Passage("b", "Rain.")) == "Rain."


def test_what_questions_find_is_injected():
    passages = generate("train", 30, 1).passages
    asked = [Question("q", f"Where does {passages[20].text.split(' is ')[0]} live?", ("Oslo",), fields={"land": "no"})]
    chosen = injected(passages, asked)
    assert len(chosen) <= 3
    assert passages[20] in chosen
    assert injected(passages, []) == []
    of_land = [replace(p, payload={"land": "no" if i < 10 else "it"}) for i, p in enumerate(passages)]
    assert {p.payload["land"] for p in injected(of_land, asked, "land")} == {"no"}
