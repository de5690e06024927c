"""Every script of examples/ runs as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "loader_in_a_training_loop.py": "epoch 3: training accuracy",
    "statistics_from_a_hook.py": "128 channels, 5680 values each",
    "trigger_in_a_pipeline.py": "of class [0]",
}


def test_every_example_is_run():
    # The quick start is the README's example, and its test runs it.
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED) | {"quickstart.py"}


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_the_example_runs(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout
