"""Meta-training: min over φ₀, α, U of Σ −log p(answer | question; θ, φ₀ − α ⊙ Σ wᵢ·g(dᵢ)), second order.

One step works on an episode: all its passages go through the model in one batch, a zero change of the atom
space in every row; the gradient of each row's loss by its own zero change is that passage's atom, and stays in
the graph. Then all questions go through the model in one batch, row q with the update of the passages that q
retrieved. Layers below the first adapted one never enter the graph.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from regrad_loaders.data import read_folder
from regrad_loaders.episodes import Episode, EpisodeSource, Example
from regrad_loaders.facts import generate
from regrad_loaders.recipe import Recipe
from regrad_qdrant.errors import DataError, InitializationError
from regrad_qdrant.gradients import document_losses, hidden_states, pad
from regrad_qdrant.initialization import BaseModel, MetaInitialization
from regrad_qdrant.merge import MergeRule, merge_weights
from regrad_qdrant.plugin import live_space, lora_layers, lora_weight, plug_in, row_updates
from regrad_qdrant.space import SPACES, LoraModule

STEP_SIZE_GRID = tuple(10 ** (i / 4) for i in range(-8, 13))  # 0.01 to 1000, four a decade


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


class MetaLearner(nn.Module):
    """The outer parameters φ₀, log α, log τ (and U) over a live model, and the objective of one episode."""

    def __init__(self, model: nn.Module, initialization: MetaInitialization, merge: str) -> None:
        super().__init__()
        self.initialization = initialization
        self.model = [plug_in(model, initialization)]  # in a list: the base model's weights are no parameters of ours
        self.merge = merge
        layers = lora_layers(self.model[0])
        live = live_space(self.model[0], initialization)
        self.names = list(live.modules)
        self.lora_a = nn.ParameterList(lora_weight(layers[name], "lora_A").requires_grad_(True) for name in self.names)
        self.lora_b = nn.ParameterList(lora_weight(layers[name], "lora_B").requires_grad_(True) for name in self.names)
        bases = [live.modules[name].basis for name in self.names]
        self.basis = nn.ParameterList(nn.Parameter(basis.clone()) for basis in bases if basis is not None)
        sizes = [initialization.step_sizes[name] for name in live.shapes]
        self.log_step_size = nn.Parameter(torch.tensor(sizes).log())
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initialization.merge.temperature)))
        self.space = SPACES[initialization.kind](self.plug_in_modules())

    def plug_in_modules(self) -> dict[str, LoraModule]:
        scaling = self.initialization.lora_alpha / self.initialization.rank
        bases: Sequence[Tensor | None] = list(self.basis) or [None] * len(self.names)
        return {
            name: LoraModule(a, b, scaling, u)
            for name, a, b, u in zip(self.names, self.lora_a, self.lora_b, bases, strict=True)
        }

    def step_sizes(self) -> dict[str, Tensor]:
        return dict(zip(self.space.shapes, self.log_step_size.exp(), strict=True))

    def atoms(self, passages: Sequence[Sequence[int]], *, create_graph: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The atom of each passage, (passages, *shape) a tensor, and each passage's loss (passages,)."""
        zeros = {
            name: self.lora_a[0].new_zeros(len(passages), *shape).requires_grad_(True)
            for name, shape in self.space.shapes.items()
        }
        ids, mask = pad(passages, self.pad_id)
        with row_updates(self.model[0], self.space, zeros), sdpa_kernel(SDPBackend.MATH):
            losses = document_losses(self.model[0], ids, mask)
        grads = torch.autograd.grad(losses.sum(), list(zeros.values()), create_graph=create_graph)
        return dict(zip(zeros, grads, strict=True)), losses

    @property
    def pad_id(self) -> int:
        return int(self.model[0].config.pad_token_id or 0)

    def answer_losses(self, examples: Sequence[Example], rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For every question, run with its own row of `rows`: the answer's mean negative log-likelihood and
        whether greedy decoding would give it (questions,)."""
        ids, mask = pad([example.prompt_ids + example.answer_ids for example in examples], self.pad_id)
        with row_updates(self.model[0], self.space, rows):
            hidden = hidden_states(self.model[0], ids, mask)
        owner, position, target = [], [], []
        for i, example in enumerate(examples):
            owner += [i] * len(example.answer_ids)
            position += range(len(example.prompt_ids) - 1, len(example.prompt_ids) + len(example.answer_ids) - 1)
            target += example.answer_ids
        index, goal = torch.tensor(owner), torch.tensor(target)
        logits = self.model[0].get_output_embeddings()(hidden[index, torch.tensor(position)])
        token_losses = nn.functional.cross_entropy(logits, goal, reduction="none")
        lengths = torch.bincount(index, minlength=len(examples))
        losses = token_losses.new_zeros(len(examples)).index_add(0, index, token_losses) / lengths
        right = torch.zeros(len(examples)).index_add(0, index, (logits.detach().argmax(-1) == goal).float())
        return losses, (right == lengths).float()

    def updates(self, examples: Sequence[Example], atoms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """−α ⊙ Σ wᵢ·g(dᵢ) for every question: (questions, *shape) a tensor."""
        count = next(iter(atoms.values())).shape[0]
        scores = self.lora_a[0].new_zeros(len(examples), count)
        present = torch.zeros(len(examples), count, dtype=torch.bool)
        for i, example in enumerate(examples):
            scores[i, example.rows], present[i, example.rows] = scores.new_tensor(example.scores), True
        weights = merge_weights(self.merge, scores, present, self.log_temperature.exp())
        sizes = self.step_sizes()
        return {name: -sizes[name] * torch.einsum("qn,n...->q...", weights, atom) for name, atom in atoms.items()}

    def objective(self, episode: Episode, *, create_graph: bool = True) -> tuple[Tensor, Tensor]:
        """The episode's answer losses and greedy hits, (questions,) each."""
        atoms, _ = self.atoms(episode.passages, create_graph=create_graph)
        return self.answer_losses(episode.examples, self.updates(episode.examples, atoms))

    def trained(self, card: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> MetaInitialization:
        """The meta-initialization as learned so far, its tensors rounded to `dtype` as they are saved."""

        def rounded(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).float()

        start = self.initialization
        modules = {
            name: LoraModule(
                rounded(m.lora_a), rounded(m.lora_b), m.scaling, None if m.basis is None else rounded(m.basis)
            )
            for name, m in self.plug_in_modules().items()
        }
        return MetaInitialization(
            base=start.base,
            kind=start.kind,
            lora_alpha=start.lora_alpha,
            modules=modules,
            step_sizes={name: float(size.detach()) for name, size in self.step_sizes().items()},
            max_length=start.max_length,
            merge=MergeRule(self.merge, float(self.log_temperature.detach().exp())),
            passages_in_prompt=start.passages_in_prompt,
            card=dict(card),
        )


def calibrate(learner: MetaLearner, passages: Sequence[Sequence[int]]) -> tuple[float, list[dict[str, float]]]:
    """The step size that lowers the documents' own loss most within a trust region.

    Each document's atom is applied with every size of the grid; `own` is the mean change of the document's
    loss, `other` that of a document which the atom knows nothing of (the one half the list away). The trust
    region: `other` may rise by no more than half of what `own` falls. Returns the size and the whole table.
    """
    atoms, before = learner.atoms(passages, create_graph=False)
    batch = pad(passages, learner.pad_id)
    half = len(passages) // 2
    table = []
    with torch.no_grad():
        for size in STEP_SIZE_GRID:
            changes = []
            for shift in (0, half):
                rows = {name: -size * atom.roll(shift, 0) for name, atom in atoms.items()}
                with row_updates(learner.model[0], learner.space, rows):
                    changes.append(float((document_losses(learner.model[0], *batch) - before).mean()))
            own, other = changes
            table.append({"step_size": size, "own": own, "other": other})
            if own > 0.5:
                break  # far past the minimum
    trusted = [row for row in table if row["own"] < 0 and row["other"] <= -0.5 * row["own"]]
    if not trusted:
        raise InitializationError(
            f"no step size lowers the documents' loss; tried {[row['step_size'] for row in table]}"
        )
    return min(trusted, key=lambda row: row["own"])["step_size"], table


class Trainer:
    """One run of a recipe: steps, checkpoints and metrics in a folder."""

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Any, base: BaseModel, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.rng = random.Random(recipe.seed)
        torch.manual_seed(recipe.seed)
        initialization = MetaInitialization.fresh(
            model,
            base,
            kind=recipe.space,
            targets=recipe.targets,
            layers=range(recipe.layers[0], recipe.layers[1] + 1),
            rank=recipe.rank,
            basis_rank=recipe.basis_rank,
            lora_alpha=recipe.lora_alpha,
            step_size=recipe.step_size or 1.0,
            max_length=recipe.max_length,
        )
        initialization = replace(initialization, merge=MergeRule(recipe.merge, recipe.temperature))
        self.learner = MetaLearner(model, initialization, recipe.merge)
        self.sources, self.weights = load_sources(recipe, tokenizer)
        self.step = 0
        self.seen: set[str] = set()
        learned = self.learner
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*learned.lora_a, *learned.lora_b, *learned.basis], "lr": recipe.learning_rate},
                {"params": [learned.log_step_size, learned.log_temperature], "lr": recipe.step_size_learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._decay)

    def _decay(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        if step < self.recipe.warmup:
            return (step + 1) / self.recipe.warmup
        return max(0.0, (self.recipe.steps - step) / max(1, self.recipe.steps - self.recipe.warmup))

    def calibrate(self) -> list[dict[str, float]]:
        """Set the initial step size, unless the recipe gives one; returns the table it was chosen from."""
        if self.recipe.step_size is not None:
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
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            losses, exact = self.learner.objective(episode)
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
        """Per source, on episodes kept aside: greedy hits with the right atoms and with those of other passages."""
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


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory that tensors free: giving it back costs a fifth of a step in page faults."""
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
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:

        def record(kind: str, values: Any) -> None:
            log.write(json.dumps({"kind": kind, **values}) + "\n")
            log.flush()

        if not (resume and trainer.resume()):
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
    initialization = trainer.learner.trained(card)
    initialization.save(out / "initialization")
    return initialization
