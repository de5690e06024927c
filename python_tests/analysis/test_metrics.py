"""The rates of the metrics tool, counted by hand, and what it says of a defense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bbfast import analysis, evaluate
from bbfast.analysis.tools.metrics import calibration_error, wilson
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult


class Told(torch.nn.Module):
    """Says what it is told to: the first pixel of the first channel holds the class times ten."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.dummy = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said = ((x[:, 0, 0, 0] * self.std + self.mean) * 25.5).round().long()
        return torch.nn.functional.one_hot(said, 10).float() * 20


def told(badnets: AttackResult, clean: list[int], triggered: list[int]) -> AttackResult:
    """Ten test images, five of them triggered, and what the model says of each."""

    def images(said: list[int]) -> torch.Tensor:
        return (torch.tensor(said) * 10).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()

    test = badnets.test[:10]
    test = dataclasses.replace(test, images=images(clean), labels=torch.arange(10))
    bad = badnets.backdoor_test[: len(triggered)]
    n = len(triggered)
    bad = dataclasses.replace(
        bad,
        images=images(triggered),
        labels=torch.zeros(n, dtype=torch.int64),
        original_labels=torch.arange(1, n + 1),
        ids=torch.arange(1, n + 1),
    )
    data = badnets.config["data"]
    return dataclasses.replace(
        badnets, test=test, backdoor_test=bad, model=Told(float(data["mean"][0]), float(data["std"][0]))
    )


def test_ten_samples_by_hand(badnets: AttackResult, tmp_path: Path) -> None:
    # Eight clean ones are right. Of classes 1..5 with the trigger: target, target, right, target, neither.
    made = told(badnets, [0, 1, 2, 3, 4, 5, 6, 7, 0, 0], [0, 0, 3, 0, 9])
    found = analysis.run("metrics", made, out=tmp_path, device="cpu", figures=False)
    assert found.numbers.arrays["counts"].tolist() == [[[8, 10], [3, 5], [1, 5]]]
    assert found.summary["c_acc"] == 0.8 and found.summary["asr"] == 0.6 and found.summary["r_acc"] == 0.2
    by_class = found.numbers.arrays["by_class"][0]
    assert by_class[:, 1].tolist() == [1] * 10 and by_class[:, 0].tolist() == [1] * 8 + [0] * 2
    assert by_class[1].tolist() == [1, 1, 1, 0, 0, 1] and by_class[3].tolist() == [1, 1, 0, 1, 0, 1]
    assert by_class[5].tolist() == [1, 1, 0, 0, 1, 1] and by_class[0].tolist() == [1, 1, 0, 0, 0, 0]
    # The model is always sure, so it is as wrong as it is inaccurate.
    np.testing.assert_allclose(found.numbers.arrays["ece"], [[0.2, 0.8]], atol=1e-6)
    assert found.numbers.table[0]["der"] == ""


def test_der_of_a_defense(badnets: AttackResult, tmp_path: Path) -> None:
    made = told(badnets, list(range(10)), [0] * 5)
    nothing = DefenseResult(kind="mitigation", model=made.model, config={"defense": "nothing"})
    found = analysis.run("metrics", made, nothing, tmp_path / "a", device="cpu", figures=False)
    assert found.summary["der"] == 0.5 and found.summary["rir"] == 0.5

    class Cured(Told):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).roll(1, 1)

    cured = Cured(made.model.mean, made.model.std)
    made = told(badnets, list(range(10)), [0] * 5)
    clean = dataclasses.replace(made.test, labels=(made.test.labels + 1) % 10)
    wrong = dataclasses.replace(made, test=clean)
    found = analysis.run(
        "metrics", wrong, DefenseResult(kind="mitigation", model=cured, config={"defense": "cure"}), tmp_path / "b"
    )
    # Everything is right after and nothing before: no accuracy was lost, and no image goes to the target.
    assert found.summary["der"] == 1.0 and found.numbers.meta["models"] == ["no defense", "cure"]
    assert found.numbers.arrays["counts"][:, 0].tolist() == [[0, 10], [10, 10]]


def test_as_the_evaluation_has_it(badnets: AttackResult, tuned: DefenseResult, tmp_path: Path) -> None:
    found = analysis.run("metrics", badnets, tuned, tmp_path, device="cpu", plot="radar")
    assert tuned.model is not None
    wanted = evaluate(tuned.model, badnets.test, badnets.backdoor_test, badnets, device="cpu")
    for key in ("c_acc", "asr", "r_acc", "der", "rir"):
        assert found.summary[key] == pytest.approx(wanted[key], abs=1e-12)


def test_intervals_and_calibration() -> None:
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1) and np.isnan(wilson(0, 0)).all()
    np.testing.assert_allclose(wilson(8, 10), (0.4901625, 0.9433178), atol=1e-6)  # R: prop.test(8, 10, correct=F)
    sure = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.55, 0.55])
    right = torch.tensor([True, True, True, False, True, False])
    assert calibration_error(sure, right, 10) == pytest.approx((4 * 0.15 + 2 * 0.05) / 6, abs=1e-7)
    assert np.isnan(calibration_error(sure[:0], right[:0], 10))
