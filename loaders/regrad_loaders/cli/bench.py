"""`regrad-qdrant bench`: the measurements behind the numbers in the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regrad_loaders.cli.speed import COMMANDS
from regrad_qdrant.atoms.codecs.registry import CODECS, DEFAULT_CODEC
from regrad_qdrant.atoms.merge import RULES
from regrad_qdrant.cli.console import console, progress
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    CodecName,
    Device,
    Dtype,
    Init,
    JsonOut,
    check_outputs,
    check_plot,
    load,
    type_of,
    whole_numbers,
    write_json,
)
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_loaders.bench.atoms import Cell, Task, Times
    from regrad_loaders.bench.merge import Merged

FACTS_PEOPLE = 120

bench = typer.Typer(help="Measure: each command prints a table and writes a JSON and a plot.", no_args_is_help=True)


Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A folder with corpus.jsonl and qa.jsonl, FOLDER:TYPE for one type of its questions, or facts for "
        "the invented ones; repeat it.",
    ),
]
Inits = Annotated[list[str] | None, typer.Option("--init", help="Meta-initialization, so an atom space; repeat it.")]


@bench.command()
def atoms(
    sets: Sets = None,
    inits: Inits = None,
    codecs: Annotated[str, typer.Option("--codecs", help=f"Comma-separated, of {', '.join(CODECS)}.")] = (
        "fp32,int8,int4,int2,ternary,sign,sparse"
    ),
    top_k: Annotated[str, typer.Option("--top-k", "-k", help="Comma-separated.")] = "1,3,5,10",
    split: Annotated[str, typer.Option("--split", help="Which questions.")] = "dev",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions a set.")] = 100,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write the curve to this PNG or SVG file.")] = None,
) -> None:
    """Bytes an atom against F1: atom spaces × codecs × k, with intervals, paired against fp32 atoms."""
    from regrad_loaders.bench.atoms import BASELINE, AtomBench, plot, report
    from regrad_qdrant.atoms.codecs.registry import get_codec

    names, chosen = [name.strip() for name in codecs.split(",")], inits or [DEFAULT_INIT]
    for name in names:
        get_codec(name)
    ks = whole_numbers(top_k, "--top-k", 1)
    check_outputs(json_out)
    check_plot(plot_out)
    tasks = [_task(name, split, limit, max(ks)) for name in sets or ["facts"]]
    cells: list[Cell] = []
    times: list[Times] = []
    for name in chosen:
        initialization, model, tokenizer = load(name, None, device, dtype)
        measured = AtomBench(name, initialization, model, tokenizer)
        for task in tasks:
            passages = len({key for hits in task.hits for key in hits})
            with (
                progress(f"{name}, {task.name}: atoms", passages) as on_atoms,
                progress("Answering", len(ks) * len(dict.fromkeys(["fp32", *names]))) as on_cell,
            ):
                found, timed = measured.curve(task, names, ks, on_atoms, on_cell)
            cells += found
            times += timed
            console.print(_table(found, timed, task.name))
    settings = {"command": "bench atoms", "inits": chosen, "sets": sets or ["facts"], "codecs": names, "top_k": ks}
    result = report(cells, times, settings | {"split": split, "limit": limit, "dtype": type_of(model)})
    for init, codec in result["smallest"].items():
        said = f"the smallest codec surely within 1 F1 of fp32 atoms is {codec}"
        if codec == BASELINE:
            said = "no coarser codec of those run is surely within 1 F1 of fp32 atoms"
        console.print(f"{init}: {said}", highlight=False)
    for row in result["behind_the_first"]:
        points = " ({low:.1f} … {high:.1f})".format(**{end: 100 * value for end, value in row["f1"].items()})
        said = f"{row['init']}, {row['codec']}: {100 * row['f1']['mean']:.1f}{points} F1 behind {row['behind']}, fp32"
        console.print(said, highlight=False)
    write_json(json_out, result)
    if plot_out is not None:
        plot(cells, 3 if 3 in ks else ks[0], plot_out)


@bench.command()
def merge(
    sets: Sets = None,
    inits: Inits = None,
    rules: Annotated[str, typer.Option("--rules", help=f"Comma-separated, of {', '.join(RULES)}.")] = ",".join(RULES),
    top_k: Annotated[str, typer.Option("--top-k", "-k", help="Comma-separated: gold among hard negatives.")] = "3,5,10",
    noise: Annotated[
        str, typer.Option("--noise", help="Comma-separated: numbers of random documents added to the gold one.")
    ] = "3,9",
    codec: CodecName = DEFAULT_CODEC,
    split: Annotated[str, typer.Option("--split", help="Which questions.")] = "dev",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions a set.")] = 60,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
) -> None:
    """Interference: the gold passage alone, among what BM25 returns beside it, and among random documents.

    Of questions that have one gold passage.
    """
    from regrad_loaders.bench.atoms import AtomBench
    from regrad_loaders.bench.merge import Merged, documents, report, study
    from regrad_qdrant.atoms.codecs.registry import get_codec
    from regrad_qdrant.atoms.merge import MergeRule

    get_codec(codec)
    names = [name.strip() for name in rules.split(",")]
    if unknown := [name for name in names if name not in RULES]:
        raise DataError(f"--rules {unknown[0]}: choose from {', '.join(RULES)}")
    ks, counts = whole_numbers(top_k, "--top-k", 1), whole_numbers(noise, "--noise")
    if not ks:
        raise DataError("--top-k names no k")
    check_outputs(json_out)
    tasks = [_task(name, split, limit, max(ks), gold=True) for name in sets or ["facts"]]
    chosen, rows = inits or [DEFAULT_INIT], list[Merged]()
    for name in chosen:
        initialization, model, tokenizer = load(name, None, device, dtype)
        measured = AtomBench(name, initialization, model, tokenizer)
        temperature = initialization.merge.temperature
        for task in tasks:
            # The rules that the temperature was not learned for get it too: it is the only one there is.
            merges = [MergeRule(rule, temperature) for rule in names]
            ways = 1 + len(names) * (len([k for k in ks if k > 1]) + len(counts))
            with (
                progress(f"{name}, {task.name}: atoms", len(documents(task, ks, counts))) as on_atoms,
                progress("Answering", ways) as on_row,
            ):
                found = study(measured, task, codec, merges, ks, counts, on_atoms, on_row)
            rows += found
            console.print(_merge_table(found, name, task))
    settings = {"command": "bench merge", "inits": chosen, "sets": sets or ["facts"], "rules": names, "top_k": ks}
    settings |= {"noise": counts, "codec": codec, "split": split, "limit": limit, "dtype": type_of(model)}
    write_json(json_out, report(rows, settings))


def _merge_table(rows: list[Merged], init: str, task: Task) -> Table:
    table = Table(title=f"{init}; {task.name}, {len(task.questions)} questions")
    for heading in ("documents merged", "rule", "F1", "of gold alone"):
        table.add_column(heading, justify="right" if heading in ("F1", "of gold alone") else "left")
    for row in rows:
        said = row.among if row.documents == 1 else f"{row.documents}, {row.among}"
        share = f"{row.of_gold.mean:.2f} ({row.of_gold.low:.2f} … {row.of_gold.high:.2f})"
        table.add_row(said, row.rule, row.f1.in_percent(), share)
    return table


@bench.command()
def scores(
    sets: Sets = None,
    inits: Inits = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Documents merged for every question.")] = 3,
    dense: Annotated[
        str | None, typer.Option("--dense", help="A sentence-transformers model, whose own ranking is taken as well.")
    ] = None,
    codec: CodecName = DEFAULT_CODEC,
    split: Annotated[str, typer.Option("--split", help="Which questions.")] = "dev",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions a set.")] = 60,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
) -> None:
    """The same ranking with every kind of score: BM25, close cosines, distances, rank fusion, none."""
    from regrad_loaders.bench.atoms import AtomBench
    from regrad_loaders.bench.scores import KINDS, Scored, report, study
    from regrad_qdrant.atoms.codecs.registry import get_codec
    from regrad_qdrant.bank.embed import DenseEmbedder
    from regrad_qdrant.bank.relevance import DEPTH

    get_codec(codec)
    check_outputs(json_out)
    tasks = [_task(name, split, limit, max(top_k, DEPTH)) for name in sets or ["facts"]]
    chosen, rows = inits or [DEFAULT_INIT], list[Scored]()
    embedder = None if dense is None else DenseEmbedder(dense)
    for name in chosen:
        initialization, model, tokenizer = load(name, None, device, dtype)
        measured = AtomBench(name, initialization, model, tokenizer)
        for task in tasks:
            documents = len({key for hits in task.hits for key in list(hits)[:top_k]})
            with (
                progress(f"{name}, {task.name}: atoms", documents) as on_atoms,
                progress("Answering", len(KINDS) + 2 * (embedder is not None)) as on_row,
            ):
                found = study(measured, task, codec, top_k, embedder, on_atoms, on_row)
            rows += found
            table = Table(title=f"{name}; {task.name}, {len(task.questions)} questions, k = {top_k}")
            for heading in ("scores", "F1", "behind the same ranking with BM25's scores"):
                table.add_column(heading, justify="left" if heading == "scores" else "right")
            for row in found:
                table.add_row(row.kind, row.f1.in_percent(), row.behind.in_percent())
            console.print(table)
    settings = {"command": "bench scores", "inits": chosen, "sets": sets or ["facts"], "top_k": top_k, "dense": dense}
    settings |= {"codec": codec, "split": split, "limit": limit, "dtype": type_of(model)}
    write_json(json_out, report(rows, settings))


@bench.command()
def lengths(
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Questions a length.")] = 60,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
) -> None:
    """The same facts in texts of one sentence and of many: what the weight of short texts is worth."""
    from regrad_loaders.bench.atoms import AtomBench
    from regrad_loaders.bench.lengths import SENTENCES, report, study
    from regrad_qdrant.atoms.codecs.registry import get_codec

    get_codec(codec)
    check_outputs(json_out)
    initialization, model, tokenizer = load(init, None, device, dtype)
    with progress("Lengths", len(SENTENCES)) as advance:
        rows = study(AtomBench(init, initialization, model, tokenizer), limit, codec, advance)
    table = Table(title=f"{init}; {limit} questions about invented people, the right document alone")
    for heading in ("sentences", "tokens", "norm of the atom", "F1", "F1, atoms in full", "gain"):
        table.add_column(heading, justify="right")
    for row in rows:
        scores = (found.in_percent() for found in (row.f1, row.unweighted, row.gain))
        table.add_row(str(row.sentences), str(row.tokens), f"{row.norm:.2f}", *scores)
    console.print(table)
    settings = {"command": "bench lengths", "init": init, "codec": codec, "limit": limit, "dtype": type_of(model)}
    write_json(json_out, report(rows, settings))


@bench.command()
def positions(
    data: Annotated[Path, typer.Option("--data", help="Folder of a data set: corpus.jsonl and qa.jsonl.")],
    init: Init = DEFAULT_INIT,
    codec: CodecName = DEFAULT_CODEC,
    split: Annotated[str, typer.Option("--split", help="Only questions of this split.")] = "dev",
    limit: Annotated[int, typer.Option("--limit", min=4, help="Questions a length.")] = 48,
    window_tokens: Annotated[
        int | None, typer.Option("--window-tokens", min=8, help="Of a window; half of the initialization's max_length.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write F1 by position to this PNG or SVG.")] = None,
) -> None:
    """Questions about any part of long documents: an atom a window, their mean, or the document's beginning."""
    from regrad_loaders.bench.atoms import AtomBench
    from regrad_loaders.bench.positions import LENGTHS, WAYS, plot, report, study
    from regrad_loaders.data.folders import read_folder
    from regrad_loaders.evaluation.plan import select
    from regrad_qdrant.atoms.codecs.registry import get_codec

    get_codec(codec)
    check_outputs(json_out)
    check_plot(plot_out)
    dataset = read_folder(data)
    there = {passage.id for passage in dataset.passages}
    chosen = [question for question in select(dataset.questions, split) if question.kind == "open"]
    asked = [question for question in chosen if question.gold_ids and question.gold_ids[0] in there][:limit]
    if not asked:
        raise DataError(f"{data}: no open question of split {split!r} names a gold passage of its corpus")
    initialization, model, tokenizer = load(init, None, device, dtype)
    with progress("Lengths", len(LENGTHS)) as advance:
        rows = study(AtomBench(init, initialization, model, tokenizer), dataset, asked, codec, window_tokens, advance)
    table = Table(title=f"{init}; {len(asked)} questions of {dataset.name}, one document each")
    for heading in ("tokens", *WAYS):
        table.add_column(heading, justify="right")
    for tokens in LENGTHS:
        whole = {row.way: row.f1 for row in rows if row.tokens == tokens and row.part is None}
        table.add_row(str(tokens), *(whole[way].in_percent() for way in WAYS))
    console.print(table)
    settings = {"command": "bench positions", "init": init, "set": dataset.name, "split": split, "codec": codec}
    settings |= {"limit": limit, "window_tokens": window_tokens, "dtype": type_of(model)}
    write_json(json_out, report(rows, settings))
    if plot_out is not None:
        plot(rows, plot_out)


