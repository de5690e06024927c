from __future__ import annotations

import io
import sys

import pytest

from bbfast import _progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.bar("training", 3) as bar:
        bar.advance()
        bar.show({"loss": 0.5})
    with _progress.bar("training", 3, progress=False) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    assert _progress.wanted(None) and not _progress.wanted(False)
    with _progress.bar("training [x]", 4) as bar:
        bar.advance(3)
        bar.show({"epoch": "1/2", "loss": 0.123456, "c_acc": 0.9})
    text = terminal.getvalue()
    for part in ("training [x]", "75%", "epoch 1/2", "loss 0.1235", "c_acc 0.9000"):
        assert part in text


def test_standard_output_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.bar("training", 2, progress=True) as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == "" and "training" in captured.err


def test_a_bar_within_a_bar_joins_its_display(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.bar("outer", 2, progress=True) as outer:
        with _progress.bar("inner", 5, progress=True, done=2) as inner:
            inner.advance()
            display = inner._display
            assert display is not None and display is outer._display and len(display.tasks) == 2
            assert display.tasks[1].completed == 3
        assert len(display.tasks) == 1
    with _progress.bar("next", 1, progress=True) as after:
        assert after._display is not display


def test_an_error_ends_the_display() -> None:
    with pytest.raises(KeyboardInterrupt), _progress.bar("outer", 2, progress=True):
        raise KeyboardInterrupt
    with _progress.bar("again", 2, progress=True) as bar:
        assert bar._display is not None and len(bar._display.tasks) == 1
