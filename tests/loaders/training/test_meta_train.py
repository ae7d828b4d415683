import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import tiny_initialization, tiny_model
from tokenizers.processors import TemplateProcessing

from regrad_loaders.data.episodes import EpisodeSource, bm25_hits
from regrad_loaders.data.facts import generate
from regrad_loaders.training import narrow as narrowing
from regrad_loaders.training.average import mean_of
from regrad_loaders.training.calibration import calibrate
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.narrow import narrow, values_of
from regrad_loaders.training.recipe import Recipe, Source
from regrad_loaders.training.trainer import Trainer, run
from regrad_qdrant import Adapter, MetaInitialization
from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.record import make_records
from regrad_qdrant.errors import DataError, InitializationError, RegradError
from regrad_qdrant.model.identity import BaseModel

RECIPE = Recipe(
    name="tiny",
    base_model="tiny",
    space="core",
    rank=4,
    basis_rank=4,
    lora_alpha=8,
    targets=("gate_proj", "up_proj", "down_proj"),
    layers=(1, 2),
    step_size=1.0,
    data=(Source(weight=1.0, facts={"people": 12, "seed": 1}),),
    passage_tokens=48,
    passages=3,
    top_k=(1, 2),
    steps=6,
    warmup=2,
    learning_rate=5e-3,
    checkpoint_every=2,
    evaluate_every=100,
)


@pytest.fixture
def source(tokenizer):
    world = generate("train", 12, 1)
    return EpisodeSource(world, world.questions, tokenizer, passage_tokens=48)


def trainer(tokenizer, out, recipe=RECIPE):
    model = tiny_model()
    return Trainer(recipe, model, tokenizer, BaseModel.of(model, "tiny"), out)


def test_episodes_hold_what_retrieval_returned_and_the_gold_passage(source):
    episode = source.episode(random.Random(0), passages=4, questions_per_passage=2, top_k=[2])
    assert 3 <= len(episode.passages) <= 5 and len(episode.examples) >= 4
    assert all(len(ids) <= 48 for ids in episode.passages)
    assert {row for example in episode.examples for row in example.rows} == set(range(len(episode.passages)))
    for example in episode.examples:
        assert len(example.rows) == len(example.scores) <= 2 and example.answer_ids
    assert source.episode(random.Random(0), 4, 2, [2]) == episode


def test_data_that_can_not_be_trained_on_is_refused_and_little_data_ends(tokenizer):
    world = generate("train", 3, 1)
    source = EpisodeSource(world, world.questions, tokenizer, passage_tokens=48)
    assert len(source.episode(random.Random(0), 50, 2, [2]).passages) == 3
    with pytest.raises(DataError, match="gold_ids"):
        EpisodeSource(world, [replace(world.questions[0], gold_ids=())], tokenizer, 48)
    with pytest.raises(DataError, match="'nowhere', not in the corpus"):
        EpisodeSource(world, [replace(world.questions[0], gold_ids=("nowhere",))], tokenizer, 48)


def test_an_episode_without_questions_is_drawn_again(tokenizer):
    world = generate("train", 6, 1, questions_per_person=1)
    keys = [passage.id for passage in world.passages]
    answerable, *others = world.questions
    many = [replace(question, gold_ids=tuple(keys)) for question in others]  # more than an episode has room for
    source = EpisodeSource(world, [answerable, *many], tokenizer, passage_tokens=60)
    for seed in range(10):
        episode = source.episode(random.Random(seed), 2, 1, [1])
        assert [example.question_id for example in episode.examples] == [f"{world.name}/{answerable.id}"]
    with pytest.raises(DataError, match="no question has all its gold passages; allow more `passages`"):
        EpisodeSource(world, many, tokenizer, 60).episode(random.Random(0), 2, 1, [1])


def test_questions_that_share_their_first_golds_do_not_fill_an_episode_for_ever(tokenizer):
    world = generate("train", 5, 1, questions_per_person=1)
    a, b, *others = [passage.id for passage in world.passages]
    shared = [
        replace(question, gold_ids=(a, b, other)) for question, other in zip(world.questions, others, strict=False)
    ]
    source = EpisodeSource(world, shared, tokenizer, passage_tokens=60)
    assert source.episode(random.Random(0), 4, 1, [1]).examples


def test_a_window_of_a_long_passage_holds_the_answer(tokenizer):
    world = generate("train", 12, 1)
    source = EpisodeSource(world, world.questions, tokenizer, passage_tokens=30)
    for seed in range(5):
        episode = source.episode(random.Random(seed), 4, 2, [2])
        for example in episode.examples:
            answer = tokenizer.decode(example.answer_ids[:-1])
            assert any(answer in tokenizer.decode(episode.passages[row]) for row in example.rows)


