"""The command `regrad-qdrant`. Errors of use are one line and exit code 2; a partial failure is exit code 1.

The commands that need no more than this package stand in `bank` and `ask`; the others come by the entry point group
`regrad_qdrant.commands`, whose members are functions or `typer.Typer`s.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer

from regrad_qdrant import __version__
from regrad_qdrant.cli.ask import ask
from regrad_qdrant.cli.bank import drop, migrate, recode, status
from regrad_qdrant.cli.console import errors
from regrad_qdrant.cli.ingest import ingest
from regrad_qdrant.cli.models import models
from regrad_qdrant.cli.serve import serve
from regrad_qdrant.errors import MissingExtraError, RegradError

GROUP = "regrad_qdrant.commands"
UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    help="Retrievable gradients: documents as knowledge atoms in the payloads of a Qdrant collection, applied to a "
    "language model for one query.",
    epilog="Start with: regrad-qdrant demo. QDRANT_URL and QDRANT_API_KEY name a server as --url does.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add(point: EntryPoint) -> None:
    """Add a command of another package; where an extra is missing, one that says which."""
    try:
        command = point.load()
    except MissingExtraError as error:
        app.command(point.name, help=f"Not installed: {error}", context_settings=UNREAD)(_refusing(error))
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=point.name)
    else:
        app.command(point.name)(command)


def _refusing(error: MissingExtraError) -> Callable[[], Any]:
    def command() -> None:
        raise error

    return command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


for _command in (ingest, status, ask, serve, recode, migrate, drop, models):
    app.command()(_command)
for _point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
    _add(_point)


def main() -> None:
    """Entry point: turns the library's errors into one line and exit code 2."""
    warnings.showwarning = lambda message, *_args, **_kwargs: errors.print(
        f"warning: {message}", style="yellow", markup=False, soft_wrap=True
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, for their own callers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a package that nothing here needs
    try:
        app(standalone_mode=True)
    except RegradError as error:
        line = " ".join(str(error).split())
        errors.print(f"error: {line}", style="red", markup=False, soft_wrap=True, highlight=False)
        sys.exit(2)
    except SystemExit as stopped:
        if stopped.code == 130:  # what typer makes of Ctrl-C
            errors.print("stopped: start the same command again to go on (train with --resume)", style="yellow")
        raise
