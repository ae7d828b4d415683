"""A meta-training run: a recipe's steps, with metrics, checkpoints and exact resumption.

Under `accelerate launch` every process draws its own episodes and the gradients are averaged; alone it is one process.
Where processes hold the base model together (`shards`), each group of them draws its own. What a step draws depends on
the seed, the process and the number of the step alone.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn

from regrad_loaders.data.episodes import Episode, EpisodeSource
from regrad_loaders.training.calibration import calibrate
from regrad_loaders.training.contrast import SpanContrast
from regrad_loaders.training.estimate import fitting_passages
from regrad_loaders.training.log import Log
from regrad_loaders.training.meta_gradient import backward
from regrad_loaders.training.meta_learner import MetaLearner
from regrad_loaders.training.mixture import load_dev_sources, load_sources
from regrad_loaders.training.recipe import Recipe
from regrad_loaders.training.sharded import Share, share_weights
from regrad_loaders.training.start import begin
from regrad_loaders.training.written import mean_f1
from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.errors import DataError
from regrad_qdrant.model.identity import BaseModel
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.memory import available_bytes, keep_freed_memory

SKIPPED = 10  # steps in a row without a finite gradient, after which a run is given up


@dataclass(frozen=True)
class StepMetrics:
    """What one meta-training step measured."""

    step: int
    data: tuple[str, ...]  # the sets that its episodes came from
    loss: float  # mean over questions of the token-mean negative log-likelihood of the answer
    exact: float  # share of questions whose every answer token is the most likely one
    grad_norm: float
    seconds: float
    seconds_of_atoms: float  # the inner step: forward, and backward with its graph
    seconds_of_answers: float  # of the questions, forward and backward; the rest is the way back through the atoms
    questions: int
    passages: int
    contrast: float | None = None  # mean loss of the contrast with other spans, where the recipe has it

    @property
    def tasks_per_second(self) -> float:
        return self.questions / self.seconds


class Trainer:
    """One run of a recipe: steps, checkpoints and metrics in a folder.

    Args:
        on_processor: whether it stays on the processor, and not on this process's accelerator; None: as the model does.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: Any,
        base: BaseModel,
        out: Path,
        on_processor: bool | None = None,
    ) -> None:
        self.recipe, self.out = recipe, out
        if on_processor is None:
            on_processor = next(model.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(cpu=on_processor)
        if not on_processor:
            torch.set_float32_matmul_precision("high")  # TF32, with which no loss was seen to differ by more than 0.003
        if recipe.shards == 1 and self.accelerator.num_processes > 1 and not on_processor:
            model.to(self.accelerator.device)
        self.sources, self.weights = load_sources(recipe, tokenizer)
        self.dev_sources = load_dev_sources(recipe, tokenizer)
        initialization = begin(recipe, model, base, self.sources, self._fitting(model))
        if recipe.shards > 1:
            share = Share(self.accelerator.process_index, self.accelerator.num_processes, recipe.shards)
            share_weights(model, share)
            model.to(self.accelerator.device)
        self.learner = MetaLearner(model, initialization, recipe.merge, recipe.step_size_mode, recipe.step_size_kind)
        self.passage_batch = self._fitting(model)  # anew: what it learns takes memory, shared weights give some back
        if recipe.shards > 1:
            self.passage_batch = share.smallest(self.passage_batch, self.learner.device)
        self.contrast = SpanContrast(tokenizer, recipe.contrast) if recipe.contrast else None
        self.step = 0
        self.seen: set[str] = set()
        self.best = math.inf  # the lowest mean dev loss, or the highest mean F1 with its sign turned
        self.waited = 0  # evaluations since
        self.skipped = 0  # steps in a row whose gradient was not finite
        learned = self.learner
        if recipe.learn == "step_sizes":
            for parameter in (*learned.lora_a, *learned.lora_b, *learned.basis):
                parameter.requires_grad_(False)
        of_step_sizes = recipe.learning_rate if recipe.step_size_kind == "raw" else recipe.step_size_learning_rate
        kept = {} if recipe.step_size_kind == "raw" else {"weight_decay": 0.0}  # it draws log α and log τ to 0
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*learned.lora_a, *learned.lora_b, *learned.basis], "lr": recipe.learning_rate},
                {"params": [learned.step_size], "lr": of_step_sizes, **kept},
                {"params": [learned.log_temperature], "lr": recipe.step_size_learning_rate, **kept},
            ],
            betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._decay)
        self._agree()

    def _agree(self) -> None:
        """Let all processes begin with the main one's tensors: rounding can turn the directions that a start finds."""
        if self.accelerator.num_processes > 1:
            for parameter in self.learner.parameters():
                parameter.data = broadcast(parameter.data, from_process=0)

    def _fitting(self, model: nn.Module) -> int | None:
        """As many passages at once as the recipe says, or as fit the memory by the model's configuration; None: all."""
        if self.recipe.passage_batch is not None:
            return self.recipe.passage_batch
        device = next(model.parameters()).device
        if device.type not in ("cpu", "cuda") or not self.recipe.atoms:
            return None
        free = available_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        wide = device.type == "cpu" and not self.recipe.autocast
        try:
            return fitting_passages(self.recipe, model.config, free, wide)
        except AttributeError:  # a configuration without the usual names
            return None

    def _decay(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        if step < self.recipe.warmup:
            lowest = self.recipe.optimizer.warmup_from
            done = step / self.recipe.warmup if lowest else (step + 1) / self.recipe.warmup
            return lowest + (1 - lowest) * done
        return max(0.0, (self.recipe.steps - step) / max(1, self.recipe.steps - self.recipe.warmup))

    def calibrate(self) -> list[dict[str, float]]:
        """Set the initial step size, unless the recipe gives one; returns the table it was chosen from."""
        if self.recipe.step_size is not None or self.recipe.start is not None or not self.recipe.atoms:
            return []
        rng = random.Random(self.recipe.seed + 1)
        with self._precision():
            size, table = calibrate(self.learner, [self._draw(rng).passages[i] for i in (0, -1) for _ in range(4)])
        self.learner.set_step_size(size)
        self._agree()
        return table

    def _precision(self) -> torch.autocast:
        """The block in which the model computes, in training and evaluation alike."""
        return torch.autocast(self.learner.device.type, torch.bfloat16, enabled=self.recipe.autocast)

    def _draw(self, rng: random.Random) -> Episode:
        source = rng.choices(self.sources, self.weights)[0]
        return source.episode(rng, self.recipe.passages, self.recipe.questions_per_passage, self.recipe.top_k)

    def train_step(self) -> StepMetrics:
        """Some episodes: forward, backward, and one update."""
        recipe, start = self.recipe, time.perf_counter()
        order: Literal[0, 1, 2] = 0 if recipe.learn == "step_sizes" else 1 if recipe.order == 1 else 2
        losses, exact, data, passages, of_atoms, of_answers = [], [], [], 0, 0.0, 0.0
        contrasted: list[float] = []
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(recipe.accumulate):
            group = self.accelerator.process_index // recipe.shards
            rng = random.Random(f"{recipe.seed}-{group}-{self.step}-{part}")
            episode, codec = self._draw(rng), rng.choice(recipe.codecs)
            contrast = None
            if self.contrast is not None:
                contrast = functools.partial(self.contrast.losses, self.learner, episode, rng=rng)
            found = backward(
                self.learner,
                episode,
                codec=codec,
                order=order,
                atoms=recipe.atoms,
                passage_batch=self.passage_batch,
                scale=1 / recipe.accumulate,
                contrast=contrast,
                contrast_weight=recipe.contrast_weight,
                precision=self._precision,
            )
            if found.contrast is not None:
                contrasted.append(found.contrast)
            of_atoms += found.seconds_of_atoms
            of_answers += found.seconds_of_answers
            losses.append(float(found.losses.mean()))
            exact.append(found.exact)
            data.append(episode.source)
            passages += len(episode.passages)
            self.seen.update(example.question_id for example in episode.examples)
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.clip)
        if math.isfinite(float(norm)):
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.schedule.step()
        self.step += 1
        return StepMetrics(
            step=self.step,
            data=tuple(data),
            loss=sum(losses) / len(losses),
            exact=float(torch.cat(exact).mean()),
            grad_norm=float(norm),
            seconds=time.perf_counter() - start,
            seconds_of_atoms=of_atoms,
            seconds_of_answers=of_answers,
            questions=sum(map(len, exact)),
            passages=passages,
            contrast=sum(contrasted) / len(contrasted) if contrasted else None,
        )

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.learner.parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")

    def save(self) -> None:
        """A checkpoint that `resume` continues from exactly; the old one stays until the new one is whole."""
        seen = self._seen_by_all()
        if not self.accelerator.is_main_process:
            return
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "seen": sorted(seen),
            "best": self.best,
            "waited": self.waited,
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
        state = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        if state["recipe"] != self.recipe.as_dict():
            changed = [name for name, value in self.recipe.as_dict().items() if state["recipe"].get(name) != value]
            raise DataError(f"{path} is of another recipe: {', '.join(changed)} differ; choose another --out folder")
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seen = state["step"], set(state["seen"])
        self.best, self.waited = state["best"], state["waited"]
        return True

    def _seen_by_all(self) -> set[str]:
        """The questions that any process has trained on."""
        if self.accelerator.num_processes == 1:
            return self.seen
        return set(gather_object(sorted(self.seen)))

    def evaluate(self, episodes: int = 2) -> dict[str, dict[str, float]]:
        """Per source, on episodes of its dev questions (of training questions where the recipe wants none): the
        answer's loss, and how often greedy decoding is exact with the right atoms and, where an episode has passages of
        several questions, with those of other passages; where the best is selected by it, the F1 of what is written.
        But for recipes of retrieved passages, the gold passages are always there: scores come from
        `regrad-qdrant eval`, with what retrieval returns.

        Args:
            episodes: at least so many a source; of dev questions as many as put as many questions as there are.
        """
        results = {}
        layout = self.learner.space.layout
        codec = min(self.recipe.codecs, key=lambda name: get_codec(name).size(layout))  # the coarsest
        for name, source in _named(self.dev_sources or self.sources).items():
            rows, scores = [], []
            for episode in self._evaluated(source, episodes):
                # The right ones, and those of other questions' passages; retrieved passages all are the one question's.
                half = len(episode.passages) // 2
                shifts = [0] if self.recipe.retrieved or not half else [0, half]
                updates: list[dict[str, Tensor] | None] = [None] * len(shifts)
                if self.recipe.atoms:
                    with self._precision():
                        atoms = self.learner.atoms_in_parts(episode.passages, self.passage_batch)
                    shifted = [{name: atom.roll(shift, 0) for name, atom in atoms.items()} for shift in shifts]
                    with torch.no_grad():
                        updates = [self.learner.merged(episode, either, codec) for either in shifted]
                with torch.no_grad(), self._precision():
                    losses = [self.learner.answer_losses(episode.examples, either) for either in updates]
                rows.append((float(losses[0][0].mean()), *(float(exact.mean()) for _, exact in losses)))
                if self.recipe.select_by == "f1":
                    with self._precision():
                        scores.append(
                            mean_f1(self.learner, episode.examples, updates[0], source.tokenizer, source.format)
                        )
            if not rows:
                raise DataError(f"{name}: no question has a passage that was retrieved, so none can be evaluated")
            means = [sum(values) / len(values) for values in zip(*rows, strict=False)]
            results[name] = dict(zip(("loss", "exact", "random_exact"), means, strict=False))
            if scores:
                results[name]["f1"] = sum(scores) / len(scores)
        [of_main] = broadcast_object_list([results])  # rounding differs between devices, and all have to decide alike
        return of_main

    def _evaluated(self, source: EpisodeSource, count: int) -> Iterator[Episode]:
        """The episodes that a source is evaluated on: of retrieved passages one for every dev question."""
        recipe, rng = self.recipe, random.Random(self.recipe.seed + 2)
        if recipe.retrieved and recipe.dev_questions:
            yield from source.each(max(recipe.top_k))
            return
        wanted = len(source.entries) if recipe.dev_questions else 0
        while count > 0 or wanted > 0:
            episode = source.episode(rng, recipe.passages, recipe.questions_per_passage, [3])
            count, wanted = count - 1, wanted - len(episode.examples)
            yield episode

    def is_better(self, evaluation: dict[str, dict[str, float]]) -> bool:
        """Whether this is the lowest dev loss so far, or the highest F1 where the recipe selects by that, the mean over
        sources; counts the evaluations that are not."""
        by, sign = self.recipe.select_by, -1.0 if self.recipe.select_by == "f1" else 1.0
        value = sign * sum(source[by] for source in evaluation.values()) / len(evaluation)
        better = value < self.best
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return better

    def card(self) -> dict[str, Any]:
        """What goes into the initialization's card: the recipe, and what it has seen so far."""
        return {"recipe": self.recipe.as_dict(), "steps": self.step, "questions_seen": len(self._seen_by_all())}

    def made(self) -> MetaInitialization:
        """The initialization as learned so far; before the first step what it began with, card and all."""
        if not self.step:
            return self.learner.initialization
        card = self.card()
        return self.learner.trained(card) if self.recipe.learn == "all" else self.learner.refitted(card)


