"""`regrad-qdrant bench gradients | query | batch | grounding | serving | …`: what is measured in turns."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.cli.console import console, progress
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    CodecName,
    Device,
    Dtype,
    JsonOut,
    check_outputs,
    check_plot,
    whole_numbers,
    write_json,
)
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_loaders.bench.figures import Figure
    from regrad_loaders.bench.query import Bench
    from regrad_loaders.data.folders import Dataset
    from regrad_qdrant.model.initialization import MetaInitialization

Init = Annotated[str, typer.Option("--init", help="Meta-initialization: a shipped name or a folder.")]
Set = Annotated[
    Path | None,
    typer.Option("--set", help="A folder with corpus.jsonl and qa.jsonl; invented biographies where none is given."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Turns of all parties; the ratios' median is reported.")]
Tokens = Annotated[str, typer.Option("--tokens", help="Only passages of so many tokens, as 150-200.")]
PlotOut = Annotated[Path | None, typer.Option("--plot", help="Draw the figures beside their floors, PNG or SVG.")]

PEOPLE = 400


@dataclass(frozen=True)
class Subject:
    """What is measured: an initialization, and where and in which type its base model is loaded."""

    init: str
    device: str
    dtype: str


def gradients(
    data: Set = None,
    limit: Annotated[int, typer.Option("--limit", min=16, help="Documents.")] = 96,
    init: Init = DEFAULT_INIT,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Documents per second: whole batches, one at a time, and the floor of the same tokens."""
    _run(lambda: _gradients(data, limit, Subject(init, device, dtype)), json_out, plot_out)


