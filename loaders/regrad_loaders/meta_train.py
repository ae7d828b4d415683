"""A meta-training run: a recipe's steps, with metrics, checkpoints and exact resumption."""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrad_loaders.data import read_folder
from regrad_loaders.episodes import Episode, EpisodeSource
from regrad_loaders.facts import generate
from regrad_loaders.meta_learner import MetaLearner, calibrate
from regrad_loaders.narrow import narrow
from regrad_loaders.recipe import Recipe
from regrad_qdrant.errors import DataError, InitializationError
from regrad_qdrant.initialization import BaseModel, MetaInitialization, adapted_layers
from regrad_qdrant.merge import MergeRule
from regrad_qdrant.space import SPACES

SAMPLE = 48  # passages of each source whose atoms say which directions narrowing keeps


@dataclass(frozen=True)
class StepMetrics:
    """What one meta-training step measured."""

    step: int
    loss: float  # mean over questions of the token-mean negative log-likelihood of the answer
    exact: float  # share of questions whose every answer token is the most likely one
    grad_norm: float
    seconds: float
    questions: int
    passages: int


class Trainer:
    """One run of a recipe: steps, checkpoints and metrics in a folder."""

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Any, base: BaseModel, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.rng = random.Random(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.sources, self.weights = load_sources(recipe, tokenizer)
        initialization = self._start(model, base)
        self.learner = MetaLearner(model, initialization, recipe.merge)
        self.step = 0
        self.seen: set[str] = set()
        learned = self.learner
        if recipe.learn == "step_sizes":
            for parameter in (*learned.lora_a, *learned.lora_b, *learned.basis):
                parameter.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*learned.lora_a, *learned.lora_b, *learned.basis], "lr": recipe.learning_rate},
                {"params": [learned.log_step_size, learned.log_temperature], "lr": recipe.step_size_learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._decay)

    def _start(self, model: nn.Module, base: BaseModel) -> MetaInitialization:
        """What training begins with: fresh from the model's own singular vectors, or an initialization made before,
        narrowed where the recipe's ranks and layers are fewer.

        Raises:
            InitializationError: if that one has another shape than the recipe says.
            WrongModelError: if it belongs to another base model.
        """
        recipe = self.recipe
        layers = range(recipe.layers[0], recipe.layers[1] + 1)
        if recipe.start is None:
            fresh = MetaInitialization.fresh(
                model,
                base,
                kind=recipe.space,
                targets=recipe.targets,
                layers=layers,
                rank=recipe.rank,
                basis_rank=recipe.basis_rank,
                lora_alpha=recipe.lora_alpha,
                step_size=recipe.step_size or 1.0,
                max_length=recipe.max_length,
            )
            return replace(fresh, merge=MergeRule(recipe.merge, recipe.temperature))
        start = MetaInitialization.load(recipe.start)
        start.check_model(model)
        modules = list(adapted_layers(model, recipe.targets, layers))
        if start.kind == recipe.space == "core" and _plan(start) != (recipe.rank, recipe.basis_rank, set(modules)):
            atoms = self._sample_atoms(model, start)
            start = narrow(start, atoms, rank=recipe.rank, basis_rank=recipe.basis_rank, modules=modules)
        found: dict[str, tuple[Any, Any]] = {
            "kind": (start.kind, recipe.space),
            "lora_alpha": (start.lora_alpha, recipe.lora_alpha),
            "max_length": (start.max_length, recipe.max_length),
            "rank": (start.rank, recipe.rank),
            "layers": (set(start.modules), set(modules)),
        }
        if SPACES[recipe.space].uses_basis:
            found["basis_rank"] = (_plan(start)[1], recipe.basis_rank)
        differing = [name for name, (there, here) in found.items() if there != here]
        if differing:
            raise InitializationError(f"{recipe.start} does not fit the recipe: {', '.join(differing)} differ")
        return replace(start, merge=MergeRule(recipe.merge, start.merge.temperature))

    def _sample_atoms(self, model: nn.Module, start: MetaInitialization) -> Tensor:
        """Atoms of passages of every source in the space of `start`, each source's of mean length 1."""
        rng = random.Random(self.recipe.seed + 3)
        learner = MetaLearner(model, start, self.recipe.merge)
        atoms = []
        for source in self.sources:
            found: list[Tensor] = []
            while len(found) < SAMPLE:
                episode = source.episode(rng, self.recipe.passages, 1, self.recipe.top_k)
                found += learner.space.flatten(learner.atoms(episode.passages, create_graph=False)[0])
            rows = torch.stack(found)
            atoms.append(rows / rows.norm(dim=1).mean())
        learner.model[0].unload()
        return torch.cat(atoms)

    def _decay(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        if step < self.recipe.warmup:
            return (step + 1) / self.recipe.warmup
        return max(0.0, (self.recipe.steps - step) / max(1, self.recipe.steps - self.recipe.warmup))

    def calibrate(self) -> list[dict[str, float]]:
        """Set the initial step size, unless the recipe gives one; returns the table it was chosen from."""
        if self.recipe.step_size is not None or self.recipe.start is not None:
            return []
        rng = random.Random(self.recipe.seed + 1)
        size, table = calibrate(self.learner, [self._draw(rng).passages[i] for i in (0, -1) for _ in range(4)])
        with torch.no_grad():
            self.learner.log_step_size.fill_(math.log(size))
        return table

    def _draw(self, rng: random.Random) -> Episode:
        source = rng.choices(self.sources, self.weights)[0]
        return source.episode(rng, self.recipe.passages, self.recipe.questions_per_passage, self.recipe.top_k)

    def train_step(self) -> StepMetrics:
        """One episode: forward, backward, update."""
        start = time.perf_counter()
        episode = self._draw(self.rng)
        codec = self.rng.choice(self.recipe.codecs)
        order = 0 if self.recipe.learn == "step_sizes" else self.recipe.order
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            losses, exact = self.learner.objective(episode, codec, order)
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), self.recipe.clip)
        if math.isfinite(float(norm)):
            self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.seen.update(example.question_id for example in episode.examples)
        return StepMetrics(
            step=self.step,
            loss=float(loss.detach()),
            exact=float(exact.mean()),
            grad_norm=float(norm),
            seconds=time.perf_counter() - start,
            questions=len(episode.examples),
            passages=len(episode.passages),
        )

    def save(self) -> None:
        """A checkpoint that `resume` continues from exactly; the old one stays until the new one is whole."""
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "seen": sorted(self.seen),
            "recipe": self.recipe.as_dict(),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.out / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; False where there is none."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            return False
        state = torch.load(path, weights_only=True)
        if state["recipe"] != self.recipe.as_dict():
            changed = [name for name, value in self.recipe.as_dict().items() if state["recipe"].get(name) != value]
            raise DataError(f"{path} is of another recipe: {', '.join(changed)} differ; choose another --out folder")
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seen = state["step"], set(state["seen"])
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch_rng"])
        return True

    def evaluate(self, episodes: int = 2) -> dict[str, dict[str, float]]:
        """Per source, on episodes drawn with another seed from the same questions: the answer's loss, and how often
        greedy decoding is exact with the right atoms and with those of other passages. A sign of life, not a score:
        scores come from `regrad-qdrant eval` on questions that training never saw.
        """
        results = {}
        for source in self.sources:
            rng = random.Random(self.recipe.seed + 2)
            rows = []
            for _ in range(episodes):
                episode = source.episode(rng, self.recipe.passages, self.recipe.questions_per_passage, [3])
                atoms, _ = self.learner.atoms(episode.passages, create_graph=False)
                shifted = {name: atom.roll(len(episode.passages) // 2, 0) for name, atom in atoms.items()}
                with torch.no_grad():
                    loss, exact = self.learner.answer_losses(
                        episode.examples, self.learner.updates(episode.examples, atoms)
                    )
                    _, random_exact = self.learner.answer_losses(
                        episode.examples, self.learner.updates(episode.examples, shifted)
                    )
                rows.append((float(loss.mean()), float(exact.mean()), float(random_exact.mean())))
            loss, right, wrong = (sum(values) / len(values) for values in zip(*rows, strict=True))
            results[source.name] = {"loss": loss, "exact": right, "random_exact": wrong}
        return results


def _plan(initialization: MetaInitialization) -> tuple[int, int, set[str]]:
    """Its r, its p (0 without a basis) and its modules."""
    basis = next(iter(initialization.modules.values())).basis
    return initialization.rank, 0 if basis is None else int(basis.shape[1]), set(initialization.modules)


def load_sources(recipe: Recipe, tokenizer: Any) -> tuple[list[EpisodeSource], list[float]]:
    """The recipe's mixture: one episode source a data set, and the weights to draw them with."""
    sources = []
    for source in recipe.data:
        if source.facts is not None:
            dataset = generate("train", **source.facts)
        else:
            dataset = read_folder(Path(recipe.data_dir) / str(source.folder))
        questions = dataset.split(source.split)
        if source.types:
            questions = [question for question in questions if question.type in source.types]
        if not questions:
            raise DataError(f"{dataset.name}: no question of split {source.split!r} and types {source.types or 'any'}")
        sources.append(EpisodeSource(dataset, questions, tokenizer, recipe.passage_tokens))
    return sources, [source.weight for source in recipe.data]


def _forget_after(metrics: Path, step: int) -> None:
    """Drop what was logged after a checkpoint's step: those steps are done again. A step of −1 drops all."""
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step), encoding="utf-8")


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory that tensors free: giving it back costs page faults in every step."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**28)