@bench.command()
def drift(
    data: Annotated[Path, typer.Option("--data", help="Folder of a data set: corpus.jsonl and qa.jsonl.")],
    other: Annotated[Path, typer.Option("--other", help="Another one, whose questions and texts should stay known.")],
    sizes: Annotated[
        str,
        typer.Option("--sizes", help="Documents taught by then, comma-separated; at least those that questions find."),
    ] = "200,500,1000",
    start: Annotated[
        Path | None,
        typer.Option("--start", help="What continued pre-training begins with: in a clone ft-direct by default."),
    ] = None,
    init: Init = DEFAULT_INIT,
    split: Annotated[str, typer.Option("--split", help="Only questions of this split.")] = "dev",
    sample: Annotated[int, typer.Option("--sample", min=2, help="Questions of each set, drawn at random.")] = 40,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
    plot_out: Annotated[Path | None, typer.Option("--plot", help="Write the curves to this PNG or SVG.")] = None,
) -> None:
    """Documents taught step by step, by continued pre-training and by a bank: what is known of them, and forgotten."""
    from regrad_loaders.bench.drift import Kept, plot, report, study
    from regrad_loaders.data.folders import read_folder
    from regrad_loaders.evaluation.plan import select
    from regrad_loaders.training.start import fresh_like
    from regrad_qdrant.model.initialization import MetaInitialization

    check_outputs(json_out)
    check_plot(plot_out)
    dataset, others = read_folder(data), read_folder(other)
    asked = select(dataset.questions, split, sample=sample)
    steps = sorted(size for size in whole_numbers(sizes, "--sizes") if size < len(dataset.passages))
    steps.append(min(len(dataset.passages), max(whole_numbers(sizes, "--sizes", 1))))
    initialization, model, tokenizer = load(init, None, device, dtype)
    begun = start or Path(__file__).parents[3] / "benchmarks" / "baselines" / "ft-direct"
    first = MetaInitialization.load(begun) if begun.is_dir() else fresh_like(model, initialization, "lora")
    first.check_model(model)
    kept = Kept(
        [question.question for question in select(others.questions, None, sample=sample) if question.kind == "open"],
        [passage.text for passage in others.passages[: 2 * sample]],
    )
    with progress("Teaching", len(steps)) as advance:
        rows = study(model, tokenizer, initialization, first, dataset.passages, asked, kept, steps, advance)
    unrelated = f"{len(kept.questions)} questions and {len(kept.texts)} texts of {others.name}"
    table = Table(title=f"{len(asked)} questions of {dataset.name}; {unrelated} should stay as they were")
    for heading in ("documents", "way", "F1", "other answers unchanged", "perplexity of other text"):
        table.add_column(heading, justify="right")
    for row in rows:
        same, perplexity = f"{100 * row.unchanged:.0f}", f"{row.perplexity:.1f}"
        table.add_row(str(row.documents), row.way, row.f1.in_percent(), same, perplexity)
    console.print(table)
    settings = {"command": "bench drift", "init": init, "start": str(begun), "set": dataset.name, "other": others.name}
    settings |= {
        "split": split,
        "sample": sample,
        "sizes": sorted({row.documents for row in rows[1:]}),
        "dtype": type_of(model),
    }
    write_json(json_out, report(rows, settings))
    if plot_out is not None:
        plot(rows, plot_out)


