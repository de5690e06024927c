from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from bbfast.cli._frame import FAILED, INTERRUPTED, USAGE, UsageFailure, command, emit_json, usage
from bbfast.errors import ArtifactError, UnknownNameError


def _run(body: Callable[[], None], *arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        """So that the one command below keeps its name."""

    @command(app, "work", resume="run it again to go on")
    def work() -> None:
        """Work."""
        body()

    return CliRunner().invoke(app, ["work", *arguments])


def _raise(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ArtifactError("folder x is damaged;\n remake it"), FAILED, "error: folder x is damaged; remake it"),
        (ValueError("ratio must lie in (0, 1], got 2"), FAILED, "error: ratio must lie in (0, 1], got 2"),
        (UsageFailure("no such thing"), USAGE, "error: no such thing"),
        (
            UnknownNameError("attack", "badnts", ["badnets"]),
            FAILED,
            "error: unknown attack 'badnts'; did you mean 'badnets'?",
        ),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), FAILED, "No such file or directory: 'x.npz'"),
        (RuntimeError("boom"), FAILED, "error: RuntimeError: boom (--debug shows where)"),
        (KeyError("k"), FAILED, "error: KeyError: 'k' (--debug shows where)"),
        (MemoryError(), FAILED, "error: MemoryError: no message (--debug shows where)"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted: work was stopped; run it again to go on"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_and_a_status(error: BaseException, status: int, line: str) -> None:
    result = _run(_raise(error))
    assert result.exit_code == status
    assert line in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_adds_the_traceback() -> None:
    result = _run(_raise(ValueError("broken")), "--debug")
    assert result.exit_code == FAILED
    assert "Traceback" in result.stderr and result.stderr.rstrip().endswith("error: broken")


def test_usage_turns_bad_names_and_values_into_wrong_usage_only_inside() -> None:
    def body() -> None:
        with usage():
            raise UnknownNameError("attack", "x", ["y"])

    assert _run(body).exit_code == USAGE
    assert _run(lambda: None, "--no-such-option").exit_code == USAGE


def test_log_records_and_warnings_are_lines_on_stderr() -> None:
    def body() -> None:
        logging.getLogger("bbfast.some.part").warning("watch %s", "out")
        logging.getLogger("bbfast.some.part").info("by the way")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\nthing", stacklevel=1)

    quiet, chatty = _run(body), _run(body, "-v")
    assert quiet.stderr == "warning: watch out\nwarning: old thing\n" and quiet.stdout == ""
    assert "info: by the way\n" in chatty.stderr


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("bbfast")
    before = (logger.level, logger.propagate, list(logger.handlers), warnings.showwarning)
    _run(_raise(ValueError("x")), "-v")
    assert (logger.level, logger.propagate, list(logger.handlers), warnings.showwarning) == before


def test_json_is_strict_and_takes_what_results_hold(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"a": math.nan, "b": [math.inf, 1.5], "c": torch.tensor([1, 2]), "d": (True, None), 3: {"z", "y"}})
    out = json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert out == {"a": None, "b": [None, 1.5], "c": [1, 2], "d": [True, None], "3": ["y", "z"]}