def run(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    base: BaseModel,
    out: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int], None] = lambda _: None,
) -> MetaInitialization:
    """Train as the recipe says, in the folder `out`: metrics.jsonl, checkpoint.pt and the initialization itself.

    `on_step` is called with the number of steps just done, those before a resume included.
    """
    keep_freed_memory()
    trainer = Trainer(recipe, model, tokenizer, base, out)
    out.mkdir(parents=True, exist_ok=True)
    resumed = resume and trainer.resume()
    _forget_after(out / "metrics.jsonl", trainer.step if resumed else -1)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:

        def record(kind: str, values: Any) -> None:
            log.write(json.dumps({"kind": kind, **values}) + "\n")
            log.flush()

        if not resumed:
            record(
                "calibration",
                {"table": trainer.calibrate(), "step_size": float(trainer.learner.log_step_size.detach().exp()[0])},
            )
        on_step(trainer.step)
        while trainer.step < recipe.steps:
            metrics = trainer.train_step()
            on_step(1)
            record("step", asdict(metrics))
            last = trainer.step == recipe.steps
            if last or trainer.step % recipe.checkpoint_every == 0:
                trainer.save()
            if last or trainer.step % recipe.evaluate_every == 0:
                record("evaluation", {"step": trainer.step, "sources": trainer.evaluate()})
    card = {"recipe": recipe.as_dict(), "steps": trainer.step, "questions_seen": len(trainer.seen)}
    initialization = trainer.learner.trained(card) if recipe.learn == "all" else trainer.learner.refitted(card)
    initialization.save(out / "initialization")
    return initialization