@bench.command()
def paper(
    table: Annotated[
        str,
        typer.Option("--table", help="main, adapters, atoms, noise, protocol, drift, domains or settings."),
    ],
    data: Annotated[Path, typer.Option("--data", help="Folder of data sets.")] = Path("../shared/data"),
    sets: Annotated[
        str | None, typer.Option("--sets", help="Of them, comma-separated; by default the table's.")
    ] = None,
    sample: Annotated[int, typer.Option("--sample", min=2, help="Questions of each set, drawn at random.")] = 80,
    init: Init = DEFAULT_INIT,
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder of what was measured.")] = Path("benchmarks/paper"),
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTIONS]",
            help="What each run is given beside its own options, such as -- --ft-direct FOLDER --ft-rag FOLDER for a "
            "model of your own.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """One of the paper's tables on your data: runs what has not been run, and goes on where it was stopped."""
    from regrad_loaders.bench.paper import carry_out, runs

    names = [name.strip() for name in sets.split(",")] if sets else None
    todo = runs(table, data, names, sample, out, init, dtype, more or ())
    carry_out(todo, lambda line: console.print(line, markup=False))


for command in COMMANDS:
    bench.command()(command)


def _task(name: str, split: str, limit: int, depth: int, *, gold: bool = False) -> Task:
    """A set's questions; with `gold` those alone that have one gold passage, which the corpus holds."""
    from regrad_loaders.bench.atoms import Task
    from regrad_loaders.data.facts import generate
    from regrad_loaders.data.folders import read_folder
    from regrad_loaders.evaluation.plan import select

    if name == "facts":
        world = generate("demo", FACTS_PEOPLE, 1, questions_per_person=1)
        return Task.of(world, world.questions[:limit], depth)
    folder, _, of_type = name.partition(":")
    dataset = read_folder(Path(folder))
    chosen = select(dataset.questions, split, of_type=of_type or None)
    if gold:
        there = {passage.id for passage in dataset.passages}
        chosen = [question for question in chosen if len(question.gold_ids) == 1 and question.gold_ids[0] in there]
        if not chosen:
            raise DataError(f"{name}: no question of split {split!r} names one gold passage (gold_ids) of its corpus")
    return Task.of(dataset, chosen[:limit], depth, f"{dataset.name}:{of_type}" if of_type else dataset.name)


def _table(cells: list[Cell], times: list[Times], task: str) -> Table:
    ks = sorted({cell.top_k for cell in cells})
    table = Table(title=f"{cells[0].init}, {cells[0].numel:,} numbers an atom ({cells[0].space}); {task}: F1, 0 to 100")
    for heading in ("codec", "bytes", *(f"k = {k}" for k in ks), "loss to fp32, all k", "cosine", "encode", "decode 3"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for time in times:
        row: list[Any] = [cell for cell in cells if cell.codec == time.codec]
        table.add_row(
            time.codec,
            f"{row[0].bytes_per_atom:,}",
            *(cell.f1.in_percent() for cell in row),
            f"{100 * sum(cell.loss_to_fp32.mean for cell in row) / len(row):+.1f}",
            f"{row[0].cosine:.2f}",
            f"{time.encode:.1f} ms, {100 * time.encode_share:.1f} %",
            f"{time.decode_sum:.1f} ms, {100 * time.decode_share:.1f} %",
        )
    table.caption = (
        f"encode is of one atom, beside its gradient's {times[0].gradient:.0f} ms; decode 3 sums three records, beside "
        f"one answer's {times[0].generate:.0f} ms"
    )
    return table
