"""`regrad-qdrant bench`: the measurements behind the numbers in the documentation."""

from __future__ import annotations

import typer

bench = typer.Typer(help="Measure: each command writes a JSON, a table and a plot.", no_args_is_help=True)
