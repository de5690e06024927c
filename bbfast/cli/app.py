"""The ``bbfast`` command: its sub-commands, each in a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from bbfast._version import __version__
from bbfast.cli import analyze, attack, bench, defend, demo, doctor, evaluate, info, listing, report, study
from bbfast.cli._frame import INTERRUPTED

__all__ = ["app", "main"]

app = typer.Typer(
    name="bbfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [cyan]bbfast demo[/cyan]; [cyan]bbfast COMMAND --help[/cyan] shows examples.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bbfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Backdoor-learning research: attacks, defenses and their evaluation."""


for _module in (demo, attack, defend, evaluate, analyze, study, bench, report, listing, info, doctor):
    _module.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        app(args=arguments, prog_name="bbfast")
    except KeyboardInterrupt:
        # Outside a command (while modules are imported, say), where the frame is not there to catch it.
        sys.exit(INTERRUPTED)
