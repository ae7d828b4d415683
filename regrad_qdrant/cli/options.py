"""Options that several commands share, and what they open: stores, banks, models."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from regrad_qdrant.atoms.codecs.registry import CODECS
from regrad_qdrant.atoms.merge import RULES, MergeRule
from regrad_qdrant.cli.console import console, progress
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.corpus import Passage
    from regrad_qdrant.bank.ingest import IngestReport
    from regrad_qdrant.bank.stores.base import Store
    from regrad_qdrant.model.initialization import MetaInitialization
    from regrad_qdrant.model.prompts import Style

DEFAULT_INIT = "smollm2-135m-instruct"
DEFAULT_ICL_INIT = "smollm2-135m-instruct-icl"  # trained with the passages in the prompt
DEFAULT_PATH = "./regrad_bank"

Collection = Annotated[str, typer.Option("--collection", "-c", help="Name of the Qdrant collection.")]
Url = Annotated[str | None, typer.Option("--url", help="A running Qdrant server, such as http://localhost:6333.")]
BankPath = Annotated[
    Path | None, typer.Option("--path", help=f"Folder of an embedded bank; {DEFAULT_PATH} where there is no server.")
]
Init = Annotated[str, typer.Option("--init", help="Meta-initialization: a shipped name, or a folder.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model; by default the one the initialization names.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1 or mps; auto takes an accelerator where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of the base model's weights: float32, bfloat16, float16, nf4 (4 bits), or auto: the checkpoint's own; "
        "on a processor that multiplies 16 bits no faster, float32.",
    ),
]
AnswerStyle = Annotated[str, typer.Option("--style", help="Of answers to open questions: short, or sentence.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt",
        help="JSON file of another prompt than the initialization was trained with, which its answers will miss.",
    ),
]
Key = Annotated[str, typer.Option("--payload-key", help="The payload key that holds the atoms.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write what is reported as one JSON object to this file.")]
Using = Annotated[
    list[str] | None,
    typer.Option(
        "--using",
        help="Name of the vector to search, bm25 by default; repeat it for a hybrid search. text:FIELD is that field's "
        "text index (Qdrant 1.20).",
    ),
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many documents to retrieve.")]
Batch = Annotated[
    int, typer.Option("--batch", min=1, help="Questions answered together; less memory with fewer, the same answers.")
]
Dense = Annotated[
    str | None,
    typer.Option(
        "--dense",
        help="sentence-transformers model of the dense vector that --using names ('' is the unnamed one), or else of "
        "one named 'dense', beside bm25. package:NAME/FOLDER is one that an installed package carries.",
    ),
]
Merge = Annotated[
    str | None, typer.Option("--merge", help=f"Merge rule instead of the trained one: {', '.join(RULES)}.")
]
Sidecar = Annotated[
    str | None,
    typer.Option(
        "--sidecar",
        help="Keep the atoms in this collection beside the documents' (same ids, no vectors); later commands find it.",
    ),
]
TextPath = Annotated[
    str | None,
    typer.Option(
        "--text-path",
        help="Where payloads keep the text, such as metadata.text; found by itself for LangChain, LlamaIndex, "
        "Haystack, mcp-server-qdrant and plain payloads.",
    ),
]
CodecName = Annotated[str, typer.Option("--codec", help=f"How atoms are coded: {', '.join(CODECS)}.")]


def store_of(collection: str, url: str | None, path: Path | None, api_key: str | None = None) -> Store:
    """The store that the options and the environment name; the API key is QDRANT_API_KEY's where none is given."""
    from regrad_qdrant.bank.stores.opening import open_store

    if url is not None and path is not None:
        raise DataError("give either --url or --path")
    if path is None:
        url = url or os.environ.get("QDRANT_URL") or None
    api_key = api_key or os.environ.get("QDRANT_API_KEY") or None
    return open_store(collection, url=url, api_key=api_key, path=path or DEFAULT_PATH)


def existing_store(collection: str, url: str | None, path: Path | None) -> Store:
    from regrad_qdrant.errors import BankError

    store = store_of(collection, url, path)
    if not store.exists():
        address = None if path else url or os.environ.get("QDRANT_URL")
        where = f"at {address}" if address else f"in the folder {path or DEFAULT_PATH}"
        raise BankError(
            f"there is no collection {collection!r} {where}: make it with regrad-qdrant ingest, or check --url or "
            "--path"
        )
    return store


def check_vector(store: Store, using: list[str] | None, dense: str | None = None) -> None:
    """Refuse a vector that the collection lacks, and a model of a vector that is not searched, before one is loaded."""
    from regrad_qdrant.bank.stores.base import TEXT_INDEX
    from regrad_qdrant.errors import BankError

    present = store.vectors()
    if dense is not None and not set(vector_names(using)) - {"bm25"}:
        names = ", ".join(f"--using {name or repr('')}" for name in present.dense) or "it has none"
        raise BankError(f"--dense {dense}: no dense vector is searched; name the one of {store.name!r}: {names}")
    for name in vector_names(using):
        if name in present or name.startswith(TEXT_INDEX):
            continue
        by_model = [f"--using {other or repr('')} --dense MODEL" for other in present.dense]
        ways = [*by_model, *(f"--using {other}" for other in present.sparse)]
        raise BankError(
            f"collection {store.name!r} has no vector {name!r}; search one that it has with "
            f"{', or '.join(ways) or 'none: it has no vectors'}"
        )


