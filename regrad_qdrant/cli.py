"""The command `regrad-qdrant`. Errors of use are one line and exit code 2; a partial failure is exit code 1."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regrad_qdrant.codec import CODECS, DEFAULT_CODEC
from regrad_qdrant.console import answers_table, console, errors, print_report, progress, scores_table
from regrad_qdrant.errors import DataError, RegradError
from regrad_qdrant.merge import RULES
from regrad_qdrant.record import DEFAULT_KEY

if TYPE_CHECKING:
    from regrad_loaders.ingest import IngestReport
    from regrad_qdrant.bank import GradientBank
    from regrad_qdrant.initialization import MetaInitialization
    from regrad_qdrant.pipeline import ReGrad
    from regrad_qdrant.store import Store

DEFAULT_INIT = "smollm2-135m-instruct"
DEFAULT_PATH = "./regrad_bank"
DEMO_PEOPLE, DEMO_QUESTIONS, DEMO_SEED = 60, 48, 1

app = typer.Typer(
    help="Retrievable gradients: documents as knowledge atoms in the payloads of a Qdrant collection, applied to a "
    "language model for one query.",
    epilog="Start with: regrad-qdrant demo. QDRANT_URL and QDRANT_API_KEY name a server as --url does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Collection = Annotated[str, typer.Option("--collection", "-c", help="Name of the Qdrant collection.")]
Url = Annotated[str | None, typer.Option("--url", help="A running Qdrant server, such as http://localhost:6333.")]
BankPath = Annotated[
    Path | None, typer.Option("--path", help=f"Folder of an embedded bank; {DEFAULT_PATH} where there is no server.")
]
Init = Annotated[str, typer.Option("--init", help="Meta-initialization: a shipped name, or a folder.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model; by default the one the initialization names.")]
Key = Annotated[str, typer.Option("--payload-key", help="The payload key that holds the atoms.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write what is reported as one JSON object to this file.")]
Using = Annotated[str | None, typer.Option("--using", help="Name of the vector to search; bm25 by default.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many documents to retrieve.")]
Dense = Annotated[
    str | None,
    typer.Option("--dense", help="sentence-transformers model for a dense vector named 'dense', beside bm25."),
]
Merge = Annotated[
    str | None, typer.Option("--merge", help=f"Merge rule instead of the trained one: {', '.join(RULES)}.")
]
CodecName = Annotated[str, typer.Option("--codec", help=f"How atoms are coded: {', '.join(CODECS)}.")]


@app.command()
def demo(
    path: Annotated[Path, typer.Option("--path", help="Folder of the demo's bank; kept for the next run.")] = Path(
        "regrad_bank"
    ),
    init: Init = DEFAULT_INIT,
    modes: Annotated[str, typer.Option("--modes", help="Comma-separated.")] = "direct,rag,regrad,regrad+icl,random",
    codec: CodecName = DEFAULT_CODEC,
    top_k: TopK = 3,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many questions.")] = DEMO_QUESTIONS,
    json_out: JsonOut = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", help="Write one JSON line an answer.")] = None,
) -> None:
    """A real model answers questions about invented people, from gradients in an embedded Qdrant bank."""
    from regrad_loaders.evaluate import evaluate, parse_modes, write_predictions
    from regrad_loaders.facts import generate

    chosen = parse_modes(modes)
    _check_outputs(json_out, predictions)
    world = generate("demo", DEMO_PEOPLE, DEMO_SEED, questions_per_person=1)
    questions = world.questions[:limit]
    initialization, model, tokenizer = _load(init, None)
    with _bank(_store("demo", None, path), initialization, DEFAULT_KEY, None) as bank:
        regrad = _regrad(model, tokenizer, bank, initialization, None)
        report = _ingest_corpus(regrad, world.passages, codec)
        status = bank.status()
        settings = {
            "command": "demo",
            "init": init,
            "base_model": initialization.base.name,
            "space": initialization.fingerprint,
            "modes": chosen,
            "top_k": top_k,
            "codec": status.codec,
            "merge": asdict(regrad.merge),
            "people": DEMO_PEOPLE,
            "seed": DEMO_SEED,
        }
        with progress("Answering", len(questions) * len(chosen)) as advance:
            result = evaluate(
                regrad, questions, chosen, top_k=top_k, settings=settings, on_progress=lambda _: advance(1)
            )
    console.print(answers_table(result, chosen))
    console.print(scores_table(result))
    console.print(
        f"{status.atoms} atoms in {path}/demo, {status.bytes_median} bytes each in the payload (codec {status.codec}); "
        + (
            f"computed now, {report.documents_per_second:.1f} documents/s"
            if report.atoms_written
            else "found in the bank, none computed"
        )
    )
    if predictions:
        write_predictions(result, predictions)
    _write_json(json_out, result.as_dict() | {"bank": status.as_dict(), "ingest": report.as_dict()})


@app.command()
def ingest(
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="corpus.jsonl: one object a line with id and text.")
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Collection to fill from --corpus.")
    ] = None,
    from_collection: Annotated[
        str | None, typer.Option("--from-collection", help="Attach atoms to the points of this collection, in place.")
    ] = None,
    text_path: Annotated[
        str, typer.Option("--text-path", help="Where payloads keep the text; dots descend, as in metadata.text.")
    ] = "text",
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    model: Model = None,
    codec: CodecName = DEFAULT_CODEC,
    dense: Dense = None,
    payload_key: Key = DEFAULT_KEY,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=16, help="Tokens in one gradient batch; lower it to save memory.")
    ] = 2048,
    json_out: JsonOut = None,
) -> None:
    """Compute and attach the knowledge atoms of a corpus, or of a collection that exists.

    Safe to stop and to start again: what is there is not computed twice.
    """
    from regrad_loaders.data import read_corpus
    from regrad_qdrant.codec import get_codec
    from regrad_qdrant.errors import BankError

    get_codec(codec)
    _check_outputs(json_out)
    if (corpus is None) == (from_collection is None):
        raise DataError("give either --corpus FILE with --collection NAME, or --from-collection NAME")
    if corpus is not None and collection is None:
        raise DataError("--corpus needs --collection NAME to fill")
    passages = read_corpus(corpus) if corpus is not None else None
    store = _store(str(collection or from_collection), url, path)
    if passages is None and not store.exists():
        raise BankError(f"there is no collection {from_collection!r} to attach atoms to")
    initialization, base, tokenizer = _load(init, model)
    with _bank(store, initialization, payload_key, dense, text_path) as bank:
        regrad = _regrad(base, tokenizer, bank, initialization, None)
        if passages is not None:
            report = _ingest_corpus(regrad, passages, codec, batch_tokens)
        else:
            report = _attach(regrad, codec, batch_tokens)
        status = bank.status()
    print_report(report)
    _write_json(json_out, report.as_dict() | {"status": status.as_dict()})
    if report.skipped:
        raise typer.Exit(1)


@app.command()
def status(
    collection: Collection,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    payload_key: Key = DEFAULT_KEY,
    text_path: Annotated[str, typer.Option("--text-path", help="Where payloads keep the text.")] = "text",
    json_out: JsonOut = None,
) -> None:
    """Points, atoms, missing and stale ones, and what an atom takes."""
    from regrad_qdrant.initialization import MetaInitialization

    initialization = MetaInitialization.load(init)
    with _bank(_existing(collection, url, path), initialization, payload_key, None, text_path) as bank:
        found = bank.status()
    table = Table("points", "atoms", "missing", "stale", "space", "codec", "bytes per atom, median", "max")
    table.add_row(*("–" if value is None else str(value) for value in asdict(found).values()))
    console.print(table)
    if found.missing or found.stale:
        console.print("Attach what is missing or stale with: regrad-qdrant ingest")
    _write_json(json_out, found.as_dict())


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    collection: Collection,
    mode: Annotated[
        str, typer.Option("--mode", "-m", help="direct, rag, regrad, regrad+icl, random or init.")
    ] = "regrad",
    top_k: TopK = 3,
    type: Annotated[str, typer.Option("--type", help="open, yesno or choice.")] = "open",
    choice: Annotated[list[str] | None, typer.Option("--choice", help="One of the choices; repeat it.")] = None,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    model: Model = None,
    using: Using = None,
    dense: Dense = None,
    merge: Merge = None,
    payload_key: Key = DEFAULT_KEY,
    text_path: Annotated[str, typer.Option("--text-path", help="Where payloads keep the text.")] = "text",
    json_out: JsonOut = None,
) -> None:
    """Answer one question from the bank."""
    from regrad_loaders.evaluate import parse_modes
    from regrad_qdrant.prompts import INSTRUCTIONS, Prompt

    [chosen] = parse_modes(mode)[:1]
    if type not in INSTRUCTIONS:
        raise DataError(f"type {type!r} is not one of {', '.join(INSTRUCTIONS)}")
    try:
        prompt = Prompt(question, type, tuple(choice or ()))  # type: ignore[arg-type] # checked above
    except ValueError as error:
        raise DataError(str(error)) from error
    store = _existing(collection, url, path)
    if chosen not in ("direct", "init"):
        _check_vector(store, using)
    initialization, base, tokenizer = _load(init, model)
    with _bank(store, initialization, payload_key, dense, text_path, using) as bank:
        regrad = _regrad(base, tokenizer, bank, initialization, merge)
        answer = regrad.answer(
            prompt.question, mode=chosen, top_k=top_k, type=prompt.type, choices=prompt.choices, using=using
        )
    console.print(answer.text, style="bold", markup=False)
    for hit in answer.hits:
        console.print(f"  {hit.score:8.3f}  {hit.document_id}  {hit.text[:90]!r}", markup=False, highlight=False)
    parts = "  ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in asdict(answer.timings).items())
    console.print(f"  {parts}  ({answer.prompt_tokens} prompt tokens)", style="dim")
    _write_json(
        json_out,
        {
            "question": question,
            "mode": answer.mode,
            "answer": answer.text,
            "hits": [{"id": hit.document_id, "score": hit.score, "text": hit.text} for hit in answer.hits],
            "timings": asdict(answer.timings),
            "prompt_tokens": answer.prompt_tokens,
        },
    )


@app.command("eval")
def evaluation(
    qa: Annotated[Path, typer.Option("--qa", help="qa.jsonl: one object a line with id, question and answers.")],
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="corpus.jsonl; a temporary bank is made of it.")
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", "-c", help="Use this bank instead of a temporary one.")
    ] = None,
    modes: Annotated[str, typer.Option("--modes", help="Comma-separated.")] = "direct,rag,regrad,regrad+icl,random",
    split: Annotated[str | None, typer.Option("--split", help="Only questions of this split.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N questions.")] = None,
    top_k: TopK = 3,
    filter_field: Annotated[
        str | None,
        typer.Option("--filter-field", help="Search only passages that share the question's value of this field."),
    ] = None,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    model: Model = None,
    codec: CodecName = DEFAULT_CODEC,
    using: Using = None,
    dense: Dense = None,
    merge: Merge = None,
    payload_key: Key = DEFAULT_KEY,
    text_path: Annotated[str, typer.Option("--text-path", help="Where payloads keep the text.")] = "text",
    json_out: JsonOut = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", help="Write one JSON line an answer.")] = None,
) -> None:
    """Answer a question file in several modes, side by side, and score the answers."""
    from regrad_loaders.data import read_corpus, read_questions
    from regrad_loaders.evaluate import evaluate, field_filter, parse_modes, select, write_predictions

    chosen = parse_modes(modes)
    _check_outputs(json_out, predictions)
    questions = select(read_questions(qa), split, limit)
    for question in questions:
        field_filter(question, filter_field)
    passages = read_corpus(corpus) if corpus is not None else None
    if passages is None and collection is None:
        raise DataError("give --corpus FILE, or --collection NAME of a bank that exists")
    with tempfile.TemporaryDirectory() as folder:
        if collection is not None:
            store = _store(collection, url, path) if passages is not None else _existing(collection, url, path)
        else:
            store = _store("eval", None, Path(folder))
        if store.exists():
            _check_vector(store, using)
        elif _vector(using) != "bm25" and dense is None:
            raise DataError(f"nothing makes the vector {using!r}: give --dense MODEL, or leave --using out")
        initialization, base, tokenizer = _load(init, model)
        with _bank(store, initialization, payload_key, dense, text_path, using) as bank:
            regrad = _regrad(base, tokenizer, bank, initialization, merge)
            report = _ingest_corpus(regrad, passages, codec) if passages is not None else None
            settings = {
                "command": "eval",
                "corpus": str(corpus) if corpus else None,
                "qa": str(qa),
                "split": split,
                "limit": limit,
                "modes": chosen,
                "top_k": top_k,
                "using": _vector(using),
                "dense": dense,
                "filter_field": filter_field,
                "collection": collection,
                "url": url,
                "path": str(path) if path else None,
                "payload_key": payload_key,
                "text_path": text_path,
                "init": init,
                "base_model": model or initialization.base.name,
                "space": initialization.fingerprint,
                "codec": bank.status().codec,
                "merge": asdict(regrad.merge),
            }
            with progress("Answering", len(questions) * len(chosen)) as advance:
                result = evaluate(
                    regrad,
                    questions,
                    chosen,
                    top_k=top_k,
                    using=using,
                    filter_field=filter_field,
                    settings=settings,
                    on_progress=lambda _: advance(1),
                )
    console.print(scores_table(result))
    if report is not None:
        print_report(report)
    if predictions:
        write_predictions(result, predictions)
    _write_json(json_out, result.as_dict())


@app.command()
def train(
    recipe: Annotated[Path, typer.Option("--recipe", help="YAML file that says everything about the run.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; runs/<recipe's name> by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Folder of the data, instead of the recipe's.")
    ] = None,
) -> None:
    """Meta-train an initialization for a base model: the gradients' own learning to be useful."""
    from dataclasses import replace

    from regrad_loaders.meta_train import run
    from regrad_loaders.recipe import Recipe
    from regrad_qdrant.base_model import load_base_model
    from regrad_qdrant.initialization import BaseModel

    settings = Recipe.load(recipe)
    if data_dir is not None:
        settings = replace(settings, data_dir=str(data_dir))
    folder = out or Path("runs") / settings.name
    if (folder / "checkpoint.pt").exists() and not resume:
        raise DataError(f"{folder} holds a checkpoint: go on from it with --resume, or choose another --out")
    for name, value in settings.as_dict().items():
        console.print(f"  {name:<24} {value}", highlight=False, markup=False)
    with console.status("Loading the base model"):
        model, tokenizer = load_base_model(settings.base_model)
    base = BaseModel.of(model, settings.base_model)
    with progress("Training", settings.steps) as advance:
        initialization = run(settings, model, tokenizer, base, folder, resume=resume, on_step=advance)
    console.print(
        f"{folder / 'initialization'}: space {initialization.fingerprint}, {initialization.space.numel} numbers an atom"
    )


