"""The rate–quality curve: what an atom costs in bytes, and what its answers are worth.

Every initialization (so every atom space) meets the same questions. Its exact atoms are computed once; then each
codec and each k reads them as a bank would give them back. Retrieval, merge rule, prompts and decoding are those
of `eval` in the mode `regrad`; questions are answered in batches, each row with its own update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from regrad_loaders.data.episodes import bm25_hits
from regrad_loaders.data.folders import Dataset, Question
from regrad_loaders.data.scores import Interval, bootstrap, pooled
from regrad_loaders.evaluation.plots import new_figure
from regrad_loaders.evaluation.protocol import OWN
from regrad_qdrant.answer.adapter import Adapter
from regrad_qdrant.answer.generation import Asking, choose, generate
from regrad_qdrant.atoms.codec import AtomLayout
from regrad_qdrant.atoms.codecs.registry import get_codec
from regrad_qdrant.atoms.merge import MergeRule, length_weight
from regrad_qdrant.atoms.record import Record, decode_sum, make_records
from regrad_qdrant.model.gradients import BATCH_TOKENS
from regrad_qdrant.model.initialization import MetaInitialization
from regrad_qdrant.model.plugin import row_updates
from regrad_qdrant.model.prompts import Prompt

QUESTIONS_A_BATCH = 24
TIMED = 24  # atoms and answers that the times are taken over
BASELINE = "fp32"


@dataclass(frozen=True)
class Adapted:
    """The sizes that decide what an atom takes: adapted layers, their width and MLP's width, and the LoRA rank."""

    layers: int
    hidden: int
    intermediate: int
    rank: int

    def core(self, p: int) -> AtomLayout:
        """Of the space core with bases of p columns, on the gate, up and down projections."""
        return AtomLayout.flat(self.layers * 3 * p * self.rank)

    def values(self) -> AtomLayout:
        """Of the space values, on the same projections."""
        rows = self.layers * self.rank
        return AtomLayout(((rows, self.hidden), (2 * rows, self.intermediate)))


# Ours, and the published adapters (arXiv 2606.15734): gate, up and down projections of these layers.
MODELS = {
    "SmolLM2-135M, layers 15–29": Adapted(15, 576, 1536, 16),
    "Llama-3.2-1B, layers 8–15": Adapted(8, 2048, 8192, 16),
    "Llama-3.2-3B, layers 14–27": Adapted(14, 3072, 8192, 8),
    "Llama-3.1-8B, layers 16–31": Adapted(16, 4096, 14336, 4),
}


@dataclass(frozen=True)
class Task:
    """One set's questions with what retrieval returned for them."""

    name: str
    questions: list[Question]
    hits: list[dict[str, float]]  # passage id → score, best first
    texts: dict[str, str]

    @classmethod
    def of(cls, dataset: Dataset, questions: Sequence[Question], depth: int, name: str | None = None) -> Task:
        texts = {passage.id: passage.text for passage in dataset.passages}
        hits = bm25_hits(texts, [question.question for question in questions], depth)
        return cls(name or dataset.name, list(questions), hits, texts)


@dataclass(frozen=True)
class Cell:
    """One point of the curve."""

    init: str
    space: str
    numel: int
    task: str
    codec: str
    top_k: int
    bytes_per_atom: int  # of the record's JSON in the payload, median
    f1: Interval  # 0 to 1
    loss_to_fp32: Interval  # F1 of fp32 atoms of the same space and k, minus this, over the same questions
    cosine: float  # of the decoded weighted sum with that of fp32 atoms, mean
    scores: tuple[float, ...] = ()  # F1 of each question


@dataclass(frozen=True)
class Times:
    """Milliseconds, medians, one process."""

    init: str
    codec: str
    gradient: float  # of one atom, in batches
    encode: float  # of one atom, from numbers to record
    decode_sum: float  # of three records, from payload to the sum
    generate: float  # of one answer

    @property
    def encode_share(self) -> float:
        return self.encode / self.gradient

    @property
    def decode_share(self) -> float:
        return self.decode_sum / self.generate


