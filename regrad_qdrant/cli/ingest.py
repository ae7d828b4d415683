"""The command that fills a bank: `regrad-qdrant ingest`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal

from regrad_qdrant.atoms.codecs.registry import DEFAULT_CODEC
from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import console, print_report, progress
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    BankPath,
    CodecName,
    Dense,
    Device,
    Dtype,
    Init,
    JsonOut,
    Key,
    Model,
    Sidecar,
    TextPath,
    Url,
    add_passages,
    attach,
    bank_of,
    check_outputs,
    collection_summary,
    existing_store,
    ingest_corpus,
    load,
    regrad_of,
    store_of,
    warn_of_codec,
    write_json,
)
from regrad_qdrant.errors import DataError

if TYPE_CHECKING:
    from regrad_qdrant.answer.pipeline import ReGrad
    from regrad_qdrant.bank.bank import GradientBank
    from regrad_qdrant.bank.cluster import Cluster
    from regrad_qdrant.bank.corpus import Passage
    from regrad_qdrant.bank.ingest import IngestReport
    from regrad_qdrant.bank.shard import Shard
    from regrad_qdrant.bank.upkeep import BankStatus
    from regrad_qdrant.model.gradients import EncodedDocument, GradientComputer
    from regrad_qdrant.model.initialization import MetaInitialization

IN_PLACE = 20_000  # points from which a sidecar is the better place for atoms
WHY_SIDECAR = (
    "a server copies and indexes anew every point that gets an atom in place, so from 20,000 points a collection of "
    "their own is twice as fast, at 100,000 eight times"
)
WHY_SHARD_KEYS = "this collection is sharded by keys of its own, which every write would have to name"
HAYSTACK_ADVICE = (
    "Haystack hands on the whole payload as a document's meta, and writes it back when a document is edited: a sidecar "
    "keeps atoms out of it (--sidecar NAME)"
)
SAMPLE = 8  # documents whose atoms a rehearsal computes


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
    gradients: Annotated[
        Path | None,
        typer.Option(
            "--gradients",
            help="With --from-collection: folder of .pt files, one a document and named by its id, with the gradients "
            "of the LoRA tensors of --init; nothing is computed.",
        ),
    ] = None,
    text_path: TextPath = None,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    codec: CodecName = DEFAULT_CODEC,
    dense: Dense = None,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Keep the atoms in the points of a server's large collection too, where a sidecar is the default.",
        ),
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=16, help="Tokens in one gradient batch; lower it to save memory.")
    ] = 2048,
    long_texts: Annotated[
        str,
        typer.Option(
            "--long-texts",
            help="A text over the initialization's max_length: window (an atom of each window, of which a question "
            "chooses), truncate or skip it.",
        ),
    ] = "window",
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over atoms of another initialization under the same payload key.")
    ] = False,
    language: Annotated[
        str | None,
        typer.Option("--language", help="Of BM25's words: german, japanese, …; english where none is noted yet."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Only the points whose id hashes to I, 0 to N-1: one of N processes that need not know each other.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Compute on a Ray cluster: its address, auto for the one that is there, or local for one on this "
            "machine.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Of --ray: processes that hold the model.")] = 1,
    gpus_per_worker: Annotated[
        float, typer.Option("--gpus-per-worker", min=0, help="Of --ray: what Ray sets aside for each; 0.5 shares one.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written and how long it would take; change nothing.")
    ] = False,
    json_out: JsonOut = None,
) -> None:
    """Compute and attach the knowledge atoms of a corpus, or of a collection that exists.

    Safe to stop and to start again: what is there is not computed twice.
    """
    from regrad_qdrant.bank.cluster import Cluster
    from regrad_qdrant.bank.corpus import read_corpus
    from regrad_qdrant.bank.embed import Bm25
    from regrad_qdrant.bank.ingest import check_options
    from regrad_qdrant.bank.shard import Shard
    from regrad_qdrant.model.initialization import MetaInitialization

    check_options(codec, long_texts)
    check_outputs(json_out)
    if (corpus is None) == (from_collection is None):
        raise DataError("give either --corpus FILE with --collection NAME, or --from-collection NAME")
    if from_collection is not None and collection is not None:
        raise DataError("--collection goes with --corpus; --from-collection names the collection that gets atoms")
    if corpus is not None and collection is None:
        raise DataError("--corpus needs --collection NAME to fill")
    if in_place and sidecar is not None:
        raise DataError("give either --sidecar NAME or --in-place")
    if ray is None and (workers != 1 or gpus_per_worker):
        raise DataError("--workers and --gpus-per-worker go with --ray")
    of_shard = None if shard is None else Shard.parse(shard)
    if of_shard is not None and corpus is not None:
        raise DataError("--shard goes with --from-collection: the points must be there for their ids to be shared out")
    options: dict[str, Any] = {
        "batch_tokens": batch_tokens, "long_texts": long_texts, "replace": replace, "shard": of_shard,
    }  # fmt: skip
    passages = read_corpus(corpus) if corpus is not None else None
    if language is not None:
        Bm25(language).query("")  # refused before a collection is made
    opened = store_of if passages is not None else existing_store
    store = opened(str(from_collection if collection is None else collection), url, path)
    place: str | Literal[False] | None = False if in_place else sidecar
    if gradients is not None:
        if passages is not None or ray is not None or of_shard is not None or dry_run:
            raise DataError("--gradients goes with --from-collection, and without --ray, --shard and --dry-run")
        made = MetaInitialization.load(init)
        with bank_of(store, made, payload_key, dense, text_path, sidecar=place, language=language) as bank:
            report = _from_files(bank, made, gradients, codec, replace)
            status = bank.status()
        _tell(report, status, json_out)
        return
    if ray is not None:
        if shard is not None or dry_run:
            raise DataError("--ray shares the work out by itself: without --shard; --dry-run goes without --ray")
        cluster = Cluster(ray, workers, gpus_per_worker)
        made = MetaInitialization.load(init)
        del options["shard"]
        with bank_of(store, made, payload_key, dense, text_path, sidecar=place, language=language) as bank:
            warn_of_codec(codec, made)
            if passages is None and not in_place:
                _choose_place(bank, replace, dry_run=False)
            _on_cluster(bank, made, passages, (init, model, device, dtype), url, codec, cluster, options, json_out)
        return
    initialization, base, tokenizer = load(init, model, device, dtype)
    with bank_of(store, initialization, payload_key, dense, text_path, sidecar=place, language=language) as bank:
        if passages is None:
            console.print(collection_summary(bank), highlight=False, markup=False)
        regrad = regrad_of(base, tokenizer, bank, initialization, None)
        warn_of_codec(codec, initialization)
        if passages is None and not in_place:
            _choose_place(bank, replace, dry_run)
        if dry_run:
            _rehearse(regrad, passages, codec, options, json_out)
            return
        if passages is not None:
            report = ingest_corpus(regrad, passages, codec, **options)
        else:
            report = attach(regrad, codec, **options)
        status = bank.status()
    _tell(report, status, json_out, passages)


def _from_files(
    bank: GradientBank, initialization: MetaInitialization, folder: Path, codec: str, replace: bool
) -> IngestReport:
    from regrad_qdrant.bank.gradient_files import gradient_files, put_gradients

    files = gradient_files(folder)
    with progress("Writing atoms", len(files)) as advance:
        return put_gradients(bank, initialization, files, codec, advance, replace=replace)


def _tell(
    report: IngestReport, status: BankStatus, json_out: Path | None, passages: list[Passage] | None = None
) -> None:
    print_report(report)
    if passages is not None and (others := status.points - len(passages)) > 0:
        console.print(
            f"{others} other points of the collection stay, and are found as before (GradientBank.remove takes "
            "documents out)",
            highlight=False,
        )
    write_json(json_out, report.as_dict() | {"status": status.as_dict()})
    if report.skipped:
        raise typer.Exit(1)


def _on_cluster(
    bank: GradientBank,
    initialization: MetaInitialization,
    passages: list[Passage] | None,
    model: tuple[str, str | None, str, str],
    url: str | None,
    codec: str,
    cluster: Cluster,
    options: dict[str, Any],
    json_out: Path | None,
) -> None:
    """The same by the workers of a cluster.

    Args:
        model: --init, --model, --device, --dtype: each worker loads it.
    """
    from regrad_qdrant.bank.cluster import attach_on_cluster, load_gradients
    from regrad_qdrant.bank.ingest import check_others

    added = (0, 0)
    if passages is not None:
        check_others(bank, replace=options["replace"])
        bank.create()
        added = add_passages(bank, passages)
    here = cluster.workers if cluster.address == "local" else 1
    load = functools.partial(load_gradients, *model, here)
    with progress("Computing atoms", bank.store.count() - bank.count_atoms()) as advance:
        report = attach_on_cluster(bank, initialization, load, _opening(bank, url), codec, cluster, advance, **options)
    report.points_added, report.points_updated = added
    console.print(
        f"{report.workers} workers, which had nothing to do {report.waiting:.0%} of the time; {report.restarts} "
        "batches begun anew",
        highlight=False,
    )
    _tell(report, bank.status(), json_out, passages)


def _opening(bank: GradientBank, url: str | None) -> Callable[[], GradientBank] | None:
    """How another process opens the bank; None where only this one can."""
    from regrad_qdrant.bank.cluster import open_bank

    address = url or os.environ.get("QDRANT_URL") or None
    if not bank.store.copies_points or address is None:
        return None
    return functools.partial(
        open_bank,
        bank.store.name,
        bank.space,
        url=address,
        api_key=os.environ.get("QDRANT_API_KEY") or None,
        payload_key=bank.payload_key,
        layout=bank.layout,
        sidecar=bank.atoms.name if bank.in_sidecar else False,
    )


def _choose_place(bank: GradientBank, replace: bool, dry_run: bool) -> None:
    """A sidecar for a server's collection that takes no writes in place, or that is large and has no atoms yet; advice
    where atoms are in place. Those of another space that are to be replaced are replaced where they are."""
    if bank.in_sidecar:
        return
    apart, large = bank.store.has_shard_keys, bank.store.copies_points and bank.store.count() >= IN_PLACE
    if apart or large:
        name, why = f"{bank.store.name}-regrad", WHY_SHARD_KEYS if apart else WHY_SIDECAR
        if not bank.count_atoms() and not (replace and bank.notes_other_spaces()):
            bank.keep_atoms_in(name)
            bank.check_place()
            if dry_run or bank.note_sidecar():
                console.print(f"Atoms go into the sidecar {name!r}: {why} (--in-place overrides)", highlight=False)
                return
            bank.keep_atoms_in(None)  # this server would not tell readers where they are
        console.print(f"Consider --sidecar {name}: {why}", highlight=False)
    if bank.layout.name == "Haystack":
        console.print(HAYSTACK_ADVICE, highlight=False)


def _rehearse(
    regrad: ReGrad, passages: list[Passage] | None, codec: str, options: dict[str, Any], json_out: Path | None
) -> None:
    """What an ingestion with these options would do, from counts and a measured sample; nothing is written."""
    from regrad_qdrant.atoms.record import make_records
    from regrad_qdrant.bank.ingest import check_others, check_passages, check_texts
    from regrad_qdrant.bank.stores.base import json_bytes

    bank, there = regrad.bank, regrad.bank.store.exists()
    check_passages(bank, passages or [], regrad.gradients)
    if there:
        bank.check_place()
        check_texts(bank)
        check_others(bank, replace=options["replace"], index=False)
    found = bank.status() if there else None
    new, reworded = _changes(bank, passages or []) if there else (passages or [], 0)
    todo = len(new) + reworded + (found.missing + found.stale + found.damaged if found else 0)
    shard: Shard | None = options["shard"]
    if shard is not None:
        todo = math.ceil(todo / shard.count)
    lacking = (hit.text for hit in bank.missing()) if there else iter(())
    like = itertools.chain(lacking, (passage.text for passage in [*new, *(passages or [])])) if todo else iter(())
    sample = _sampled(_able(regrad.gradients, like, options["long_texts"]))
    texts, windows = [text for text, _ in sample], [of_text for _, of_text in sample]
    seconds, size = 0.0, 0
    if texts:
        started = time.perf_counter()
        flat = [window for of_text in windows for window in of_text]
        atoms = regrad.gradients.atoms_in_batches(flat, options["batch_tokens"])
        seconds = (time.perf_counter() - started) / len(texts)
        spans = [[window.span for window in of_text] for of_text in windows]
        records = make_records(atoms, texts, bank.space, codec, regrad.gradients.space.layout, spans)
        size = sum(json_bytes(record.to_payload()) for record in records) // len(texts)
    remarks = bank.store.remarks() if there else []
    said = {
        "collection": bank.store.name,
        "atoms_into": bank.atoms.name,
        "points_to_add": len(new),
        "atoms_to_write": todo,
        "status": found.as_dict() if found else None,
        "bytes_to_write": todo * size,
        "seconds": todo * seconds,
        "remarks": remarks,
    }
    console.print(
        f"dry run: {len(new)} points to add, {todo} atoms to write into {bank.atoms.name!r} under "
        f"{bank.payload_key!r}, {decimal(todo * size)}, about {todo * seconds / 60:.1f} minutes at {seconds:.2f} s a "
        f"document (from {len(texts)} of them); nothing was changed",
        highlight=False,
    )
    for remark in remarks:
        console.print(remark, highlight=False, markup=False)
    write_json(json_out, said)


def _sampled(able: Iterable[tuple[str, list[EncodedDocument]]]) -> list[tuple[str, list[EncodedDocument]]]:
    """The first of the documents, as many as make a sample, of long ones fewer."""
    sample: list[tuple[str, list[EncodedDocument]]] = []
    for text, windows in able:
        if sample and sum(len(of_text) for _, of_text in sample) + len(windows) > 2 * SAMPLE:
            break
        sample.append((text, windows))
        if len(sample) == SAMPLE:
            break
    return sample


def _able(
    gradients: GradientComputer, texts: Iterable[str], long_texts: str
) -> Iterator[tuple[str, list[EncodedDocument]]]:
    """Those of the texts that can have a gradient, with what it is computed from."""
    from regrad_qdrant.bank.ingest import windows_of

    for text in texts:
        with contextlib.suppress(DataError):
            if windows := windows_of(gradients, text, long_texts):
                yield text, windows


def _changes(bank: GradientBank, passages: list[Passage]) -> tuple[list[Passage], int]:
    """The passages that the collection lacks, and how many atoms the other ones' changed texts would make stale."""
    from regrad_qdrant.bank.collection import PAGE
    from regrad_qdrant.bank.documents import point_id
    from regrad_qdrant.bank.stores.base import pages

    new: list[Passage] = []
    stale = 0
    for page in pages(passages, PAGE):
        given = {point_id(passage.id): passage for passage in page}
        there = bank.fetch(list(given), with_records=False)
        known = {hit.id for hit in there}
        new += [passage for key, passage in given.items() if key not in known]
        stale += bank.count_current([hit.id for hit in there if hit.text != given[hit.id].text])
    return new, stale