def load(
    init: str, model: str | None, device: str = "auto", dtype: str = "auto"
) -> tuple[MetaInitialization, Any, Any]:
    from regrad_qdrant.model.base_model import input_device, load_base_model, multiplies_16_bits_faster
    from regrad_qdrant.model.initialization import MetaInitialization

    initialization = MetaInitialization.load(init)
    with console.status(f"Loading {model or initialization.base.name}"):
        base, tokenizer = load_base_model(model or initialization.base.name, device=device, dtype=dtype)
    initialization.check_model(base)
    if dtype in ("bfloat16", "float16") and input_device(base).type == "cpu" and not multiplies_16_bits_faster():
        console.print(
            f"This processor multiplies in {dtype} more slowly than in float32, up to a hundred times: --dtype auto "
            "takes what is faster",
            style="yellow",
            highlight=False,
        )
    return initialization, base, tokenizer


@contextmanager
def bank_of(
    store: Store,
    initialization: MetaInitialization,
    payload_key: str,
    dense: str | None,
    text_path: str | None = None,
    using: list[str] | None = None,
    sidecar: str | Literal[False] | None = None,
    id_field: str | None = None,
    language: str | None = None,
) -> Iterator[GradientBank]:
    from regrad_qdrant.bank.assembly import assembled

    bank = assembled(
        store,
        initialization.fingerprint,
        payload_key=payload_key,
        dense=dense,
        text_path=text_path,
        using=using,
        sidecar=sidecar,
        language=language,
    )
    try:
        if id_field is not None:
            bank.name_documents_by(id_field)
        yield bank
    finally:
        bank.close()


def regrad_of(
    model: Any,
    tokenizer: Any,
    bank: GradientBank,
    initialization: MetaInitialization,
    merge: str | None,
    **options: Any,
) -> ReGrad:
    """With the merge rule of that name instead of the trained one; options as those of `ReGrad`."""
    from regrad_qdrant.answer.pipeline import ReGrad

    rule = replace(initialization.merge, rule=merge) if merge else None
    return ReGrad(model, tokenizer, bank, initialization, merge=rule, check_model=False, **options)


def ingest_corpus(regrad: ReGrad, passages: Any, codec: str, **options: Any) -> IngestReport:
    """Add the passages and attach their atoms; options as those of `attach_atoms`."""
    from regrad_qdrant.bank.ingest import add_corpus, check_others

    check_others(regrad.bank, replace=options.get("replace", False))
    with console.status("Adding passages"):
        added = add_corpus(regrad.bank, passages, regrad.gradients)
    report = attach(regrad, codec, **options)
    report.points_added, report.points_updated = added
    return report


def add_passages(bank: GradientBank, passages: Iterable[Passage]) -> tuple[int, int]:
    """Add or update passages without their atoms, also those whose text can have none; returns how many of each."""
    from regrad_qdrant.bank.documents import Document

    with console.status("Adding passages"):
        return bank.sync(Document(passage.id, passage.payload) for passage in passages)


def attach(regrad: ReGrad, codec: str, **options: Any) -> IngestReport:
    from regrad_qdrant.bank.ingest import attach_atoms

    bank = regrad.bank
    with progress("Computing atoms", bank.store.count() - bank.count_atoms()) as advance:
        return attach_atoms(bank, regrad.gradients, codec, advance, **options)


def collection_summary(bank: GradientBank) -> str:
    """What a collection that exists holds, in one line."""
    vectors = bank.store.vectors()
    dense = [f"{name or 'the unnamed one'} ({size})" for name, size in vectors.dense.items()]
    lacks = {name: ", without the IDF modifier that BM25 needs" for name in vectors.without_idf}
    sparse = [f"{name} (sparse{lacks.get(name, '')})" for name in vectors.sparse]
    return f"{bank.store.name}: {bank.store.count()} points, {bank.layout}, vectors {', '.join(dense + sparse)}"


def vector_names(using: list[str] | None) -> list[str]:
    return using or ["bm25"]


def warn_of_codec(codec: str, initialization: MetaInitialization) -> None:
    """Say so where atoms are coded as no training has seen them."""
    if codec != "fp32" and codec not in initialization.trained_codecs:
        console.print(
            f"Trained through {', '.join(initialization.trained_codecs)}, not through {codec}: what atoms do may "
            "change; compare with regrad-qdrant eval --codec",
            style="yellow",
            highlight=False,
        )


def check_merge(rule: str | None) -> None:
    """Refuse a merge rule that is none, before the model is loaded."""
    if rule is not None:
        MergeRule(rule)


def check_outputs(*paths: Path | None) -> None:
    """Refuse files that can't be written before the long work begins."""
    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise DataError(
                f"can't write {path}: there is no folder {path.parent} to write to, or it is a folder itself"
            )


def check_plot(path: Path | None) -> None:
    """Refuse a plot that can't be drawn before the long work begins."""
    check_outputs(path)
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DataError(f"can't draw {path}: name a file that ends in .png, .svg or .pdf")
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise DataError("drawing a plot needs matplotlib: pip install 'regrad-qdrant[loaders]'")


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def type_of(model: Any) -> str:
    """The type that a model computes in, as --dtype names it."""
    return str(model.dtype).removeprefix("torch.")


def style_of(name: str) -> Style:
    """The style that --style names.

    Raises:
        DataError: if it names none.
    """
    from regrad_qdrant.model.prompts import STYLES

    found = next((known for known in STYLES if known == name), None)
    if found is None:
        raise DataError(f"style {name!r} is not one of {', '.join(STYLES)}")
    return found


def whole_numbers(text: str, option: str, least: int = 0) -> list[int]:
    """The positive numbers of a comma-separated option, rising, at least so many.

    Raises:
        DataError: for anything else.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",")} if text.strip() else set())
    except ValueError:
        numbers = [0]
    if (numbers and numbers[0] < 1) or len(numbers) < least:
        raise DataError(f"{option} wants positive whole numbers with commas between, found {text!r}")
    return numbers