class AtomBench:
    """One initialization on its model.

    Args:
        name: how the initialization is called in the results.
        model, tokenizer: the plain base model.
    """

    def __init__(self, name: str, initialization: MetaInitialization, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.initialization = initialization
        self.adapter = Adapter(model, initialization, check_model=False)
        self.space = self.adapter.space
        self.tokenizer = tokenizer
        self.gradients = self.adapter.gradients(tokenizer)
        self._asking = Asking(initialization.prompt)

    def atoms(self, texts: Sequence[str], on_progress: Callable[[int], None] = lambda _: None) -> tuple[Tensor, float]:
        """The exact atoms (texts, numel), and the milliseconds that one took."""
        documents = [self.gradients.encode(text) for text in texts]
        started = time.perf_counter()
        atoms = self.gradients.atoms_in_batches(documents, BATCH_TOKENS, on_progress)
        return atoms, 1000 * (time.perf_counter() - started) / len(texts)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def answers(self, questions: Sequence[Question], updates: Tensor) -> list[str]:
        """What the model says to each question with its own row of `updates` (questions, numel): the likeliest option,
        where there are options."""
        prompts = [Prompt(question.question, question.kind, question.choices) for question in questions]
        said = [""] * len(prompts)
        for way in (generate, choose):
            of_way = [i for i, prompt in enumerate(prompts) if bool(prompt.options) is (way is choose)]
            for start in range(0, len(of_way), QUESTIONS_A_BATCH):
                part = of_way[start : start + QUESTIONS_A_BATCH]
                rows = self.space.unflatten(updates[part])
                with self.adapter.initial(), row_updates(self.adapter.model, self.space, rows):
                    answers = way(self.adapter.model, self.tokenizer, [prompts[i] for i in part], self._asking)
                for i, answer in zip(part, answers, strict=True):
                    said[i] = answer.text
        return said

    def scores(self, questions: Sequence[Question], updates: Tensor) -> list[float]:
        """F1, 0 to 1, of what the model says to each question with its own row of `updates` (questions, numel)."""
        said = self.answers(questions, updates)
        return [OWN.scores(question, text).f1 for question, text in zip(questions, said, strict=True)]

    def read(self, atoms: Tensor, codec: str) -> Tensor:
        """Atoms (n, numel) as they are read back from a codec."""
        coder, layout = get_codec(codec), self.space.layout
        return coder.dequantize(coder.quantize(atoms, layout), layout)

    def sums(
        self, task: Task, decoded: Tensor, rows: dict[str, int], top_k: int, merge: MergeRule | None = None
    ) -> Tensor:
        """Σ wᵢ·g(dᵢ) for every question, (questions, numel), by the initialization's own rule or another."""
        merge = merge or self.initialization.merge
        total = torch.zeros(len(task.questions), self.space.numel)
        for i, hits in enumerate(task.hits):
            keys = list(hits)[:top_k]
            tokens = [len(self.gradients.encode(task.texts[key]).ids) for key in keys]
            weights = torch.tensor(merge.weights([hits[key] for key in keys]))
            total[i] = (weights * torch.tensor([length_weight(n) for n in tokens])) @ decoded[
                [rows[key] for key in keys]
            ]
        return total

    def curve(
        self,
        task: Task,
        codecs: Sequence[str],
        ks: Sequence[int],
        on_atoms: Callable[[int], None] = lambda _: None,
        on_cell: Callable[[int], None] = lambda _: None,
    ) -> tuple[list[Cell], list[Times]]:
        """Every codec at every k; fp32 is always among them."""
        used = sorted({key for hits in task.hits for key in list(hits)[: max(ks)]})
        rows = {key: i for i, key in enumerate(used)}
        exact, gradient_ms = self.atoms([task.texts[key] for key in used], on_atoms)
        baseline: dict[int, tuple[Tensor, list[float]]] = {}
        cells, times = [], []
        for name in dict.fromkeys([BASELINE, *codecs]):
            decoded = self.read(exact, name)
            records, timed = self._timed(name, exact[:TIMED], gradient_ms)
            size = int(median(record.payload_bytes for record in records))
            for top_k in ks:
                sums = self.sums(task, decoded, rows, top_k)
                scores = self.scores(task.questions, -self.adapter.step_sizes * sums)
                reference = baseline.setdefault(top_k, (sums, scores))
                losses = [before - after for before, after in zip(reference[1], scores, strict=True)]
                cosine = float(torch.cosine_similarity(sums, reference[0]).mean())
                cells.append(
                    Cell(
                        self.name, self.space.kind, self.space.numel, task.name, name, top_k, size,
                        bootstrap(scores), bootstrap(losses), cosine, tuple(round(score, 4) for score in scores),
                    )
                )  # fmt: skip
                on_cell(1)
            times.append(timed)
        return cells, times

    def _timed(self, codec: str, exact: Tensor, gradient_ms: float) -> tuple[list[Record], Times]:
        fingerprint, layout = self.initialization.fingerprint, self.space.layout
        encode, decode, records = [], [], []
        for atom in exact:
            started = time.perf_counter()
            records += make_records(atom.unsqueeze(0), ["text"], fingerprint, codec, layout)
            encode.append(time.perf_counter() - started)
        for i in range(max(1, len(records) - 2)):
            started = time.perf_counter()
            decode_sum(records[i : i + 3], [1.0, 0.5, 0.25][: len(records)], fingerprint, layout)
            decode.append(time.perf_counter() - started)
        prompt = Prompt("Where was the first of them born, and in which year was that?")
        answers = []
        for _ in range(3):
            started = time.perf_counter()
            with self.adapter.initial():
                generate(self.adapter.model, self.tokenizer, [prompt])
            answers.append(time.perf_counter() - started)
        seconds = (encode, decode, answers)
        return records, Times(self.name, codec, gradient_ms, *(1000 * median(values) for values in seconds))


def extrapolation() -> list[dict[str, Any]]:
    """What atoms take on larger models: computed, not run."""
    rows = []
    for model, sizes in MODELS.items():
        of_values = [("values", sizes.values(), codec) for codec in ("fp32", *(f"sign-rank{q}" for q in (2, 4, 8, 16)))]
        of_cores = [
            (f"core {p} × {sizes.rank}", sizes.core(p), codec) for p in (16, 48, 64) for codec in ("ternary", "sign")
        ]
        for space, layout, codec in of_values + of_cores:
            numbers = torch.randn(1, layout.numel, generator=torch.Generator().manual_seed(0))
            size = make_records(numbers, [""], "0" * 16, codec, layout)[0].payload_bytes
            row = {"model": model, "space": space, "numbers": layout.numel, "codec": codec}
            rows.append(row | {"bytes_per_atom": size, "gb_per_million": size / 1000})
    return rows


def pooled_loss(cells: Sequence[Cell]) -> Interval:
    """The mean loss to fp32 atoms over sets, each set the mean of its k, with the interval of independent sets."""
    of_sets: dict[str, list[Interval]] = {}
    for cell in cells:
        of_sets.setdefault(cell.task, []).append(cell.loss_to_fp32)
    means = []
    for losses in of_sets.values():
        middle, half = mean(loss.mean for loss in losses), mean((loss.high - loss.low) / 2 for loss in losses)
        means.append(Interval(middle, middle - half, middle + half))
    return pooled(means)


def losses(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For every initialization and codec its bytes and its pooled loss."""
    rows = []
    for init, codec in dict.fromkeys((cell.init, cell.codec) for cell in cells):
        here = [cell for cell in cells if (cell.init, cell.codec) == (init, codec)]
        size = max(cell.bytes_per_atom for cell in here)
        rows.append({"init": init, "codec": codec, "bytes_per_atom": size, "loss_to_fp32": asdict(pooled_loss(here))})
    return rows


def behind(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """How far every other initialization, in each codec, is behind the first one's fp32 atoms: F1 over the same
    questions, paired, pooled over sets as `pooled_loss`."""
    first = cells[0].init
    reference = {(cell.task, cell.top_k): cell.scores for cell in cells if (cell.init, cell.codec) == (first, BASELINE)}
    rows = []
    for init, codec in dict.fromkeys((cell.init, cell.codec) for cell in cells if cell.init != first):
        here = []
        for cell in cells:
            if (cell.init, cell.codec) == (init, codec):
                pairs = zip(reference[cell.task, cell.top_k], cell.scores, strict=True)
                here.append(replace(cell, loss_to_fp32=bootstrap([there - found for there, found in pairs])))
        sets = {cell.task: asdict(cell.loss_to_fp32) for cell in here} if len({c.top_k for c in here}) == 1 else {}
        rows.append({"init": init, "codec": codec, "behind": first, "f1": asdict(pooled_loss(here)), "sets": sets})
    return rows


def smallest(rows: Sequence[dict[str, Any]], allowed: float = 0.01) -> dict[str, str]:
    """For each initialization the codec of fewest bytes that loses at most `allowed` (F1, 0 to 1) to fp32 atoms, at the
    upper end of its interval."""
    good = [row for row in rows if row["loss_to_fp32"]["high"] <= allowed]
    ranked = sorted(good, key=lambda row: row["bytes_per_atom"], reverse=True)
    return {row["init"]: row["codec"] for row in ranked}


def read_cells(result: dict[str, Any]) -> list[Cell]:
    """The curve of a saved JSON."""
    intervals = ("f1", "loss_to_fp32")
    rows = [{**cell, "scores": tuple(cell.get("scores", ()))} for cell in result["curve"]]
    return [Cell(**{k: Interval(**v) if k in intervals else v for k, v in row.items()}) for row in rows]


def report(cells: Sequence[Cell], times: Sequence[Times], settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `regrad-qdrant bench atoms`."""
    pooled = losses(cells)
    return {
        "settings": settings,
        "curve": [asdict(cell) for cell in cells],
        "losses": pooled,
        "times": [asdict(t) | {"encode_share": t.encode_share, "decode_share": t.decode_share} for t in times],
        "smallest": smallest(pooled),
        "behind_the_first": behind(cells),
        "extrapolation": extrapolation(),
    }


def plot(cells: Sequence[Cell], top_k: int, path: Path) -> None:
    """Two panels a set: F1 against bytes at one k, and F1 against k for every codec, of each initialization.

    Raises:
        DataError: without matplotlib.
    """
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = new_figure(11, 3.6 * len(tasks))
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for (rate, depth), task in zip(panels, tasks, strict=True):
        for init in dict.fromkeys(cell.init for cell in cells):
            here = [cell for cell in cells if cell.task == task and cell.init == init]
            at_k = sorted((cell for cell in here if cell.top_k == top_k), key=lambda cell: cell.bytes_per_atom)
            values = [100 * cell.f1.mean for cell in at_k]
            spread = [
                [100 * (cell.f1.mean - cell.f1.low) for cell in at_k],
                [100 * (cell.f1.high - cell.f1.mean) for cell in at_k],
            ]
            sizes = [cell.bytes_per_atom for cell in at_k]
            rate.errorbar(sizes, values, spread, marker="o", capsize=3, label=f"{init} ({at_k[0].numel:,} numbers)")
            for i, (cell, value) in enumerate(zip(at_k, values, strict=True)):
                above = (4, 8 if i % 2 else -14)
                rate.annotate(cell.codec, (cell.bytes_per_atom, value), textcoords="offset points", xytext=above)
            for codec in (cell.codec for cell in reversed(at_k)):
                line = sorted((cell for cell in here if cell.codec == codec), key=lambda cell: cell.top_k)
                values = [100 * cell.f1.mean for cell in line]
                depth.plot([cell.top_k for cell in line], values, marker="o", label=f"{init}, {codec}")
        rate.set(xscale="log", xlabel="bytes an atom in the payload", ylabel="F1", title=f"{task}, k = {top_k}")
        depth.set(xlabel="k", ylabel="F1", title=f"{task}, more documents")
        for panel in (rate, depth):
            panel.set_ylim(0, 1.2 * panel.get_ylim()[1])
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, dpi=120)
