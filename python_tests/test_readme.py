"""The README's examples run as printed: every python block is executed, every command is called."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


# The first is the main job, which the tests of the demo run whole: here with two epochs and without Neural Cleanse.
_SHORT = {"epochs=20": "epochs=2", '"nc", ': ""}


@pytest.mark.parametrize(
    ("number", "short"),
    [(0, True), pytest.param(0, False, marks=pytest.mark.slow), *((n, False) for n in range(1, len(blocks("python"))))],
)
def test_python_example_runs(number: int, short: bool, tmp_path: Path) -> None:
    script, text = tmp_path / "example.py", blocks("python")[number]
    for printed, instead in _SHORT.items() if short else ():
        assert printed in text
        text = text.replace(printed, instead)
    script.write_text(text)
    done = run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_main_job_takes_at_most_twelve_lines() -> None:
    code = [line for line in blocks("python")[0].splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 12


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("bbfast")])
def test_command_runs(command: str, tmp_path: Path) -> None:
    done = run(shlex.split(command), tmp_path)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    targets = [shlex.split(c)[1] for c in commands() if c.startswith("make")]
    assert targets == ["demo", "test"]
    for target in targets:
        done = run(["make", "-n", target], ROOT)
        assert done.returncode == 0, done.stderr


def test_every_command_is_known() -> None:
    assert {shlex.split(c)[0] for c in commands()} == {"make", "bbfast"}
