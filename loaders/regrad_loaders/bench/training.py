"""Tasks per second of meta-training: whole episodes against the straightforward second-order loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from regrad_loaders.bench.figures import Figure, flops, in_turns, milliseconds
from regrad_loaders.bench.gradients import in_space
from regrad_loaders.data.episodes import Episode, EpisodeSource
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_qdrant.atoms.merge import length_weight, merge_weights


def one_at_a_time(learner: MetaLearner, episode: Episode) -> Tensor:
    """The mean answer loss of an episode as the paper's code makes it: for every question the gradient of each of its
    passages on its own, with its graph, and one forward pass with the parameters that they give.
    """
    model, space = learner.model[0], learner.space
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    parts = (("lora_A", learner.lora_a), ("lora_B", learner.lora_b))
    weights = {f"{name}.{part}": w for part, held in parts for name, w in zip(learner.names, held, strict=True)}
    sizes = learner.step_sizes()
    losses = []
    for example in episode.examples:
        scores = learner.lora_a[0].new_tensor([example.scores])
        present = torch.ones_like(scores, dtype=torch.bool)
        [shares] = merge_weights(learner.merge, scores, present, learner.log_temperature.exp())
        update = dict.fromkeys(space.shapes, 0.0)
        for row, share in zip(example.rows, shares, strict=True):
            ids = torch.tensor([episode.passages[row]], device=learner.device)
            share = share * length_weight(ids.shape[1])
            with sdpa_kernel(SDPBackend.MATH):
                loss = model(input_ids=ids, labels=ids).loss
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for name, atom in in_space(space, dict(zip(weights, grads, strict=True))).items():
                update[name] = update[name] - share * sizes[name] * atom[0]
        changes = space.to_update(update)
        changed = {paths[id(weight)]: weight + changes.get(name, 0.0) for name, weight in weights.items()}
        ids = torch.tensor([example.prompt_ids + example.answer_ids], device=learner.device)
        labels = torch.tensor([[-100] * len(example.prompt_ids) + example.answer_ids], device=learner.device)
        output: Any = functional_call(model, changed, (), {"input_ids": ids, "labels": labels})
        losses.append(output.loss)
    return torch.stack(losses).mean()


def bench_training(
    learner: MetaLearner,
    source: EpisodeSource,
    rounds: int,
    *,
    passages: int = 6,
    questions_per_passage: int = 3,
    top_k: int = 3,
    on_round: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The same episodes, forward and backward; a task is one question."""
    rng = random.Random(0)
    episodes = [source.episode(rng, passages, questions_per_passage, [top_k]) for _ in range(rounds + 1)]
    found: dict[str, float] = {}

    def backward(name: str, loss: Tensor) -> None:
        for parameter in learner.parameters():
            parameter.grad = None
        loss.backward()
        found[name] = float(loss.detach())

    def whole(turn: int) -> None:
        backward("episode", learner.objective(episodes[turn])[0].mean())

    def loop(turn: int) -> None:
        backward("loop", one_at_a_time(learner, episodes[turn]))

    whole(rounds), loop(rounds)  # warm up
    difference = abs(found["episode"] - found["loop"]) / found["loop"]
    seconds = in_turns({"episode": whole, "one at a time": loop}, rounds, on_round)
    tasks = [len(episode.examples) for episode in episodes[:rounds]]
    gflop = {"episode": flops(lambda: whole(0)) / 1e9, "one at a time": flops(lambda: loop(0)) / 1e9}
    floor = gflop["one at a time"] / gflop["episode"]
    floor_is = "the loop's matrix products over the episode's, counted"
    ratio = Figure.ratio(seconds["one at a time"], seconds["episode"], floor, floor_is)
    figures = {"training.speedup_over_one_at_a_time": ratio}
    details = {
        "ms": milliseconds(seconds),
        "gflop_of_the_first_episode": gflop,
        "gflop_per_second": {name: value / seconds[name][0] for name, value in gflop.items()},
        "tasks_per_second": sum(tasks) / sum(seconds["episode"]),
        "tasks_an_episode": tasks,
        "relative_difference_of_losses": difference,
    }
    return figures, details