def query(
    data: Set = None,
    rounds: Rounds = 24,
    tokens: Tokens = "",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """One answer: ReGrad beside the bare model, RAG, and gradients computed at query time."""
    _run(lambda: _query(data, rounds, tokens, Subject(init, device, dtype), codec), json_out, plot_out)


def batch(
    data: Set = None,
    rounds: Rounds = 5,
    size: Annotated[int, typer.Option("--size", min=2, help="Questions a batch.")] = 16,
    tokens: Tokens = "",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """A batch of questions, each with its own atoms: beside the bare model's batch, and one after another."""
    _run(lambda: _batch(data, rounds, size, tokens, Subject(init, device, dtype), codec), json_out, plot_out)


def grounding(
    data: Set = None,
    rounds: Rounds = 8,
    tokens: Tokens = "",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Grounded answers beside free ones, alone and in a batch, and the share of our own work in them."""
    _run(lambda: _grounding(data, rounds, tokens, Subject(init, device, dtype), codec), json_out, plot_out)


def crossover(
    data: Set = None,
    rounds: Rounds = 12,
    tokens: Tokens = "",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """After how many questions a document's atom has paid for itself, and what storing only the head's is worth."""
    _run(lambda: _crossover(data, rounds, tokens, Subject(init, device, dtype), codec), json_out, plot_out)


def serving(
    data: Set = None,
    clients: Annotated[str, typer.Option("--clients", help="At once, comma-separated.")] = "1,8,32,100",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Of each number of clients.")] = 60,
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """A server under load: requests a second and waiting, beside `answer_many` and the bare model."""
    counts = whole_numbers(clients, "--clients", 1)
    _run(lambda: _serving(data, counts, seconds, Subject(init, device, dtype), codec), json_out, plot_out)


def growth(
    sizes: Annotated[str, typer.Option("--sizes", help="Points of the banks, comma-separated.")] = "1000,10000,100000",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Search, disk, memory and the rate of filling as a bank on the embedded engine grows."""
    _run(lambda: _growth(whole_numbers(sizes, "--sizes", 1), Subject(init, device, dtype), codec), json_out, plot_out)


def training(
    rounds: Rounds = 5,
    init: Init = DEFAULT_INIT,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """Meta-training's tasks per second against the straightforward second-order loop."""
    _run(lambda: _training(rounds, Subject(init, device, dtype)), json_out, plot_out)


def speed(
    data: Set = None,
    limit: Annotated[int, typer.Option("--limit", min=16, help="Documents of the gradients.")] = 96,
    tokens: Tokens = "",
    sizes: Annotated[str, typer.Option("--sizes", help="Points of the growing banks.")] = "1000,10000,100000",
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_out: JsonOut = None,
    plot_out: PlotOut = None,
) -> None:
    """All of these but crossover and serving in one run, one after another, into one JSON."""
    check_outputs(json_out)
    check_plot(plot_out)
    counts, subject = whole_numbers(sizes, "--sizes", 1), Subject(init, device, dtype)
    result: dict[str, Any] = {"settings": _settings(subject, data), "figures": {}, "details": {}}

    def add(found: dict[str, Any]) -> None:
        result["figures"] |= found["figures"]
        result["details"] |= found["details"]
        console.print(_table(found["figures"]))
        write_json(json_out, result)  # a later part may be stopped

    add(_gradients(data, limit, subject))
    add(_query(data, 24, tokens, subject, codec))
    add(_batch(data, 5, 16, tokens, subject, codec))
    add(_grounding(data, 8, tokens, subject, codec))
    add(_training(5, subject))
    add(_growth(counts, subject, codec))
    _report(result, json_out, plot_out, shown=True)


COMMANDS = (gradients, query, batch, grounding, crossover, serving, growth, training, speed)


def _gradients(data: Path | None, limit: int, subject: Subject) -> dict[str, Any]:
    from regrad_loaders.bench.gradients import A_ROUND, bench_gradients

    texts = [passage.text for passage in _dataset(data).passages[:limit]]
    with progress("Gradients", len(texts) // A_ROUND) as advance:
        initialization = _initialization(subject)
        found = bench_gradients(
            initialization, lambda dtype: _load(dtype, subject, initialization), subject.dtype, texts, advance
        )
    return _result("gradients", found, subject, data)


def _query(data: Path | None, rounds: int, tokens: str, subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.query import bench_query

    with _bench(data, tokens, subject, codec) as bench, progress("Answers", rounds) as advance:
        return _result("query", bench_query(bench, rounds, advance), subject, data)


def _batch(data: Path | None, rounds: int, size: int, tokens: str, subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.query import bench_batch

    with _bench(data, tokens, subject, codec) as bench, progress("Batches", rounds) as advance:
        return _result("batch", bench_batch(bench, rounds, size, advance), subject, data)


def _grounding(data: Path | None, rounds: int, tokens: str, subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.grounding import bench_grounding

    with _bench(data, tokens, subject, codec) as bench, progress("Answers", 2 * rounds) as advance:
        questions = [question.question for question in bench.questions]
        found = bench_grounding(bench.regrad, questions, rounds, on_round=advance)
        return _result("grounding", found, subject, data)


def _crossover(data: Path | None, rounds: int, tokens: str, subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.crossover import bench_crossover

    with _bench(data, tokens, subject, codec) as bench, progress("Answers", rounds) as advance:
        return _result("crossover", bench_crossover(bench, codec, rounds, advance), subject, data)


def _serving(data: Path | None, counts: Sequence[int], seconds: float, subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.serving import BATCH, bench_serving

    with _bench(data, "", subject, codec) as bench, progress("Loads", len(counts) + (BATCH in counts)) as advance:
        questions = list(dict.fromkeys(question.question for question in bench.questions))
        return _result("serving", bench_serving(bench.regrad, questions, counts, seconds, advance), subject, data)


def _growth(sizes: Sequence[int], subject: Subject, codec: str) -> dict[str, Any]:
    from regrad_loaders.bench.growth import bench_growth

    with progress("Points", sum(sizes)) as advance:
        found = bench_growth(_initialization(subject).space.layout, codec, sizes, on_points=advance)
    return _result("growth", found, subject, None)


def _training(rounds: int, subject: Subject) -> dict[str, Any]:
    from regrad_loaders.bench.training import bench_training
    from regrad_loaders.data.episodes import EpisodeSource
    from regrad_loaders.data.facts import generate
    from regrad_loaders.training.meta_learner import MetaLearner

    initialization = _initialization(subject)
    model, tokenizer = _load(subject.dtype, subject, initialization)
    learner = MetaLearner(model, initialization, initialization.merge.rule)
    people = generate("train", PEOPLE, 1)
    source = EpisodeSource(people, people.questions, tokenizer, passage_tokens=112)
    with progress("Episodes", rounds) as advance:
        return _result("training", bench_training(learner, source, rounds, on_round=advance), subject, None)


@contextmanager
def _bench(data: Path | None, tokens: str, subject: Subject, codec: str) -> Iterator[Bench]:
    """A bank of the set's passages in a folder of its own, on the embedded engine."""
    import tempfile

    from regrad_loaders.bench.query import Bench
    from regrad_qdrant import GradientBank, ReGrad
    from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
    from regrad_qdrant.bank.stores.opening import open_store

    initialization = _initialization(subject)
    model, tokenizer = _load(subject.dtype, subject, initialization)
    chosen = _of_length(_dataset(data), tokens, tokenizer)
    with tempfile.TemporaryDirectory(prefix="regrad-bench-") as folder:
        bank = GradientBank(open_store("docs", path=Path(folder)), "docs", initialization.fingerprint)
        try:
            regrad = ReGrad(model, tokenizer, bank, initialization, codec=codec)
            add_corpus(bank, chosen.passages, regrad.gradients)
            with progress("Atoms", len(chosen.passages)) as advance:
                attach_atoms(bank, regrad.gradients, codec, on_progress=lambda points, _: advance(points))
            yield Bench(regrad, _load(subject.dtype, subject, initialization)[0], chosen.questions)
        finally:
            bank.close()


def _of_length(data: Dataset, tokens: str, tokenizer: Any) -> Dataset:
    """At most 120 passages of so many tokens, and the questions about them."""
    from dataclasses import replace

    low, _, high = tokens.partition("-")
    if tokens and not (low.isdigit() and high.isdigit()):
        raise DataError(f"--tokens wants two numbers such as 150-200, found {tokens!r}")
    fitting = [
        passage
        for passage in data.passages
        if not tokens or int(low) <= len(tokenizer(passage.text, verbose=False).input_ids) <= int(high)
    ][:120]
    keys = {passage.id for passage in fitting}
    questions = [question for question in data.questions if question.kind == "open" and keys & set(question.gold_ids)]
    if len(fitting) < 3 or not questions:
        found = f"{len(fitting)} passages of {tokens or 'any'} tokens and {len(questions)} open questions about them"
        raise DataError(f"{data.name} has {found}: too few")
    return replace(data, passages=fitting, questions=questions[:200])


def _dataset(data: Path | None) -> Dataset:
    from regrad_loaders.data.facts import generate
    from regrad_loaders.data.folders import read_folder

    return generate("demo", PEOPLE, 1) if data is None else read_folder(data)


def _initialization(subject: Subject) -> MetaInitialization:
    from regrad_qdrant.model.initialization import MetaInitialization

    return MetaInitialization.load(subject.init)


def _load(dtype: str, subject: Subject, initialization: MetaInitialization) -> tuple[Any, Any]:
    from regrad_qdrant.model.base_model import load_base_model

    return load_base_model(initialization.base.name, device=subject.device, dtype=dtype)


def _settings(subject: Subject, data: Path | None) -> dict[str, Any]:
    import torch

    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    command = shlex.join(["regrad-qdrant", *sys.argv[1:]])
    return {
        "command": command,
        "init": subject.init,
        "dtype": subject.dtype,
        "set": None if data is None else data.name,
        **machine,
    }


def _result(
    part: str, found: tuple[dict[str, Figure], dict[str, Any]], subject: Subject, data: Path | None
) -> dict[str, Any]:
    figures, details = found
    return {
        "settings": _settings(subject, data),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "details": {part: details},
    }


def _run(part: Callable[[], dict[str, Any]], json_out: Path | None, plot_out: Path | None) -> None:
    check_outputs(json_out)
    check_plot(plot_out)  # before the long work
    _report(part(), json_out, plot_out)


def _report(result: dict[str, Any], json_out: Path | None, plot_out: Path | None, *, shown: bool = False) -> None:
    if not shown:
        console.print(_table(result["figures"]))
    for part, details in result["details"].items():
        console.print(part, details, highlight=False)
    write_json(json_out, result)
    if plot_out is not None:
        from regrad_loaders.bench.figures import plot

        plot(result["figures"], plot_out)


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("figure", "median", "10 % … 90 %", "floor", "what the floor is"):
        table.add_column(heading, justify="left" if heading in ("figure", "what the floor is") else "right")
    for name, figure in figures.items():
        floor = "" if figure["floor"] is None else f"{figure['floor']:.3g}"
        spread = f"{figure['low']:.3g} … {figure['high']:.3g}"
        table.add_row(name, f"{figure['value']:.3g}", spread, floor, figure["floor_is"])
    return table
