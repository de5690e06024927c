"""What holds for every attack that controls the training: killed runs go on to the same bits, triggers are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bbfast import Recipe, attacks
from bbfast.attacks import AttackResult
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.training import EpochInfo
from bbfast.training.checkpoint import Checkpoints

CASES: dict[str, dict[str, Any]] = {
    "bpp": {},
    "bpp-reference": {"compat": "reference"},
    "input_aware": {"clean_train_epochs": 2},
    "input_aware-reference": {"clean_train_epochs": 2, "compat": "reference"},
    "blind": {"history": 4, "threshold": 3.0},
    "blind-mgda": {"history": 4, "threshold": 3.0, "balance": "mgda", "latch": True},
    "lira": {"both_train_epochs": 2, "eps": 0.3},
    "lira-reference": {"both_train_epochs": 2, "eps": 0.3, "compat": "reference"},
    "lira-joint": {"both_train_epochs": 2, "eps": 0.3, "joint_forward": True, "eps_space": "unit"},
    "wanet": {},
}
RECIPE = Recipe(
    epochs=4, batch_size=24, lr=0.02, precision="fp32", deterministic=True, eval_every=0, schedule="onecycle"
)


class CrashError(Exception):
    pass


class CrashAt:
    """Stops the run after an epoch, before its checkpoint."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, info: EpochInfo) -> None:
        if info.epoch == self.epoch:
            raise CrashError


@pytest.fixture
def data(make_set: Callable[..., ImageSet]) -> DataPair:
    train, test = make_set(48, size=16, classes=4), make_set(16, size=16, classes=4, seed=1)
    return DataPair(train, test, name="smooth")


def run(case: str, data: DataPair, folder: Path | None = None, *callbacks: object) -> AttackResult:
    method = attacks.create(case.split("-")[0], **CASES[case])
    return attacks.attack(
        method, data, "small_cnn", RECIPE, 3, "cpu", checkpoint=folder, callbacks=callbacks, progress=False
    )


def rows(result: AttackResult) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


@pytest.mark.parametrize("case", CASES)
def test_interrupted_runs_end_with_the_same_bits(
    case: str, data: DataPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "due", lambda self, last: self.active)
    whole = run(case, data)
    for crash in (1, 2):  # within the first of two stages, and between them
        with pytest.raises(CrashError):
            run(case, data, tmp_path / "one", CrashAt(crash))
    for _ in ("goes on", "has nothing left to do"):
        resumed = run(case, data, tmp_path / "one")
        assert rows(resumed) == rows(whole)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value)
        assert set(resumed.trigger_state) == set(whole.trigger_state)
        for name, value in whole.trigger_state.items():
            assert torch.equal(resumed.trigger_state[name], value), name
        assert torch.equal(resumed.backdoor_test.images, whole.backdoor_test.images)
        assert torch.equal(resumed.train.images, whole.train.images)


@pytest.mark.parametrize("case", CASES)
def test_trigger_of_a_loaded_result(case: str, data: DataPair, tmp_path: Path) -> None:
    result = run(case, data)
    again = AttackResult.load(result.save(tmp_path / "result"))
    bad = result.backdoor_test
    rows_of = torch.searchsorted(data.test.ids, bad.ids)
    assert torch.equal(again.trigger(data.test.images[rows_of], bad.ids), bad.images)
    assert again.metrics == pytest.approx(result.metrics)
    poisoned = result.poisoned.nonzero().flatten()
    assert len(poisoned) > 0
    stored = again.trigger(data.train.images[poisoned], data.train.ids[poisoned], "train")
    assert torch.equal(stored, result.train.images[poisoned])
