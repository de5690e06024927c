from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.errors import ArtifactError
from bbfast.training import Batch, EpochInfo, Program, Recipe, TrainResult, train
from bbfast.training.checkpoint import Checkpoint, Checkpoints

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]
EPOCHS = 4
DUE = Checkpoints.due


class CrashError(Exception):
    pass


class CrashAt:
    """Stops the run after an epoch, before its checkpoint."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, info: EpochInfo) -> None:
        if info.epoch == self.epoch:
            raise CrashError


class Momentum(Program):
    """Draws from torch's generator, and carries a tensor from epoch to epoch into the loss."""

    def start(self, *args: Any) -> None:
        super().start(*args)
        self.memory = torch.zeros(3)

    def make_batch(self, batch: Batch) -> Batch:
        return batch.replace(x=batch.x + 0.1 * torch.randn_like(batch.x))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.x) + self.memory
        self.memory = 0.9 * self.memory + 0.1 * logits.detach().mean(0)
        return nn.functional.cross_entropy(logits, batch.y), logits

    def state(self) -> dict[str, Tensor]:
        return {"memory": self.memory}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.memory = tensors["memory"]


@pytest.fixture(autouse=True)
def _every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    # In earnest checkpoints are spaced so that they cost little; here every epoch gets one.
    monkeypatch.setattr(Checkpoints, "due", lambda self, last: self.active)


def outcome(result: TrainResult) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]
    return rows, {name: value.clone() for name, value in result.model.state_dict().items()}


def assert_same(a: TrainResult, b: TrainResult) -> None:
    (rows_a, weights_a), (rows_b, weights_b) = outcome(a), outcome(b)
    assert rows_a == rows_b
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


@pytest.mark.parametrize("crash", range(EPOCHS))
@pytest.mark.parametrize(
    ("changes", "program"),
    [
        ({"optimizer": "sgd", "schedule": "onecycle"}, None),
        ({"optimizer": "adam", "schedule": "plateau", "patience": 0, "lr": 0.01}, Momentum),
    ],
)
def test_interrupted_runs_end_with_the_same_bits(
    make_set: MakeSet,
    make_net: MakeNet,
    recipe: Recipe,
    tmp_path: Path,
    crash: int,
    changes: dict[str, Any],
    program: type[Program] | None,
) -> None:
    recipe = recipe.replace(epochs=EPOCHS, flip=True, **changes)
    data, test = make_set(40), make_set(9, seed=1)

    def run(folder: Path | None, *callbacks: object) -> TrainResult:
        made = program() if program is not None else None
        return train(
            make_net(dropout=0.2), data, recipe, test=test, seed=3, device="cpu", program=made, checkpoint=folder,
            callbacks=callbacks,
        )  # fmt: skip

    whole = run(None)
    with pytest.raises(CrashError):
        run(tmp_path / "work", CrashAt(crash))
    resumed = run(tmp_path / "work")
    assert resumed.resumed_at == crash
    assert_same(whole, resumed)
    again = run(tmp_path / "work")  # nothing left to do
    assert again.resumed_at == EPOCHS
    assert_same(whole, again)


SCRIPT = """
    import json, sys, torch
    from torch import nn
    from bbfast.data.imageset import ImageSet
    from bbfast.training import Recipe, train
    from bbfast.training.checkpoint import Checkpoints
    torch.set_num_threads(1)
    Checkpoints.due = lambda self, last: self.active
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(64) % 3)
    recipe = Recipe(epochs=15, batch_size=8, lr=0.05, precision="fp32", deterministic=True)

    class Report:
        def on_epoch_end(self, info):
            print(info.epoch, file=sys.stderr, flush=True)

    result = train(model, data, recipe, test=data, device="cpu", checkpoint=sys.argv[1], callbacks=[Report()])
    total = [float(value.double().sum()) for value in model.state_dict().values()]
    print(json.dumps([result.resumed_at, result.history[-1]["loss"], result.history[-1]["c_acc"], total]))
"""


def test_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def command(folder: str) -> list[str]:
        return [sys.executable, str(script), str(tmp_path / folder)]

    with subprocess.Popen(command("killed"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip().isdigit() and int(line) >= 3:
                break
        time.sleep(int.from_bytes(os.urandom(1), "little") / 256 * 0.1)  # any moment of an epoch or of a write
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    results = [
        json.loads(subprocess.run(command(folder), check=True, capture_output=True, text=True).stdout)
        for folder in ("killed", "whole")
    ]
    (resumed_at, *killed), (not_resumed, *whole) = results
    assert 3 <= resumed_at < 15 and not_resumed == 0
    assert killed == whole
    # What the killed process left half-written lies beside the checkpoint under another name, if at all.
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert "last" in names and all(name == "last" or name.startswith(".bbfast-tmp") for name in names)


@pytest.mark.parametrize("what", ["recipe", "seed", "data", "initial_weights", "program"])
def test_checkpoint_of_another_run_is_not_taken(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path)
    changed: dict[str, Any] = {
        "recipe": {"recipe": recipe.replace(lr=0.2)},
        "seed": {"seed": 1},
        "data": {"train": make_set(20, seed=5)},
        "initial_weights": {"model": make_net(seed=9)},
        "program": {"program": Momentum()},
    }[what]
    call: dict[str, Any] = {"model": make_net(), "train": make_set(20), "recipe": recipe, **changed}
    with caplog.at_level(logging.WARNING, logger="bbfast"):
        result = train(
            call.pop("model"), call.pop("train"), call.pop("recipe"), device="cpu", checkpoint=tmp_path, **call
        )
    assert result.resumed_at == 0 and len(result.history) == 3
    assert f"is of another run ({what}): starting anew" in caplog.text


@pytest.mark.parametrize("damage", ["truncate", "delete", "garbage"])
def test_damaged_checkpoint_is_not_loaded(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path)
    file = tmp_path / "last" / ("model.safetensors" if damage != "garbage" else "manifest.json")
    if damage == "delete":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, logger="bbfast"):
        again = train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path)
    assert again.resumed_at == 0 and "cannot be used, starting anew" in caplog.text
    assert_same(whole, again)
    assert train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path).resumed_at == 3


def test_folder_that_cannot_be_written(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError, match="file"):
        train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path / "file")


def test_seconds_go_on(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, tmp_path: Path) -> None:
    first = train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path)
    again = train(make_net(), make_set(20), recipe, device="cpu", checkpoint=tmp_path)
    assert again.seconds >= sum(row["seconds"] for row in first.history)


def test_writing_is_spaced_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 119.0, 121.5, 121.5])  # start and end of the write, then three questions
    monkeypatch.setattr("bbfast.training.checkpoint.time.monotonic", lambda: next(clock))
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.write(Checkpoint(1, [], {}, {"model": {"w": torch.zeros(1)}}))
    assert [DUE(checkpoints, False), DUE(checkpoints, False), DUE(checkpoints, True)] == [False, True, True]
    assert not DUE(Checkpoints(None, {}), True)
