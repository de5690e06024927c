"""evaluate(): the five metrics from one pass over each set."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bbfast
from bbfast import metrics
from bbfast.data.imageset import BackdoorSet, ImageSet

CLASSES = 4


class Reader(nn.Module):
    """Predicts the class that the first pixel of an image says; counts the images it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.modes.add(self.training)
        says = (x[:, 0, 0, 0] * 255).round().long()
        return self.weight * nn.functional.one_hot(says, CLASSES).float()


def pixels(says: list[int]) -> Tensor:
    images = torch.zeros(len(says), 3, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.tensor(says, dtype=torch.uint8).reshape(-1, 1)
    return images


def clean(says: list[int], labels: list[int]) -> ImageSet:
    return ImageSet(pixels(says), torch.tensor(labels, dtype=torch.int64))


def backdoor(says: list[int], wanted: list[int], truth: list[int]) -> BackdoorSet:
    labels, original = torch.tensor(wanted, dtype=torch.int64), torch.tensor(truth, dtype=torch.int64)
    return BackdoorSet(pixels(says), labels, original_labels=original)


TEST = clean([0, 1, 2, 3], [0, 1, 2, 0])
BACKDOOR = backdoor([0, 0, 2, 1, 3], [0] * 5, [1, 2, 2, 3, 3])


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    return bbfast.evaluate(Reader(), *arguments, device="cpu", **options)


def test_counts_by_hand() -> None:
    assert run(TEST, BACKDOOR) == {"c_acc": 0.75, "asr": 0.4, "r_acc": 0.4}


def test_ratings_against_a_baseline() -> None:
    before = {"c_acc": 0.9, "asr": 1.0, "r_acc": 0.0, "seconds": 3.0}
    measured = run(TEST, BACKDOOR, before)
    assert measured == {
        **run(TEST, BACKDOOR),
        "der": metrics.der(0.9, 1.0, 0.75, 0.4),
        "rir": metrics.rir(0.9, 0.0, 0.75, 0.4),
    }
    own = run(TEST, BACKDOOR)
    unchanged = run(TEST, BACKDOOR, own)
    assert unchanged["der"] == unchanged["rir"] == 0.5


def test_baseline_may_be_a_result() -> None:
    @dataclasses.dataclass
    class Result:
        metrics: dict[str, float]

    before = {"c_acc": 0.9, "asr": 1.0, "r_acc": 0.0}
    assert run(TEST, BACKDOOR, Result(before)) == run(TEST, BACKDOOR, before)


@given(
    rows=st.lists(st.tuples(*[st.integers(0, CLASSES - 1)] * 3), min_size=1, max_size=20), batch_size=st.integers(1, 7)
)
def test_equals_the_metrics_of_the_predictions(rows: list[tuple[int, int, int]], batch_size: int) -> None:
    says, wanted, truth = map(list, zip(*rows, strict=True))
    measured = run(clean(says, truth), backdoor(says, wanted, truth), batch_size=batch_size)
    assert measured["c_acc"] == measured["r_acc"] == metrics.c_acc(says, truth)
    assert measured["asr"] == metrics.asr(says, wanted)


def test_one_pass_over_each_set_in_evaluation_mode() -> None:
    model = Reader().train()
    bbfast.evaluate(model, TEST, BACKDOOR, {"c_acc": 1, "asr": 1, "r_acc": 0}, device="cpu", batch_size=2)
    assert model.seen == len(TEST) + len(BACKDOOR) and model.modes == {False} and model.training


def test_the_sets_normalisation_is_applied() -> None:
    shifted = dataclasses.replace(TEST, mean=(1 / 255,) * 3)
    # Class 1 reads as 0 then, so only the image that says 1 and is labelled 0 is right.
    only = dataclasses.replace(clean([1, 2], [0, 2]), mean=shifted.mean)
    assert run(only)["c_acc"] == 0.5


@pytest.mark.parametrize("none", [None, backdoor([], [], [])])
def test_without_backdoor_images(none: BackdoorSet | None) -> None:
    measured = run(TEST, none, {"c_acc": 0.9, "asr": 1.0, "r_acc": 0.0})
    assert measured["c_acc"] == 0.75
    assert all(math.isnan(measured[key]) for key in ("asr", "r_acc", "der", "rir"))
    assert measured["reason"] == "asr, r_acc: there are no backdoor test images"


def test_without_clean_images() -> None:
    measured = run(clean([], []), BACKDOOR)
    assert math.isnan(measured["c_acc"]) and measured["asr"] == 0.4
    assert measured["reason"] == "c_acc: the test set is empty"


def test_undefined_baseline() -> None:
    measured = run(TEST, BACKDOOR, {"c_acc": 0.9, "asr": None, "r_acc": math.nan})
    assert math.isnan(measured["der"]) and math.isnan(measured["rir"]) and measured["asr"] == 0.4


class TestBadInput:
    def test_labels_outside_the_models_classes(self) -> None:
        with pytest.raises(ValueError, match=r"test must have labels in 0\.\.3, the model's 4 classes, got 4"):
            run(clean([0], [4]))
        with pytest.raises(ValueError, match=r"backdoor_test must have labels in 0\.\.3, .* got 9"):
            run(TEST, backdoor([0], [0], [9]))

    def test_sets_of_the_wrong_type(self) -> None:
        with pytest.raises(TypeError, match=r"test must be a bbfast\.ImageSet, got Tensor"):
            run(pixels([0]))
        with pytest.raises(TypeError, match=r"backdoor_test must be a bbfast\.ImageSet, got tuple"):
            run(TEST, (1, 2))
        with pytest.raises(TypeError, match=r"backdoor_test must be a bbfast\.BackdoorSet, with original_labels"):
            run(TEST, TEST)

    def test_baseline(self) -> None:
        with pytest.raises(ValueError, match="baseline must have c_acc, asr, r_acc; it lacks asr, r_acc"):
            run(TEST, BACKDOOR, {"c_acc": 0.9})
        with pytest.raises(TypeError, match="baseline must be a mapping of metrics or a result with them, got float"):
            run(TEST, BACKDOOR, 0.9)
        with pytest.raises(ValueError, match=r"c_acc_before must be a fraction in 0\.\.1 \(not percent\), got 91"):
            run(TEST, BACKDOOR, {"c_acc": 91.0, "asr": 1.0, "r_acc": 0.0})
