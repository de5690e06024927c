"""What a run that is killed, interrupted or started twice leaves: nothing is lost, nothing half-written is seen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bbfast import artifact

ROOT = Path(__file__).parents[1]
# Enough that a signal sent after the first one arrives long before the last one, on a busy machine too.
EPOCHS = 8
FIGURES = ("c_acc", "asr", "r_acc", "poison_ratio")


def _start(out: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bbfast.cli", "attack", "badnets", "--dataset", "digits", "--model", "small_cnn"]
    command += ["--preset", "quick", "--epochs", str(EPOCHS), "--deterministic", "--out", str(out), "--json", *extra]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        # Small steps on a shared machine: a second thread would mostly wait.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    value = json.loads(out)
    assert isinstance(value, dict)
    return value, err


def _wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    """Until the first checkpoint is whole: a manifest under the work folder."""
    deadline = time.monotonic() + 120
    while not list(out.glob(".work/*/**/last/manifest.json")):
        assert process.poll() is None, f"ended early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


def _visible(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if not p.name.startswith("."))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    start = time.monotonic()
    result = _finish(_start(tmp_path_factory.mktemp("undisturbed")))[0]
    return {**result, "wall": time.monotonic() - start}


@pytest.fixture(scope="module")
def weights(undisturbed: dict[str, Any]) -> bytes:
    return (Path(undisturbed["folder"]) / "model.safetensors").read_bytes()


def _check(result: dict[str, Any], undisturbed: dict[str, Any], weights: bytes) -> None:
    assert {key: result[key] for key in FIGURES} == {key: undisturbed[key] for key in FIGURES}
    assert (Path(result["folder"]) / "model.safetensors").read_bytes() == weights
    assert Path(result["folder"]).name == Path(undisturbed["folder"]).name


def test_killed_at_random_moments_ends_as_if_never_killed(
    undisturbed: dict[str, Any], weights: bytes, tmp_path: Path
) -> None:
    draw = random.Random(0)
    for _ in range(2):
        process = _start(tmp_path)
        # Anywhere between the start of Python and the end of the training; most of it is training.
        time.sleep(draw.uniform(0.2, 0.9) * undisturbed["wall"])
        process.kill()
        process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        # A process killed late may have published its result just before: then that must be whole.
        for name in _visible(tmp_path):
            artifact.read(tmp_path / name, verify=True)
    result, _ = _finish(_start(tmp_path))
    _check(result, undisturbed, weights)


def test_killed_after_a_checkpoint_goes_on_from_it(undisturbed: dict[str, Any], weights: bytes, tmp_path: Path) -> None:
    process = _start(tmp_path)
    _wait_for_checkpoint(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and _visible(tmp_path) == []
    result, err = _finish(_start(tmp_path, "--verbose"))
    assert "going on where an interrupted run stopped" in err and "going on after epoch" in err
    _check(result, undisturbed, weights)
    assert not list(tmp_path.glob(".work/*")), "the checkpoints go when the result is there"


def test_two_processes_make_one_result(undisturbed: dict[str, Any], weights: bytes, tmp_path: Path) -> None:
    both = [_start(tmp_path) for _ in range(2)]
    results = [_finish(process) for process in both]
    assert sorted(result["reused"] for result, _ in results) == [False, True]
    for result, _ in results:
        _check(result, undisturbed, weights)
    assert len(_visible(tmp_path)) == 1


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(undisturbed: dict[str, Any], weights: bytes, tmp_path: Path) -> None:
    process = _start(tmp_path)
    _wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in err and out == ""
    assert _visible(tmp_path) == []
    _check(_finish(_start(tmp_path))[0], undisturbed, weights)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle of the result."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from bbfast.cli import main\n"
        "main(sys.argv[1:])"
    )
    arguments = [
        "attack",
        "badnets",
        "--dataset",
        "digits",
        "--model",
        "small_cnn",
        "--epochs",
        "0",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and str(tmp_path) in done.stderr
    assert _visible(tmp_path) == []