def test_a_window_begins_as_a_text_does(tokenizer):
    begun = copy.deepcopy(tokenizer)
    begun.add_special_tokens({"bos_token": "<|endoftext|>"})
    begin = begun.bos_token_id
    begun._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    world = generate("train", 12, 1)
    source = EpisodeSource(world, world.questions, begun, passage_tokens=30)
    windows = [ids for seed in range(5) for ids in source.episode(random.Random(seed), 4, 2, [2]).passages]
    assert all(ids[0] == begin and begin not in ids[1:] and len(ids) == 30 for ids in windows)
    whole = {tuple(source._tokens(key)[0][:30]) for key in source.texts}
    assert not {tuple(ids) for ids in windows} <= whole  # some begin later in their texts


def test_hits_are_those_of_a_bank():
    hits = bm25_hits({"a": "Ida the baker", "b": "Noor the diver"}, ["who is the diver Noor?"])
    assert list(hits[0]) == ["b"] and hits[0]["b"] > 0


def test_the_learner_answers_as_the_adapter_does(source, tokenizer):
    """The update in meta-training (rows, in the graph) and at query time (in place, through a codec) are one."""
    model = tiny_model()
    initialization = tiny_initialization(model)
    learner = MetaLearner(model, initialization, "sum")
    episode = source.episode(random.Random(0), 3, 2, [2])
    atoms, _ = learner.atoms(episode.passages, create_graph=False)
    [example] = [e for e in episode.examples if len(e.rows) == 2][:1]
    with torch.no_grad():
        expected, _ = learner.answer_losses([example], learner.updates([example], atoms))
    adapter = Adapter(tiny_model(), initialization)
    flat = adapter.space.flatten(atoms)[example.rows]
    ids = torch.tensor([example.prompt_ids + example.answer_ids])
    labels = ids.clone()
    labels[:, : len(example.prompt_ids)] = -100
    with adapter.applied(make_records(flat, ["t"] * 2, initialization.fingerprint, "fp32")), torch.no_grad():
        found = adapter.model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


def test_questions_in_batches_of_like_length_lose_what_they_lose_together(tokenizer, monkeypatch):
    world = generate("train", 12, 1)
    source = EpisodeSource(world, world.questions, tokenizer, passage_tokens=48, passages_in_prompt=0.5)
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model), "sum").double()
    learner.model[0].double()
    episode = source.episode(random.Random(2), 3, 2, [1, 3])
    assert len({len(example.prompt_ids) for example in episode.examples}) > 2

    def found(tokens):
        monkeypatch.setattr("regrad_loaders.training.meta_learner.BATCH_TOKENS", tokens)
        learner.zero_grad()
        losses, right = learner.objective(episode)
        losses.mean().backward()
        return losses.detach(), right, [parameter.grad.clone() for parameter in learner.lora_b]

    torch.testing.assert_close(found(150), found(10**6))


def test_the_second_order_gradient_is_that_of_finite_differences(source):
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model), "softmax").double()
    learner.model[0].double()
    episode = source.episode(random.Random(1), 3, 2, [2])

    def loss():
        losses, _ = learner.objective(episode)
        return losses.mean()

    loss().backward()
    for parameter in (
        learner.lora_a[0],
        learner.lora_b[3],
        learner.basis[2],
        learner.step_size,
        learner.log_temperature,
    ):
        flat, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)
        index = int(gradient.abs().argmax())
        before, step = float(flat[index]), 1e-3
        values = []
        for sign in (1, -1):
            flat[index] = before + sign * step
            values.append(float(loss().detach()))
        flat[index] = before
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[index]), rel=0.05, abs=1e-5)


def test_atoms_are_read_through_the_codec_and_gradients_pass_straight_through(source):
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model), "sum")
    episode = source.episode(random.Random(0), 3, 2, [2])
    exact, _ = learner.atoms(episode.passages, create_graph=True)
    coded = learner.space.flatten(learner.coded(exact, "sign"))
    flat = learner.space.flatten(exact)
    codec = get_codec("sign")
    expected = codec.dequantize(codec.quantize(flat.detach(), learner.space.layout), learner.space.layout)
    torch.testing.assert_close(coded, expected)
    probe = torch.randn_like(flat)
    found, straight = (
        torch.autograd.grad((x * probe).sum(), learner.lora_b[0], retain_graph=True) for x in (coded, flat)
    )
    torch.testing.assert_close(found, straight)
    assert torch.equal(learner.space.flatten(learner.coded(exact, "fp32")), flat)


def test_the_first_order_option_sees_the_same_atoms_and_learns_from_their_projections(source, kind):
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model, kind), "softmax")
    episode = source.episode(random.Random(0), 3, 2, [2])
    exact, _ = learner.atoms(episode.passages, create_graph=False)
    projected = learner.projected_atoms(episode.passages)
    for name in exact:
        torch.testing.assert_close(projected[name], exact[name], rtol=1e-4, atol=1e-6)
    losses, _ = learner.objective(episode, order=1)
    losses.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learner.parameters())


