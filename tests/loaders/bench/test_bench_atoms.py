import json
from dataclasses import replace

import pytest
from conftest import tiny_model

from regrad_loaders.bench.atoms import AtomBench, Cell, behind, extrapolation, losses, smallest
from regrad_loaders.data.folders import Question
from regrad_loaders.data.scores import Interval
from regrad_qdrant import Adapter
from regrad_qdrant.answer.generation import Asking, choose
from regrad_qdrant.answer.generation import generate as answer
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.model.prompts import Prompt, PromptFormat


def test_answers_are_those_of_one_question_at_a_time_with_its_atoms_applied(measured, task, tokenizer):
    rows = {key: i for i, key in enumerate(task.texts)}
    exact, _ = measured.atoms(list(task.texts.values()))
    sums = measured.sums(task, exact, rows, top_k=2)
    found = measured.answers(task.questions, -measured.adapter.step_sizes * sums)
    initialization = measured.initialization
    adapter = Adapter(tiny_model(), initialization)
    for question, hits, text in zip(task.questions, task.hits, found, strict=True):
        keys = list(hits)[:2]
        records = make_records(exact[[rows[key] for key in keys]], keys, initialization.fingerprint, "fp32")
        with adapter.applied(records, initialization.merge.weights([hits[key] for key in keys])):
            [expected] = answer(adapter.model, tokenizer, [Prompt(question.question)])
        assert text == expected.text


def test_questions_are_put_as_the_initialization_was_trained_and_options_are_weighed(measured, task, tokenizer):
    own = replace(measured.initialization, prompt=PromptFormat(user="{question} Say yes or no.{choices}"))
    bench = AtomBench("own", own, tiny_model(), tokenizer)
    asked = [Question(f"q{i}", one.question, ("yes",)) for i, one in enumerate(task.questions)]
    mixed = [asked[0], task.questions[0], *asked[1:]]
    exact, _ = bench.atoms([task.texts[next(iter(task.hits[0]))]])
    update = -bench.adapter.step_sizes * exact
    said = bench.answers(mixed, update.expand(len(mixed), -1))
    adapter, asking = Adapter(tiny_model(), own), Asking(own.prompt)
    with adapter.applied_sum(exact[0]):
        prompts = [Prompt(question.question, question.kind) for question in asked]
        expected = choose(adapter.model, tokenizer, prompts, asking)
        [written] = answer(adapter.model, tokenizer, [Prompt(task.questions[0].question)], asking)
    assert said == [expected[0].text, written.text, *(one.text for one in expected[1:])]
    assert bench.scores(asked, update.expand(len(asked), -1)) == [float(one.text == "yes") for one in expected]


def test_every_codec_meets_every_k_and_is_paired_with_exact_atoms(measured, task):
    cells, times = measured.curve(task, ["sign", "int8"], [1, 3])
    assert [(cell.codec, cell.top_k) for cell in cells] == [(c, k) for c in ("fp32", "sign", "int8") for k in (1, 3)]
    by_codec = {cell.codec: cell for cell in cells if cell.top_k == 3}
    assert by_codec["fp32"].loss_to_fp32.mean == 0 and by_codec["fp32"].cosine == pytest.approx(1)
    assert 0.6 < by_codec["sign"].cosine < by_codec["int8"].cosine
    assert by_codec["sign"].bytes_per_atom < by_codec["int8"].bytes_per_atom < by_codec["fp32"].bytes_per_atom
    assert all(time.gradient > 0 and time.encode > 0 and time.decode_sum > 0 and time.generate > 0 for time in times)


def test_the_extrapolation_follows_from_the_shapes():
    rows = {(row["model"], row["space"], row["codec"]): row for row in extrapolation()}
    core = rows["Llama-3.2-1B, layers 8–15", "core 16 × 16", "sign"]
    assert core["numbers"] == 24 * 256 and 768 * 4 / 3 < core["bytes_per_atom"] < 4096
    assert core["gb_per_million"] == core["bytes_per_atom"] / 1000
    values = rows["Llama-3.2-1B, layers 8–15", "values", "sign-rank2"]
    assert values["numbers"] == 8 * 16 * (2048 + 2 * 8192)
    assert 2 * (128 + 2048 + 256 + 8192) / 8 * 4 / 3 < values["bytes_per_atom"] < 4096


def cell(task, codec, size, loss, half):
    whole = Interval(loss, loss - half, loss + half)
    return Cell("init", "core", 10, task, codec, 3, size, Interval(0.5, 0.4, 0.6), whole, 1.0)


def test_the_smallest_codec_is_chosen_by_the_upper_end_of_its_pooled_interval():
    cells = [
        cell("a", "fp32", 400, 0.0, 0.0), cell("b", "fp32", 400, 0.0, 0.0),
        cell("a", "int2", 50, 0.004, 0.004), cell("b", "int2", 50, 0.0, 0.003),
        cell("a", "sign", 20, 0.0, 0.03), cell("b", "sign", 20, 0.01, 0.04),
    ]  # fmt: skip
    rows = losses(cells)
    of_sign = {row["codec"]: row["loss_to_fp32"] for row in rows}["sign"]
    assert of_sign["mean"] == pytest.approx(0.005) and of_sign["high"] == pytest.approx(0.005 + 0.025)
    assert smallest(rows) == {"init": "int2"} and smallest(rows, allowed=0.05) == {"init": "sign"}


def test_initializations_are_compared_over_the_same_questions():
    same = Interval(0.5, 0.4, 0.6)
    wide = Cell("wide", "lora", 90, "a", "fp32", 3, 400, same, same, 1.0, (1.0, 0.5, 0.0, 1.0))
    small = Cell("small", "core", 10, "a", "sign", 3, 20, same, same, 1.0, (1.0, 0.3, 0.0, 0.8))
    [row] = behind([wide, replace(wide, codec="sign", scores=(0.0,) * 4), small])
    assert (row["init"], row["codec"], row["behind"]) == ("small", "sign", "wide")
    assert row["f1"]["mean"] == pytest.approx(0.1) and 0 <= row["f1"]["low"] < 0.1 < row["f1"]["high"] <= 0.2


def test_the_command_writes_the_curve_and_its_plot(tiny_bench, tmp_path):
    curve = ["--set", "facts", "--codecs", "sign", "-k", "1,2", "--limit", "3"]
    tiny_bench("atoms", *curve, "--json", "curve.json", "--plot", "curve.png")
    result = json.loads((tmp_path / "curve.json").read_text())
    assert list(result) == ["settings", "curve", "losses", "times", "smallest", "behind_the_first", "extrapolation"]
    assert len(result["curve"]) == 4 and set(result["smallest"]) == {"init"}
    assert [row["codec"] for row in result["losses"]] == ["fp32", "sign"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
