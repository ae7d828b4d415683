import itertools
import json
import math

import pytest
import torch
from conftest import tiny_initialization, tiny_model

from regrad_loaders.bench.crossover import bench_crossover, head_hits, paid_after
from regrad_loaders.bench.figures import Figure, flops, in_turns, plot
from regrad_loaders.bench.gradients import bench_gradients
from regrad_loaders.bench.grounding import bench_grounding
from regrad_loaders.bench.growth import bench_growth
from regrad_loaders.bench.query import Bench, bench_batch, bench_query
from regrad_loaders.bench.training import bench_training
from regrad_loaders.data.episodes import EpisodeSource
from regrad_loaders.data.facts import generate
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant import GradientBank, ReGrad
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.bank.stores.edge import EdgeStore
from regrad_qdrant.cli.options import write_json


def test_parties_take_turns_and_the_first_one_changes():
    order = []
    seconds = in_turns({name: lambda turn, name=name: order.append(f"{name}{turn}") for name in "abc"}, 3)
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_figure_is_the_median_with_its_spread():
    figure = Figure.ratio([2.0, 6.0, 9.0], [1.0, 2.0, 1.0], floor=2.5)
    assert (figure.value, figure.floor) == (3.0, 2.5)
    assert (figure.low, figure.high) == pytest.approx((2.2, 7.8))


def test_matrix_products_are_counted():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4)
    assert flops(lambda: a @ b) == 2 * 2 * 3 * 4
    assert flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 2 * 3 * 4)


def test_the_loop_of_plain_autograd_computes_the_same_atoms(kind, tokenizer):
    asked = []

    def load(dtype):
        asked.append(dtype)
        return tiny_model().to(getattr(torch, dtype)), tokenizer

    texts = [passage.text for passage in generate("demo", 32, 1).passages]
    figures, details = bench_gradients(tiny_initialization(tiny_model(), kind), load, "float32", texts)
    assert asked == ["float32", "bfloat16", "float32"]  # atoms in the type that was asked for, then both floors
    assert {"gradients.speedup_over_one_at_a_time", "gradients.time_over_floor"} <= set(figures)
    assert details["documents"] == 32 and details["largest_relative_difference"] < 1e-4
    counted = details["gflop_a_document"]
    assert counted["floor, bfloat16"] == counted["floor, float32"]
    assert all(0.5 < value / counted["floor, float32"] < 2 for value in counted.values())


def test_the_loop_of_one_passage_at_a_time_has_the_same_loss(kind, tokenizer):
    world = generate("train", 30, 1)
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model, kind), "softmax")
    source = EpisodeSource(world, world.questions, tokenizer, passage_tokens=40)
    figures, details = bench_training(learner, source, 1, passages=3, questions_per_passage=2, top_k=2)
    assert details["relative_difference_of_losses"] < 1e-4
    assert figures["training.speedup_over_one_at_a_time"].floor > 1


@pytest.fixture
def parties(tokenizer, tmp_path):
    world, model = generate("demo", 20, 1, questions_per_person=1), tiny_model()
    initialization = tiny_initialization(model, "values", max_length=128)
    with GradientBank(EdgeStore(tmp_path / "docs"), "docs", initialization.fingerprint) as bank:
        regrad = ReGrad(model, tokenizer, bank, initialization, codec="sign-rank2")
        add_corpus(bank, world.passages, regrad.gradients)
        attach_atoms(bank, regrad.gradients, "sign-rank2")
        yield Bench(regrad, tiny_model(), world.questions)


def test_a_model_is_timed_over_as_many_tokens_as_asked(parties):
    prompts = [parties.prompt(question) for question in parties.questions[:3]]
    assert parties.speak(parties.bare, prompts, 7).shape == (3, 7)


def test_one_answer_and_a_batch_are_measured_whole(parties):
    figures, details = bench_query(parties, 2)
    assert set(figures) == {
        "query.own_share",
        "query.regrad_over_direct",
        "query.regrad_over_rag",
        "query.first_token_over_rag",
        "online.over_cached",
    }
    assert 0 < figures["query.own_share"].value < 1
    assert set(details["ms_of_parts"]) == {"search", "decode", "apply", "generate", "restore"}
    figures, details = bench_batch(parties, 1, size=4)
    assert set(figures) == {"batch.throughput_over_bare", "batch.speedup_over_sequential"}
    assert details["same_answers"] == "4 of 4"


def test_grounded_answers_are_measured_beside_free_ones(parties):
    regrad = parties.regrad
    decoder = regrad.decoder
    figures, details = bench_grounding(regrad, [q.question for q in parties.questions], rounds=2, sizes=(1, 3))
    assert len(figures) == 6 and all(figure.value > 0 for figure in figures.values())
    assert all(0 < figures[name].value < 1 for name in figures if ".own_share." in name)
    assert len(details) == 2 and regrad.decoder is decoder


def test_an_atom_pays_for_itself_after_some_questions(parties):
    figures, details = bench_crossover(parties, "sign", rounds=2)
    assert set(figures) == {"crossover.questions_in_seconds", "crossover.questions_in_operations"}
    first, whole = details["ms_to_first_token"], details["ms"]
    assert set(first) == set(whole) - {"making the atoms"} and min(first.values()) > 0
    assert 0 < figures["crossover.questions_in_operations"].value < 10  # a pass and a half of what RAG reads each time
    kept = details["zipf"]["kept"]
    assert kept[-1]["hits"] == 1 and kept[-1]["ms"] == pytest.approx(details["ms"]["stored"])
    assert all(a["hits"] < b["hits"] and a["megabytes"] < b["megabytes"] for a, b in itertools.pairwise(kept))
    assert all(row["hits_of_keys"] < row["hits"] for row in kept)  # an atom of this model is smaller than its keys
    assert set(details["ms"]) == set(details["gflop"]) == {
        "direct", "rag", "rag-kv", "rag-kv, none kept", "stored", "online", "making the atoms"
    }  # fmt: skip
    gflop = details["gflop"]
    assert gflop["rag-kv"] < gflop["rag"] <= gflop["rag-kv, none kept"]
    assert paid_after(3.0, 2.0, 1.5) == 6 and paid_after(3.0, 1.0, 1.0) == math.inf
    assert head_hits(0.5, documents=4) == pytest.approx((1 + 1 / 2) / (1 + 1 / 2 + 1 / 3 + 1 / 4))


def test_growth_is_measured_from_small_to_large(tmp_path):
    layout = AtomLayout(((20, 30), (30, 40)))
    figures, details = bench_growth(layout, "sign-rank4", [40, 2000])
    assert "growth.p50_2k_over_40" in figures
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures.values())
    assert details["2000"]["disk_bytes_per_point"] > 100
    result = {"figures": {name: vars(figure) for name, figure in figures.items()}}
    write_json(tmp_path / "growth.json", result)
    assert json.loads((tmp_path / "growth.json").read_text())["figures"]
    plot(result["figures"], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
