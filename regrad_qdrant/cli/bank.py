"""The commands that keep a bank: status, recode, migrate and drop."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from regrad_qdrant.atoms.record import DEFAULT_KEY
from regrad_qdrant.cli.console import console, errors, progress
from regrad_qdrant.cli.options import (
    DEFAULT_INIT,
    DEFAULT_PATH,
    BankPath,
    CodecName,
    Collection,
    Init,
    JsonOut,
    Key,
    Sidecar,
    TextPath,
    Url,
    bank_of,
    check_outputs,
    existing_store,
    store_of,
    write_json,
)
from regrad_qdrant.errors import DataError


def status(
    collection: Collection,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    text_path: TextPath = None,
    json_out: JsonOut = None,
) -> None:
    """Points, atoms, missing and stale ones, and what an atom takes."""
    from regrad_qdrant.bank.ingest import check_texts
    from regrad_qdrant.model.initialization import MetaInitialization

    check_outputs(json_out)
    initialization = MetaInitialization.load(init)
    with bank_of(
        existing_store(collection, url, path), initialization, payload_key, None, text_path, sidecar=sidecar
    ) as bank:
        if text_path is not None:
            check_texts(bank)
        found = bank.status()
        others = bank.count_of_other_spaces() if found.missing else 0
    table = Table("points", "atoms", "missing", "stale", "space", "codec", "bytes per atom, median", "max")
    shown = (found.points, found.atoms, found.missing, found.stale, found.space, found.codec)
    table.add_row(*("–" if value is None else str(value) for value in (*shown, found.bytes_median, found.bytes_max)))
    console.print(table)
    if found.without_text:
        console.print(f"{found.without_text} points have no text, so no atom", highlight=False)
    if found.damaged:
        console.print(f"{found.damaged} atoms are damaged: regrad-qdrant ingest computes them again", highlight=False)
    if found.orphans:
        console.print(
            f"{found.orphans} atoms in the sidecar belong to documents that are gone: regrad-qdrant drop removes them "
            "with the others",
            highlight=False,
        )
    if others:
        console.print(
            f"{others} points carry atoms of another initialization under {payload_key!r}: name it with --init",
            highlight=False,
        )
    if found.missing or found.stale:
        given = {"--url": url, "--path": path, "--init": init, "--payload-key": payload_key, "--sidecar": sidecar}
        usual = {"--init": DEFAULT_INIT, "--payload-key": DEFAULT_KEY}
        named = [(name, str(value)) for name, value in given.items() if value is not None and value != usual.get(name)]
        command = ["regrad-qdrant", "ingest", "--from-collection", collection, *itertools.chain(*named)]
        console.print(f"Attach what is missing or stale with: {shlex.join(command)}", highlight=False, soft_wrap=True)
    write_json(json_out, found.as_dict())


def recode(
    collection: Collection,
    codec: CodecName,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    json_out: JsonOut = None,
) -> None:
    """Bring the atoms of a collection to a coarser codec, in place and without the model.

    Safe to stop and to start again. What the coarser codec leaves out can't be brought back but by ingesting anew.
    """
    from regrad_qdrant.atoms.codecs.registry import get_codec
    from regrad_qdrant.bank.upkeep import count_finer
    from regrad_qdrant.model.initialization import MetaInitialization

    get_codec(codec)
    check_outputs(json_out)
    initialization = MetaInitialization.load(init)
    layout = initialization.space.layout
    store = existing_store(collection, url, path)
    with bank_of(store, initialization, payload_key, None, "text", sidecar=sidecar) as bank:  # no text is needed
        before = bank.status()
        with progress("Recoding", count_finer(bank, codec, layout)) as advance:
            report = bank.recode(codec, layout, advance)
        after = bank.status()
    console.print(
        f"{report.recoded} atoms recoded, {before.atoms - report.recoded - len(report.failed)} were as coarse already, "
        f"{len(report.failed)} failed; {before.bytes_median} bytes an atom before, {after.bytes_median} now (median)",
        highlight=False,
    )
    for key, reason in list(report.failed.items())[:20]:
        errors.print(f"left as it was: {key}: {reason}", style="yellow", markup=False)
    sizes = {
        when: {name: found.as_dict()[name] for name in ("atoms", "codec", "bytes_per_atom")}
        for when, found in (("before", before), ("after", after))
    }
    write_json(json_out, asdict(report) | sizes)
    if report.failed:
        raise typer.Exit(1)


def migrate(
    collection: Collection,
    url: Url = None,
    path: BankPath = None,
    to_url: Annotated[str | None, typer.Option("--to-url", help="The server to copy to.")] = None,
    to_path: Annotated[
        Path | None, typer.Option("--to-path", help="The folder of the embedded bank to copy to.")
    ] = None,
    to_api_key: Annotated[
        str | None,
        typer.Option(
            "--to-api-key", envvar="QDRANT_TO_API_KEY", help="Of that server, where it differs from QDRANT_API_KEY."
        ),
    ] = None,
    to_collection: Annotated[
        str | None, typer.Option("--to-collection", help="Name of the copy; the same name by default.")
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Copy a collection with its atoms between an embedded folder and a server, point by point, and verify it.

    Safe to stop and to start again. Nothing is removed from the source; copy a sidecar by its own name.
    """
    from regrad_qdrant.bank.migrate import migrate as copy
    from regrad_qdrant.bank.place import sidecars_of

    check_outputs(json_out)
    if (to_url is None) == (to_path is None):
        raise DataError("give either --to-url or --to-path")
    name = to_collection or collection
    at = url or (os.environ.get("QDRANT_URL") if path is None else None)
    folders = [place.resolve() if place else None for place in (path or Path(DEFAULT_PATH), to_path)]
    if name == collection and (at == to_url if at else folders[0] == folders[1]):
        raise DataError("source and target are the same collection")
    source = existing_store(collection, url, path)
    target = store_of(name, to_url, to_path, to_api_key)
    sidecars = sidecars_of(source)
    try:
        with progress("Copying", source.count()) as advance:
            report = copy(source, target, advance)
    finally:
        source.close()
        target.close()
    console.print(
        f"{report.points} points: {report.written} written, {report.present} there already, "
        f"{len(report.differing)} not as they were",
        highlight=False,
    )
    for setting in report.left_out:
        console.print(f"not copied, for the target's engine does not hold it: {setting}", highlight=False, markup=False)
    for sidecar in sidecars:
        named = "" if name == collection else ", and name its copy wherever the copy is used (--sidecar NAME)"
        console.print(f"its atoms are in {sidecar!r}: migrate that too{named}", highlight=False, markup=False)
    write_json(json_out, asdict(report))
    if report.differing:
        errors.print(f"differing: {report.differing[:20]}", style="yellow", markup=False)
        raise typer.Exit(1)


def drop(
    collection: Collection,
    url: Url = None,
    path: BankPath = None,
    init: Init = DEFAULT_INIT,
    payload_key: Key = DEFAULT_KEY,
    sidecar: Sidecar = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the atoms of an initialization from a collection, and nothing else."""
    from regrad_qdrant.model.initialization import MetaInitialization

    initialization = MetaInitialization.load(init)
    store = existing_store(collection, url, path)
    with bank_of(store, initialization, payload_key, None, "text", sidecar=sidecar) as bank:
        count = bank.count_atoms()
        if count and not yes:
            if not sys.stdin.isatty():
                raise DataError(f"drop removes {count} atoms: give --yes where there is no terminal to ask on")
            typer.confirm(f"Remove {count} atoms of space {bank.space} from {collection!r}?", abort=True)
        others = bank.count_of_other_spaces()  # while there is an index to count by
        removed = bank.drop()
    console.print(f"{removed} atoms removed from {collection!r}; texts, vectors and other fields are as they were")
    if others:
        console.print(f"{others} points carry atoms of another initialization, which stay", highlight=False)