def test_a_few_steps_lower_the_loss(tokenizer, tmp_path, monkeypatch):
    run_of = trainer(tokenizer, tmp_path, replace(RECIPE, steps=25, learning_rate=2e-2))
    episode = run_of._draw(random.Random(0))
    monkeypatch.setattr(run_of, "_draw", lambda _rng: episode)
    losses = [run_of.train_step().loss for _ in range(25)]
    assert losses[-1] < losses[0] - 0.3


def test_resumes_exactly(tokenizer, tmp_path):
    """In float64: in float32 two runs differ in their last bits anyway, by how their tensors lie in memory."""

    def double(run_of):
        run_of.learner.double()
        run_of.learner.model[0].double()
        return run_of

    whole = double(trainer(tokenizer, tmp_path / "whole"))
    expected = [whole.train_step().loss for _ in range(6)]
    first = double(trainer(tokenizer, tmp_path / "parts"))
    found = [first.train_step().loss for _ in range(3)]
    first.save()
    second = double(trainer(tokenizer, tmp_path / "parts"))
    assert second.resume()
    for name, tensor in first.learner.state_dict().items():
        assert torch.equal(second.learner.state_dict()[name], tensor)
    found += [second.train_step().loss for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert second.seen == whole.seen and whole.seen


def test_a_step_of_several_episodes_averages_their_gradients(tokenizer, tmp_path):
    both = trainer(tokenizer, tmp_path / "both", replace(RECIPE, accumulate=2, clip=1e9))
    both.train_step()
    parts = []
    for part in range(2):
        one = trainer(tokenizer, tmp_path / "one")
        rng = random.Random(f"{RECIPE.seed}-0-0-{part}")
        episode, codec = one._draw(rng), rng.choice(RECIPE.codecs)
        one.learner.objective(episode, codec)[0].mean().backward()
        parts.append([parameter.grad for parameter in one.learner.parameters()])
    for parameter, first, second in zip(both.learner.parameters(), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, (first + second) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("mode", "count"), [("tensor", 6), ("one", 1), ("full", 96), ("fixed", 6)])
def test_step_sizes_may_be_one_for_each_tensor_or_for_all_or_fixed(tokenizer, tmp_path, mode, count):
    run_of = trainer(tokenizer, tmp_path, replace(RECIPE, step_size_mode=mode))
    before = run_of.learner.step_size.detach().clone()
    run_of.train_step()
    assert run_of.learner.step_size.numel() == count
    assert torch.equal(before, run_of.learner.step_size.detach()) == (mode == "fixed")
    made = run_of.made()
    assert len(made.step_sizes) == 6 and made.has_full_step_sizes == (mode == "full")
    made.save(tmp_path / "made")
    torch.testing.assert_close(MetaInitialization.load(tmp_path / "made").flat_step_sizes(), made.flat_step_sizes())
    if mode == "full":
        MetaLearner(tiny_model(), made, "sum", "full")
        with pytest.raises(InitializationError, match="mode full"):
            MetaLearner(tiny_model(), made, "sum", "tensor")


def test_a_run_keeps_the_best_on_dev_questions_and_stops_when_it_gets_no_better(tokenizer, tmp_path, monkeypatch):
    found = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    best = []

    def evaluate(self):
        loss = next(found)
        if loss == 1.0:
            best.append(self.made().fingerprint)
        return {source.name: {"loss": loss, "exact": 0.0, "random_exact": 0.0} for source in self.dev_sources}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    recipe = replace(RECIPE, steps=9, evaluate_every=1, dev_questions=8, patience=2)
    model = tiny_model()
    made = run(recipe, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [1, 2, 3, 4]
    assert list(lines[-2]["sources"]) == ["facts-demo"] and lines[-1] == {"kind": "end", "step": 4}
    assert made.fingerprint == best[0] == MetaInitialization.load(tmp_path / "initialization").fingerprint
    assert made.card["steps"] == 2
    endless = iter([math.nan] * 2)
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: {"x": {"loss": next(endless), "exact": 0.0, "random_exact": 0.0}}
    )
    model = tiny_model()
    with pytest.raises(DataError, match="no evaluation of .*metrics.jsonl is finite"):
        run(replace(recipe, patience=1), model, tokenizer, BaseModel.of(model, "tiny"), tmp_path / "nan")


def test_dev_questions_are_never_training_questions(tokenizer, tmp_path):
    world = generate("train", 12, 1)
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": passage.id, "text": passage.text}) + "\n" for passage in world.passages)
    )

    def written(*splits):
        rows = [
            {"id": q.id, "question": q.question, "answers": q.answers, "gold_ids": q.gold_ids, "split": split}
            for q, split in zip(world.questions, itertools.cycle(splits), strict=False)
        ]
        (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return replace(RECIPE, data=(Source(1.0, folder="set"),), data_dir=str(tmp_path), dev_questions=5)

    [source] = trainer(tokenizer, tmp_path / "run", written("train", "validation")).dev_sources
    assert len(source.entries) == 5 and all(entry.question.split == "validation" for entry in source.entries)
    with pytest.raises(DataError, match="no set of the recipe has questions of a split dev or validation"):
        trainer(tokenizer, tmp_path / "run", written("train", "held-out"))


def test_an_evaluation_holds_no_more_passages_at_once_than_training(tokenizer, tmp_path):
    whole, parts = (trainer(tokenizer, tmp_path, replace(RECIPE, passage_batch=size)) for size in (3, 2))
    atoms, seen = parts.learner.atoms, []
    parts.learner.atoms = lambda passages, **options: seen.append(len(passages)) or atoms(passages, **options)
    expected, found = whole.evaluate(), parts.evaluate()
    assert max(seen) == 2
    for name, scores in expected.items():
        assert found[name] == pytest.approx(scores, rel=1e-4)


def test_what_a_runs_end_cut_off_is_dropped_from_its_log(tokenizer, tmp_path):
    first = trainer(tokenizer, tmp_path)
    first.train_step()
    first.save()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    model = tiny_model()
    run(replace(RECIPE, steps=6), model, tokenizer, BaseModel.of(model, "tiny"), tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_several_processes_learn_the_same_from_different_episodes(tokenizer, tmp_path):
    """Two processes on the CPU, by the launcher that `accelerate launch` calls for several GPUs."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = asdict(replace(RECIPE, base_model=str(tmp_path / "model"), steps=2))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "regrad_qdrant", "train", "--recipe", "recipe.yaml", "--out", "both"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    both = MetaInitialization.load(tmp_path / "both" / "initialization")
    alone = trainer(tokenizer, tmp_path / "alone", replace(RECIPE, steps=2))
    for _ in range(2):
        alone.train_step()
    assert both.card["steps"] == 2 and both.card["questions_seen"] > len(alone.seen)
    assert both.fingerprint != alone.made().fingerprint


def test_questions_may_be_trained_with_their_passages_in_the_prompt(tokenizer, tmp_path):
    icl = trainer(tokenizer, tmp_path, replace(RECIPE, passages_in_prompt=True))
    episode = icl._draw(random.Random(0))
    for example in episode.examples:
        text = tokenizer.decode(example.prompt_ids)
        assert text.count("Passage ") == len(example.rows)
        assert all(tokenizer.decode(episode.passages[row]) in text for row in example.rows)
    assert math.isfinite(icl.train_step().loss) and icl.made().passages_in_prompt


def test_a_share_of_the_questions_may_have_their_passages_in_the_prompt(tokenizer, tmp_path):
    half = trainer(tokenizer, tmp_path, replace(RECIPE, passages_in_prompt=0.5))
    rng = random.Random(0)
    prompts = [tokenizer.decode(e.prompt_ids) for _ in range(20) for e in half._draw(rng).examples]
    assert 0.3 < sum("Passage 1:" in prompt for prompt in prompts) / len(prompts) < 0.7
    assert half.made().passages_in_prompt and not trainer(tokenizer, tmp_path, RECIPE).made().passages_in_prompt
    with pytest.raises(DataError, match="a share of the questions"):
        replace(RECIPE, passages_in_prompt=2)


def test_a_source_may_ask_what_else_its_passages_say(tokenizer, tmp_path):
    recipes = [replace(RECIPE, data=(replace(RECIPE.data[0], cloze=count),)) for count in (0, 2)]
    asked, further = ([e.question for e in trainer(tokenizer, tmp_path, r).sources[0].entries] for r in recipes)
    assert further[: len(asked)] == asked and {question.type for question in further[len(asked) :]} == {"cloze"}
    assert all(question.type != "cloze" for question in asked)


def test_without_atoms_it_is_plain_fine_tuning(tokenizer, tmp_path):
    """The baseline: the answers are learned by φ₀ alone, and the step sizes stay."""
    plain = trainer(tokenizer, tmp_path, replace(RECIPE, atoms=False, steps=20, learning_rate=2e-2))
    before = plain.learner.step_size.detach().clone()
    losses = [plain.train_step().loss for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5]) and torch.equal(plain.learner.step_size.detach(), before)
    evaluation = plain.evaluate(1)["facts-train"]
    assert evaluation["exact"] == evaluation["random_exact"]


def test_a_checkpoint_of_another_recipe_is_refused(tokenizer, tmp_path):
    trainer(tokenizer, tmp_path).save()
    with pytest.raises(DataError, match="learning_rate"):
        trainer(tokenizer, tmp_path, replace(RECIPE, learning_rate=1.0)).resume()


def test_a_run_begins_with_the_calibrated_step_size(tokenizer, tmp_path):
    model = tiny_model()
    run(replace(RECIPE, step_size=None, steps=1), model, tokenizer, BaseModel.of(model, "tiny"), tmp_path)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step_size"] == pytest.approx(min(first["table"], key=lambda row: row["own"])["step_size"])


def test_calibration_lowers_the_documents_loss(source):
    model = tiny_model()
    learner = MetaLearner(model, tiny_initialization(model), "sum")
    episode = source.episode(random.Random(0), 6, 2, [2])
    size, table = calibrate(learner, episode.passages)
    [row] = [row for row in table if row["step_size"] == size]
    assert row["own"] < 0 and row["other"] <= -0.5 * row["own"]
    assert calibrate(learner, [*episode.passages[:3], [7], *episode.passages[3:]])[0] == size  # one token has no loss
    with pytest.raises(InitializationError, match="two passages of two tokens"):
        calibrate(learner, [[7], episode.passages[0]])


def test_a_run_leaves_an_initialization_and_its_metrics(tokenizer, tmp_path):
    model = tiny_model()
    steps = []
    made = run(RECIPE, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path, on_step=steps.append)
    again = MetaInitialization.load(tmp_path / "initialization")
    assert again.fingerprint == made.fingerprint
    assert again.card["recipe"]["name"] == "tiny" and again.card["questions_seen"] > 0
    assert again.merge.rule == "margin" and sum(steps) == 6
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("step") == 6 and kinds[0] == "calibration" and kinds[-2:] == ["evaluation", "end"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_going_on_from_an_initialization_and_learning_step_sizes_alone_keeps_its_fingerprint(tokenizer, tmp_path):
    """φ₀ and U stay bit for bit, so that every stored atom stays valid; α and τ move."""
    start = tmp_path / "start"
    initialization = tiny_initialization(tiny_model(), basis_rank=4)
    initialization.save(start)
    recipe = replace(RECIPE, start=str(start), learn="step_sizes", codecs=("sign", "int2"), max_length=64)
    model = tiny_model()
    made = run(recipe, model, tokenizer, BaseModel.of(model, "tiny"), tmp_path / "run")
    assert made.fingerprint == MetaInitialization.load(start).fingerprint
    assert made.step_sizes != initialization.step_sizes and made.merge.temperature != initialization.merge.temperature
    with pytest.raises(InitializationError, match="whose atoms stay valid"):
        trainer(tokenizer, tmp_path, replace(recipe, basis_rank=2))


@pytest.mark.filterwarnings("ignore:Detected call of")  # the schedule goes on where no step was made
def test_a_run_whose_gradients_are_not_finite_says_so_and_is_given_up(tokenizer, tmp_path, monkeypatch):
    said, model = [], tiny_model()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(DataError, match=r"the last 10 steps was finite \(step 10\): lower learning_rate"):
        run(replace(RECIPE, steps=20), model, tokenizer, BaseModel.of(model, "t"), tmp_path, say=said.append)
    assert "step 1: the gradient is not finite, and nothing was learned from it" in said
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] for row in rows if row["kind"] == "step"] == [None] * 10


def test_several_sources_of_one_set_are_evaluated_each_for_itself(tokenizer, tmp_path):
    data = tuple(Source(weight=1.0, facts={"people": 12, "seed": seed}) for seed in (1, 2))
    found = trainer(tokenizer, tmp_path, replace(RECIPE, data=data)).evaluate()
    assert list(found) == ["facts-train", "facts-train 2"]
    assert found["facts-train"]["loss"] != found["facts-train 2"]["loss"]


def test_an_evaluation_puts_as_many_dev_questions_as_there_are(tokenizer, tmp_path):
    made = trainer(tokenizer, tmp_path, replace(RECIPE, dev_questions=20))
    [source] = made.dev_sources
    episodes = list(made._evaluated(source, 2))
    asked = [len(episode.examples) for episode in episodes]
    assert len(source.entries) == 20 and sum(asked[:-1]) < 20 <= sum(asked)


def test_weight_decay_leaves_step_sizes_and_temperature_alone(tokenizer, tmp_path):
    decays = [
        group["weight_decay"]
        for group in trainer(tokenizer, tmp_path, replace(RECIPE, weight_decay=0.1)).optimizer.param_groups
    ]
    assert decays == [0.1, 0.0, 0.0]


def test_targets_and_layers_that_the_model_lacks_are_named(tokenizer, tmp_path):
    for wrong in ({"targets": ("gate_proj", "up_prj")}, {"layers": (2, 29)}):
        with pytest.raises(InitializationError, match=r"not every layer of .* has .*up_proj.* layers 0 to"):
            trainer(tokenizer, tmp_path, replace(RECIPE, **wrong))


def test_one_step_size_for_all_keeps_their_sign():
    model = tiny_model()
    start = tiny_initialization(model)
    names = list(start.step_sizes)
    down = start.with_step_sizes(dict.fromkeys(names, -0.5), start.merge)
    sizes = MetaLearner(tiny_model(), down, "sum", "one").step_sizes()
    assert [float(size.detach()) for size in sizes.values()] == pytest.approx([-0.5] * len(names))
    mixed = start.with_step_sizes(dict.fromkeys(names, 0.5) | {names[0]: -0.5}, start.merge)
    with pytest.raises(InitializationError, match="different signs have no common one"):
        MetaLearner(tiny_model(), mixed, "sum", "one")


def test_going_on_from_the_mean_of_two(tokenizer, tmp_path):
    one, other = (tiny_initialization(tiny_model(), basis_rank=4) for _ in range(2))
    one = one.with_step_sizes(dict.fromkeys(one.step_sizes, 1.0))
    other = other.with_step_sizes(dict.fromkeys(other.step_sizes, 4.0))
    for module in other.modules.values():
        for tensor in (module.lora_a, module.lora_b, module.basis):
            tensor.mul_(3)
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    recipe = replace(RECIPE, start=str(tmp_path / "one"), averaged_with=str(tmp_path / "other"), max_length=64)
    learner = trainer(tokenizer, tmp_path / "run", recipe).learner
    for i, module in enumerate(one.modules.values()):
        for learned, tensor in zip(
            (learner.lora_a[i], learner.lora_b[i], learner.basis[i]),
            (module.lora_a, module.lora_b, module.basis),
            strict=True,
        ):
            torch.testing.assert_close(learned.detach(), 2 * tensor)
    torch.testing.assert_close(learner.step_size.detach().exp(), torch.full((len(one.step_sizes),), 2.0))
    for another in (tiny_initialization(tiny_model(), basis_rank=3), tiny_initialization(tiny_model(), "lora")):
        with pytest.raises(InitializationError, match="of one space"):
            mean_of(one, another)
    scaled = replace(one, modules={name: replace(module, scaling=7.0) for name, module in one.modules.items()})
    with pytest.raises(InitializationError, match="of one space"):
        mean_of(one, scaled)
    with pytest.raises(InitializationError, match="different signs"):
        mean_of(one, one.with_step_sizes(dict.fromkeys(one.step_sizes, -1.0)))
    with pytest.raises(InitializationError, match="a step size for every number"):
        mean_of(one, one.with_step_sizes({name: torch.ones(4, 4) for name in one.step_sizes}))


def test_an_initialization_of_another_shape_is_no_start(tokenizer, tmp_path):
    tiny_initialization(tiny_model(), basis_rank=3).save(tmp_path)
    with pytest.raises(InitializationError, match=r"\(3, 4\); narrowing to \(4, 4\) would widen it"):
        trainer(tokenizer, tmp_path, replace(RECIPE, start=str(tmp_path), max_length=64))
    with pytest.raises(InitializationError, match="kind, max_length differ"):
        trainer(tokenizer, tmp_path, replace(RECIPE, space="lora", start=str(tmp_path)))


def test_narrowing_keeps_the_principal_directions_of_the_atoms(source):
    model = tiny_model()
    wide = tiny_initialization(model, rank=8, basis_rank=8)
    learner = MetaLearner(model, wide, "sum")
    exact, _ = learner.atoms(source.episode(random.Random(0), 8, 1, [2]).passages, create_graph=False)
    flat = learner.space.flatten(exact)
    low_rank = {name: torch.randn(8, 2) @ torch.randn(2, 8) * torch.ones(12, 1, 1) for name in exact}
    low_rank = {name: core * torch.rand(12, 1, 1) for name, core in low_rank.items()}
    made = narrow(wide, wide.space.flatten(low_rank), rank=2, basis_rank=2, modules=wide.modules)
    for name, module in made.modules.items():
        left, right = module.basis, module.lora_a  # U L and Rᵀ A: the update U' C' A' must be U C A
        old, core = wide.modules[name], low_rank[f"{name}.core"][3]
        into, out = torch.linalg.lstsq(old.basis, left).solution, torch.linalg.lstsq(old.lora_a.T, right.T).solution
        torch.testing.assert_close(
            left @ (into.T @ core @ out) @ right, old.basis @ core @ old.lora_a, rtol=1e-3, atol=1e-4
        )
    fewer = [name for name in wide.modules if "layers.2" in name]
    assert list(narrow(wide, flat, rank=4, basis_rank=4, modules=fewer).modules) == fewer
    one_each = wide.with_step_sizes({name: torch.ones(8, 8) for name in wide.step_sizes})
    with pytest.raises(InitializationError, match="a step size for every number"):
        narrow(one_each, flat, rank=2, basis_rank=2, modules=[])
    with pytest.raises(InitializationError, match="only core and values"):
        narrow(tiny_initialization(tiny_model(), "lora"), flat, rank=2, basis_rank=2, modules=[])


def test_going_on_narrower_than_the_start(tokenizer, tmp_path):
    tiny_initialization(tiny_model(), rank=8, basis_rank=8, lora_alpha=16).save(tmp_path / "start")
    recipe = replace(RECIPE, start=str(tmp_path / "start"), layers=(2, 2), max_length=64)
    narrowed = trainer(tokenizer, tmp_path / "run", recipe)
    assert narrowed.learner.space.numel == 3 * 4 * 4
    assert math.isfinite(narrowed.train_step().loss)


def test_values_alone_move_b_as_the_whole_space_did():
    lora = tiny_initialization(tiny_model(), "lora")
    sizes = {name: 0.5 + 0.1 * i for i, name in enumerate(lora.step_sizes)}
    lora = lora.with_step_sizes(sizes)
    values = values_of(lora, lora.modules)
    assert len(set(values.step_sizes.values())) == 1
    torch.manual_seed(3)
    for name, old in lora.modules.items():
        new = values.modules[name]
        torch.testing.assert_close(new.lora_b @ new.lora_a, old.lora_b @ old.lora_a)
        x, delta = torch.randn(1, 5, old.d_in), torch.randn(1, 5, old.d_out)
        whole = lora.space.from_gradients(name, lora.space.keep(name, x), delta)[f"{name}.lora_B"][0]
        part = values.space.from_gradients(name, values.space.keep(name, x), delta)[f"{name}.values"][0]
        moved = values.step_sizes[f"{name}.values"] * part.mT @ new.lora_a
        torch.testing.assert_close(moved, sizes[f"{name}.lora_B"] * whole @ old.lora_a)
    with pytest.raises(InitializationError, match="only the space lora"):
        values_of(values, values.modules)
    with pytest.raises(InitializationError, match="not above 0"):
        values_of(lora.with_step_sizes({name: -size for name, size in sizes.items()}), lora.modules)


def test_values_narrow_to_cores():
    values = tiny_initialization(tiny_model(), "values")
    torch.manual_seed(4)
    flat = torch.randn(3, values.space.numel)  # of fewer documents and rows than B has, so that none of it is left out
    made = narrow(values, flat, rank=4, basis_rank=12, modules=values.modules)
    rows = {name: values.space.unflatten(flat)[f"{name}.values"][0] for name in values.modules}
    turned = {name: torch.linalg.lstsq(values.modules[name].lora_a.T, m.lora_a.T) for name, m in made.modules.items()}
    cores = {f"{name}.core": m.basis.T @ rows[name].T @ turned[name].solution for name, m in made.modules.items()}
    for name, update in made.space.to_update(cores).items():
        module = name.removesuffix(".lora_B")
        torch.testing.assert_close(
            update @ made.modules[module].lora_a, rows[module].T @ values.modules[module].lora_a, rtol=1e-3, atol=1e-3
        )
        assert made.step_sizes[f"{module}.core"] == values.step_sizes[f"{module}.values"]


def test_going_on_in_values_with_atoms_of_low_rank(tokenizer, tmp_path):
    tiny_initialization(tiny_model(), "lora", rank=4).save(tmp_path / "start")
    recipe = replace(
        RECIPE, space="values", start=str(tmp_path / "start"), layers=(1, 2), max_length=64, codecs=("sign-rank4",)
    )
    values = trainer(tokenizer, tmp_path / "run", recipe)
    before = values.learner.lora_a[0].detach().clone()
    assert math.isfinite(values.train_step().loss)
    assert not torch.equal(values.learner.lora_a[0], before)


def test_going_on_in_cores_from_plain_fine_tuning_keeps_its_reader(tokenizer, tmp_path):
    tuned = tiny_initialization(tiny_model(), "lora", rank=4)
    tuned.save(tmp_path / "start")
    recipe = replace(RECIPE, start=str(tmp_path / "start"), layers=(1, 2), max_length=64)
    cores = trainer(tokenizer, tmp_path / "run", recipe)
    assert cores.learner.space.kind == "core"
    for name, module in cores.learner.plug_in_modules().items():
        old = tuned.modules[name]
        torch.testing.assert_close((module.lora_b @ module.lora_a).detach(), old.lora_b @ old.lora_a)
    assert math.isfinite(cores.train_step().loss)


def test_recipes_are_checked(tmp_path):
    path = tmp_path / "recipe.yaml"
    settings = ["name: a", "base_model: b", "space: core", "rank: 4", "basis_rank: 4", "lora_alpha: 8"]
    good = "\n".join([*settings, "targets: [up_proj]", "layers: [0, 1]", ""])
    path.write_text(good + "data: [{facts: {people: 3, seed: 1}, weight: 1.0}]\n")
    assert Recipe.load(path).layers == (0, 1)
    path.write_text(good + "data: [{folder: x, weight: 1.0}]\nlearning_rate: 1e-3\n")
    assert Recipe.load(path).learning_rate == 1e-3  # which YAML reads as text
    for lines, message in (
        ("data: []\n", "names no data"),
        ("data: [{folder: x, split: dev, weight: 1.0}]\n", "never for training"),
        ("data: [{folder: x, facts: {people: 1, seed: 1}, weight: 1.0}]\n", "either"),
        ("data: [{folder: x, cloze: -1, weight: 1.0}]\n", "cloze counts"),
        ("data: [{folder: x, cloze: many, weight: 1.0}]\n", "cloze counts"),
        ("data: [{folder: x, weight: 1.0}]\nlr: 3\n", r"unknown settings \['lr'\]"),
        ("data: [{folder: x, weight: 1.0}]\nspace: cone\n", "space 'cone'"),
        ("data: [{folder: x, weight: 1.0}]\nlearn: step_sizes\n", "name the initialization"),
        ("data: [{folder: x, weight: 1.0}]\norder: 3\n", "neither 1 nor 2"),
        ("data: [{folder: x, weight: 1.0}]\ncodecs: [int3]\n", "codec 'int3'"),
        ("data: [{folder: x, weight: 1.0}]\nstep_size_mode: each\n", "tensor, one, full, fixed"),
        ("data: [{folder: x, weight: 1.0}]\npatience: 3\n", "needs dev_questions"),
        ("data: [{folder: x, weight: 1.0}]\naccumulate: 0\n", "accumulate must be at least 1"),
        ("data: [{folder: x, weight: 1.0}]\nshards: 0\n", "shards must be at least 1"),
        ("data: [{folder: x, weight: 1.0}]\nsteps: many\n", "steps must be a number"),
        ("data: [{folder: x, weight: 1.0}]\nwarmup: 0.5\n", "warmup must be a whole number"),
        ("data: [{folder: x, weight: 1.0}]\nevaluate_every: 0\n", "evaluate_every must be at least 1"),
        ("data: [{folder: x, weight: 1.0}]\nstep_size: 0\n", "moves nothing"),
        ("data: [{folder: x, weight: 1.0}]\ntemperature: 0\n", "above 0"),
        ("data: [{folder: x, weight: 1.0}]\ntop_k: []\n", "each at least 1"),
        ("data: [{folder: x, weight: 1.0}]\nquestions_per_passage: 0\n", "must be at least 1"),
        ("data: [{folder: x, weight: much}]\n", "weight must be a number"),
        ("data: [{facts: {poeple: 3, seed: 1}, weight: 1.0}]\n", "facts are {people"),
        ("data: [{hub: x, split: 'validation[:10%]', weight: 1.0}]\n", "never for training"),
        ("data: [{hub: x, split: 'train[:10%]+test', weight: 1.0}]\n", "never for training"),
        ("data: [{hub: x, split: validation_matched, weight: 1.0}]\n", "never for training"),
        ("data: [{folder: x, cloze: 2, style: sentence, weight: 1.0}]\n", "answered with a word"),
        ("data: [{hub: x, split: all, weight: 1.0}]\n", "never for training"),
        ("data: [{folder: x, split: my_dev, weight: 1.0}]\n", "never for training"),
        ("data: [{folder: x, split: 1, weight: 1.0}]\n", "a split is a name"),
        ("data: [{folder: x, weight: 0}]\n", "nothing to draw from"),
        ("data: [{folder: x, weight: 1.0}]\nstep_size: {kidn: raw, initial: 0.01}\n", "found kidn too"),
        ("data: [{folder: x, weight: 1.0}]\nclip: 0\n", "above 0"),
        ("data: [{folder: x, weight: 1.0}]\nlearning_rate: -1\n", "learning_rate must be at least 0"),
        ("data: [{folder: x, weight: 1.0}]\nlearning_rate: .nan\n", "learning_rate must be at least 0"),
        ("data: [{folder: x, weight: 1.0}]\nsteps: .inf\n", "steps must be a whole number"),
        ("data: [{folder: x, weight: 1.0}]\nsteps: 0\n", "keeps what `start` is"),
        ("data: [{folder: x, weight: 1.0}]\nsteps: -1\n", "steps must be at least 0"),
        ("data: [{folder: x, weight: 1.0}]\npassage_tokens: 1\n", "passage_tokens must be at least 2"),
        ("data: [{folder: x, weight: 1.0}]\natoms: 'false'\n", "atoms is true or false"),
        ("data: [{folder: x, weight: 1.0}]\ncodecs: sign\n", "codecs is a list"),
    ):
        path.write_text(
            good.replace("space: core\n", "") * ("space:" in lines) + good * ("space:" not in lines) + lines
        )
        with pytest.raises(RegradError, match=message):
            Recipe.load(path)
    with pytest.raises(DataError, match="can't read"):
        Recipe.load(tmp_path / "none.yaml")


def test_of_large_matrices_the_leading_directions_alone_are_computed(monkeypatch):
    torch.manual_seed(3)
    scales = torch.tensor([10.0, 7.0, 5.0, 0.1, 0.05])
    cores = torch.randn(40, 5, 3) * scales.view(1, 5, 1)
    exact = narrowing._leading(cores.double(), 3)
    monkeypatch.setattr(narrowing, "EXACT", 1)
    state = torch.random.get_rng_state()
    found = narrowing._leading(cores.double(), 3)
    torch.testing.assert_close((found.T @ exact).abs(), torch.eye(3), atol=0.02, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(
        narrowing._leading(cores.double(), 3), found
    )