@app.command()
def drop(
    collection: Collection,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    payload_key: Key = DEFAULT_KEY,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the atoms of an initialization from a collection, and nothing else."""
    from regrad_qdrant.initialization import MetaInitialization

    initialization = MetaInitialization.load(init)
    with _bank(_existing(collection, url, path), initialization, payload_key, None) as bank:
        count = bank.status().atoms
        if count and not yes and sys.stdin.isatty():
            typer.confirm(f"Remove {count} atoms of space {bank.space} from {collection!r}?", abort=True)
        removed = bank.drop()
    console.print(f"{removed} atoms removed from {collection!r}; texts, vectors and other fields are as they were")


def main() -> None:
    """Entry point: turns the library's errors into one line and exit code 2."""
    warnings.showwarning = lambda message, *_args, **_kwargs: errors.print(
        f"warning: {message}", style="yellow", markup=False
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, for their own callers
    try:
        app(standalone_mode=True)
    except RegradError as error:
        line = " ".join(str(error).split())
        errors.print(f"error: {line}", style="red", markup=False, soft_wrap=True, highlight=False)
        sys.exit(2)
    except SystemExit as stopped:
        if stopped.code == 130:  # what typer makes of Ctrl-C
            errors.print("stopped: start the same command again to go on", style="yellow")
        raise


# -- the parts that commands share ----------------------------------------------------------------------


def _store(collection: str, url: str | None, path: Path | None) -> Store:
    """The store that the options and the environment name."""
    from regrad_qdrant.store import open_store

    if url is not None and path is not None:
        raise DataError("give either --url or --path")
    if path is None:
        url = url or os.environ.get("QDRANT_URL") or None
    return open_store(collection, url=url, api_key=os.environ.get("QDRANT_API_KEY") or None, path=path or DEFAULT_PATH)


def _existing(collection: str, url: str | None, path: Path | None) -> Store:
    from regrad_qdrant.errors import BankError

    store = _store(collection, url, path)
    if not store.exists():
        raise BankError(
            f"there is no collection {collection!r}: make it with regrad-qdrant ingest, or check --url and --path"
        )
    return store


def _check_vector(store: Store, using: str | None) -> None:
    """Refuse a vector that the collection lacks, before the model is loaded."""
    from regrad_qdrant.errors import BankError

    present = store.vectors()
    if _vector(using) not in present:
        names = [name or "the unnamed one" for name in (*present.dense, *present.sparse)]
        raise BankError(
            f"collection {store.name!r} has no vector {_vector(using)!r}; it has {', '.join(names) or 'none'}: "
            "choose with --using NAME (and --dense MODEL for a dense one)"
        )


def _load(init: str, model: str | None) -> tuple[MetaInitialization, Any, Any]:
    from regrad_qdrant.base_model import load_base_model
    from regrad_qdrant.initialization import MetaInitialization

    initialization = MetaInitialization.load(init)
    with console.status(f"Loading {model or initialization.base.name}"):
        base, tokenizer = load_base_model(model or initialization.base.name)
    initialization.check_model(base)
    return initialization, base, tokenizer


@contextmanager
def _bank(
    store: Store,
    initialization: MetaInitialization,
    payload_key: str,
    dense: str | None,
    text_path: str = "text",
    using: str | None = None,
) -> Iterator[GradientBank]:
    from regrad_qdrant.bank import GradientBank
    from regrad_qdrant.embed import Bm25, DenseEmbedder, Embedder
    from regrad_qdrant.layouts import CORPUS, Layout

    embedders: dict[str, Embedder] = {"bm25": Bm25()}
    if dense is not None:
        embedders["dense" if using in (None, "bm25") else str(using)] = DenseEmbedder(dense)
    layout = CORPUS if text_path == CORPUS.text else Layout("given", text_path)
    bank = GradientBank(
        store, store.name, initialization.fingerprint, payload_key=payload_key, layout=layout, embedders=embedders
    )
    try:
        yield bank
    finally:
        bank.close()


def _regrad(
    model: Any, tokenizer: Any, bank: GradientBank, initialization: MetaInitialization, merge: str | None
) -> ReGrad:
    from dataclasses import replace

    from regrad_qdrant.pipeline import ReGrad

    try:
        rule = replace(initialization.merge, rule=merge) if merge else None
    except ValueError as error:
        raise DataError(str(error)) from error
    return ReGrad(model, tokenizer, bank, initialization, merge=rule, check_model=False)


def _ingest_corpus(regrad: ReGrad, passages: Any, codec: str, batch_tokens: int = 2048) -> IngestReport:
    from regrad_loaders.ingest import add_corpus

    with console.status("Adding passages"):
        added = add_corpus(regrad.bank, passages, regrad.gradients)
    report = _attach(regrad, codec, batch_tokens)
    report.points_added, report.points_updated = added
    return report


def _attach(regrad: ReGrad, codec: str, batch_tokens: int) -> IngestReport:
    from regrad_loaders.ingest import attach_atoms

    bank = regrad.bank
    with progress("Computing atoms", bank.store.count(bank.lacks_atom)) as advance:
        return attach_atoms(bank, regrad.gradients, codec, advance, batch_tokens=batch_tokens)


def _vector(using: str | None) -> str:
    return "bm25" if using is None else using


def _check_outputs(*paths: Path | None) -> None:
    """Refuse files that can't be written before the long work begins."""
    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise DataError(
                f"can't write {path}: there is no folder {path.parent} to write to, or it is a folder itself"
            )


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
