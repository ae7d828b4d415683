"""Texts longer than one gradient sees: an atom a window, and the window that the question is about."""

import pytest
import torch
from conftest import tiny_initialization

from regrad_loaders.data.facts import generate
from regrad_qdrant import Document, GradientBank, MergeRule, Query, ReGrad
from regrad_qdrant.atoms.record import Record
from regrad_qdrant.bank.documents import Hit, point_id
from regrad_qdrant.bank.ingest import attach_atoms
from regrad_qdrant.errors import RecordError

PASSAGES = generate("demo", 8, 1).passages
LONG = " ".join(passage.text for passage in PASSAGES[:5])


@pytest.fixture
def regrad(model, tokenizer, tmp_path):
    initialization = tiny_initialization(model)
    with GradientBank.open(tmp_path, "docs", initialization.fingerprint) as bank:
        bank.create()
        bank.add(
            [
                Document("long", {"id": "long", "text": LONG}),
                Document("short", {"id": "short", "text": "a duck quacks"}),
            ]
        )
        with ReGrad(model, tokenizer, bank, initialization) as regrad:
            yield regrad


def test_the_window_that_the_question_is_about_is_applied(regrad, monkeypatch):
    attach_atoms(regrad.bank, regrad.gradients, "fp32")
    [hit] = regrad.bank.fetch([point_id("long")])
    windows = regrad.gradients.windows(LONG)
    for i, (start, end) in enumerate(hit.record.spans):
        question = LONG[start:end][20:90]  # its own words
        shares = regrad.weighing.window_weights(question, [LONG[s:e] for s, e in hit.record.spans])
        assert shares[i] == max(shares) == 1.0
    summed = []
    monkeypatch.setattr(
        regrad.adapter, "decode", lambda records, weights=None: summed.append((records, weights)) or zeros(regrad)
    )
    start, end = hit.record.spans[2]
    answer = regrad.answer(LONG[start:end][20:90], hits=[hit])
    records, weights = summed[0]
    assert answer.windows[hit.id][start, end] == max(weights)
    assert len(answer.windows[hit.id]) == len(records)
    best = records[weights.index(max(weights))]
    [atom] = regrad.gradients.atoms([windows[2]])
    torch.testing.assert_close(best.decode(regrad.bank.space, regrad.adapter.space.layout), atom, rtol=1e-3, atol=1e-5)


def zeros(regrad):
    return torch.zeros(regrad.adapter.space.numel)


def test_the_plain_sum_takes_one_window_and_words_that_no_window_has_take_all(regrad):
    windows = ["Ida bakes bread.", "Noor dives deep.", "Orla plays the harp."]
    regrad.weighing.merge = MergeRule("sum")
    assert regrad.weighing.window_weights("Who dives?", windows) == [0, 1, 0]
    assert regrad.weighing.window_weights("Zzz?", windows) == [1 / 3] * 3


def test_of_very_many_windows_that_no_word_tells_apart_all_count(regrad):
    count = 1200
    record = Record(regrad.bank.space, "t", "fp32", "x", ("y",) * (count - 1), ((0, 1),) * count)
    hit = Hit(1, 1.0, "a", {}, record)
    assert len(regrad.weighing._windows(hit, "Zzz?")) == count


def test_computed_at_query_time_they_are_the_same(regrad):
    question = PASSAGES[3].text[:60]
    online = regrad.answer(question, mode="online", top_k=1)
    attach_atoms(regrad.bank, regrad.gradients, regrad.filling.policy.codec)
    stored = regrad.answer(question, top_k=1)
    assert online.text == stored.text and online.weights == stored.weights
    assert regrad.answer_many([Query(question)], top_k=1)[0].text == stored.text


@pytest.mark.parametrize(
    "broken",
    [
        {"atoms": ["x"], "spans": [[0, 1]]},
        {"atoms": ["x", "y"], "spans": [[0, 1]]},
        {"atoms": ["x", 3], "spans": [[0, 1], [1, 2]]},
        {"atoms": ["x", "y"], "spans": [[0, 1], [2, 1]]},
        {"atoms": ["x", "y"], "spans": [[0, 1], ["a", 2]]},
        {"atoms": "xy", "spans": "ab"},
    ],
)
def test_windows_that_do_not_fit_each_other_are_no_record(broken):
    with pytest.raises(RecordError):
        Record.from_payload({"v": 2, "space": "s", "sha": "t", "codec": "sign", **broken})


def test_a_record_of_windows_comes_back_as_it_was_and_one_of_one_window_as_ever():
    several = Record("s", "t", "sign", "x", ("y", "z"), ((0, 3), (3, 5), (5, 9)))
    assert Record.from_payload(several.to_payload()) == several and several.to_payload()["v"] == 2
    one = Record("s", "t", "sign", "x")
    assert one.to_payload() == {"v": 1, "space": "s", "sha": "t", "codec": "sign", "atom": "x"}
    assert one.windows() == [one] and [window.atom for window in several.windows()] == ["x", "y", "z"]