def run(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    base: BaseModel,
    out: Path,
    *,
    resume: bool = False,
    on_processor: bool | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> MetaInitialization:
    """Train as the recipe says, in the folder `out`: metrics.jsonl (and TensorBoard's events, where it is installed),
    checkpoint.pt and the initialization itself: the best on dev questions, or the last without any.

    `on_processor` is that of `Trainer`. `on_step` is called with the number of steps just done, those before a resume
    included, and `say` with a line now and then.
    """
    keep_freed_memory()
    trainer = Trainer(recipe, model, tokenizer, base, out, on_processor)
    out.mkdir(parents=True, exist_ok=True)
    resumed = resume and trainer.resume()
    with Log(out, trainer.step if resumed else -1, trainer.accelerator.is_main_process) as log:
        if not resumed:
            table = trainer.calibrate()
            size = float(next(iter(trainer.learner.step_sizes().values())).detach().flatten()[0])
            log.write("calibration", {"table": table, "step_size": size})
        on_step(trainer.step)
        if trainer.dev_sources:
            say("evaluated on dev questions of " + ", ".join(_named(trainer.dev_sources)))
        while trainer.step < recipe.steps and not (recipe.patience and trainer.waited >= recipe.patience):
            metrics = trainer.train_step()
            on_step(1)
            log.write("step", asdict(metrics) | {"tasks_per_second": metrics.tasks_per_second})
            if trainer.skipped == 1:
                say(f"step {trainer.step}: the gradient is not finite, and nothing was learned from it")
            if trainer.skipped == SKIPPED:
                raise DataError(
                    f"no gradient of the last {SKIPPED} steps was finite (step {trainer.step}): lower learning_rate, "
                    "step_size_learning_rate or step_size, and start again in another --out"
                )
            last = trainer.step == recipe.steps
            if last or trainer.step % recipe.evaluate_every == 0:
                evaluation = trainer.evaluate()
                log.write("evaluation", {"step": trainer.step, "sources": evaluation})
                say(f"step {trainer.step}: " + ", ".join(f"{n} {100 * v['exact']:.0f}" for n, v in evaluation.items()))
                if recipe.dev_questions and trainer.is_better(evaluation):
                    _save(trainer, out / "initialization")
            if last or trainer.step % recipe.checkpoint_every == 0:
                trainer.save()
        log.write("end", {"step": trainer.step})
    if not recipe.dev_questions:
        return _save(trainer, out / "initialization")
    trainer.accelerator.wait_for_everyone()
    if trainer.best == math.inf:
        raise DataError(f"no evaluation of {out / 'metrics.jsonl'} is finite, so no step was kept: lower learning_rate")
    return MetaInitialization.load(out / "initialization")


def _named(sources: Sequence[EpisodeSource]) -> dict[str, EpisodeSource]:
    """The sources by their data sets' names, numbered where one set is several."""
    found: dict[str, EpisodeSource] = {}
    for source in sources:
        count = sum(other.name == source.name for other in found.values())
        found[f"{source.name} {count + 1}" if count else source.name] = source
    return found


def _save(trainer: Trainer, folder: Path) -> MetaInitialization:
    initialization = trainer.made()
    if trainer.accelerator.is_main_process:
        initialization.save(folder)
    return initialization
