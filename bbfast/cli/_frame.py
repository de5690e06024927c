"""What every command shares: options for logs and tracebacks, one line for an error, and the exit status.

A command's function raises whatever goes wrong; the frame turns it into one line on stderr and a status: 1 for a
failure, 2 for wrong usage, 130 when it was interrupted. ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import logging
import math
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from bbfast.errors import BBFastError

__all__ = ["FAILED", "INTERRUPTED", "USAGE", "UsageFailure", "command", "emit_json", "note", "screen", "usage"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130
PLAIN_WIDTH = 110
"""Columns of a table that is not written to a terminal: wide enough for every column of the demo's."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Messages")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what is being done.", rich_help_panel="Messages")]


class UsageFailure(BBFastError):
    """The command line asks for something that does not exist: a name, a setting, a value out of range."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Errors inside are the command line's fault: they end the command with status 2 instead of 1."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise UsageFailure(_message(error)) from error


def command(
    app: typer.Typer, name: str, *, examples: str = "", resume: str = ""
) -> Callable[[Callable[..., None]], None]:
    """Decorator: add a function to ``app`` as the command ``name``, with the shared options and error handling.

    Args:
        app: Where the command is added.
        name: What the user types.
        examples: Command lines shown under the help text, one a line.
        resume: What an interrupted user is told about going on.
    """

    def decorate(function: Callable[..., None]) -> None:
        @functools.wraps(function)
        def framed(*, debug: bool, verbose: bool, **options: Any) -> None:
            with _messages(debug, verbose), _status(name, debug, resume):
                function(**options)

        shown = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=False) for n, a in _SHARED]
        hints = typing.get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters.values()
        every = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shown
        framed.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        framed.__annotations__ = {p.name: p.annotation for p in every}
        app.command(name, help=_paragraphs(function), epilog=_epilog(examples))(framed)

    return decorate


def screen(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr; tables keep their columns when the output goes to a file."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def note(text: str) -> None:
    """One line on stderr about what is being done."""
    screen(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


def emit_json(value: Any) -> None:
    """Write ``value`` to stdout as JSON; numbers that JSON does not have (NaN, infinity) become null."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


_SHARED = (("verbose", Verbose), ("debug", Debug))


def _paragraphs(function: Callable[..., None]) -> str:
    """The docstring with its line breaks gone: the terminal's width breaks lines, not the source's."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))


def _epilog(examples: str) -> str | None:
    lines = [line.strip() for line in examples.strip().splitlines()]
    # A blank line between two lines is what keeps them apart in the help text.
    return "\n\n".join(["Examples:", *lines]) if lines else None


@contextlib.contextmanager
def _status(name: str, debug: bool, resume: str) -> Iterator[None]:
    """Turn what a command raises into one line on stderr and an exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _say(f"interrupted: {name} was stopped; {resume or 'nothing was left half done'}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise
        if debug:
            traceback.print_exc()
        _say(f"error: {_message(error)}")
        raise typer.Exit(USAGE if isinstance(error, UsageFailure) else FAILED) from error


def _message(error: BaseException) -> str:
    """One line about ``error``; one that was not foreseen also names its type and how to see more."""
    # A KeyError's text is its key in quotes; a file error's text already names the file.
    text = " ".join(str(error).split())
    if isinstance(error, BBFastError | ValueError | TypeError | IndexError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text[:300] or 'no message'} (--debug shows where)"


def _say(line: str) -> None:
    typer.echo(line, err=True)


@contextlib.contextmanager
def _messages(debug: bool, verbose: bool) -> Iterator[None]:
    """Show the library's log records and Python's warnings on stderr while a command runs."""
    logger, handler = logging.getLogger("bbfast"), _Stderr()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


class _Stderr(logging.Handler):
    """Log records as single lines on what stderr is at that moment (a progress display replaces it while it runs)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _say(f"{record.levelname.lower()}: {record.getMessage()}")
        except Exception:
            self.handleError(record)
