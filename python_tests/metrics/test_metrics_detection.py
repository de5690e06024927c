"""Detection metrics against scikit-learn, hand-counted cases and the conventions at the edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from bbfast.metrics import detection

KEYS = {
    *("tpr", "fpr", "precision", "f1", "balanced_accuracy", "f1_w9", "auroc", "auprc"),
    *("tpr_at_fpr_01", "tpr_at_fpr_05", "tpr_at_fpr_10", "fpr_at_tpr_95", "unscored"),
}
FROM_FLAGS = {"tpr", "fpr", "precision", "f1", "balanced_accuracy", "f1_w9"}

ROW = st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(-5, 5), st.booleans(), st.booleans())


def both_kinds(rows: list[tuple[float, bool, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (with many ties), truth with at least one of each kind, flags."""
    scores, truth, flags = map(np.array, zip(*rows, strict=True))
    truth[0], truth[1] = True, False
    return scores.astype(float), truth, flags


@given(rows=st.lists(ROW, min_size=2, max_size=80))
def test_agrees_with_scikit_learn(rows: list[tuple[float, bool, bool]]) -> None:
    scores, truth, flags = both_kinds(rows)
    ours = detection(scores, truth, flags)
    assert ours.keys() == KEYS and ours["unscored"] == 0
    assert ours["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert ours["auprc"] == pytest.approx(sklearn_metrics.average_precision_score(truth, scores), abs=1e-12)
    assert ours["tpr"] == pytest.approx(sklearn_metrics.recall_score(truth, flags), abs=1e-12)
    assert ours["precision"] == pytest.approx(sklearn_metrics.precision_score(truth, flags, zero_division=0), abs=1e-12)
    assert ours["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, flags, zero_division=0), abs=1e-12)
    assert ours["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, flags), abs=1e-12)
    fpr, tpr, _ = sklearn_metrics.roc_curve(truth, scores, drop_intermediate=False)
    for percent in (1, 5, 10):
        assert ours[f"tpr_at_fpr_{percent:02}"] == pytest.approx(tpr[fpr <= percent / 100 + 1e-12].max(), abs=1e-12)
    assert ours["fpr_at_tpr_95"] == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min(), abs=1e-12)


@given(rows=st.lists(ROW, min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[float, bool, bool]]) -> None:
    scores, truth, _ = both_kinds(rows)
    difference = scores[truth][:, None] - scores[~truth][None, :]
    pairs = np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))
    assert detection(scores, truth)["auroc"] == pytest.approx(pairs.mean(), abs=1e-12)


@given(rows=st.lists(ROW, min_size=2, max_size=40))
def test_properties(rows: list[tuple[float, bool, bool]]) -> None:
    scores, truth, flags = both_kinds(rows)
    ours = detection(scores, truth, flags)
    ranks = np.unique(scores, return_inverse=True)[1]
    assert detection(10.0 * ranks - 7, truth, flags) == ours, "only the order of the scores matters"
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = detection(scores[order], truth[order], flags[order])
    assert all(shuffled[key] == pytest.approx(ours[key], abs=1e-12) for key in KEYS)
    assert detection(-scores, truth)["auroc"] == pytest.approx(1 - ours["auroc"], abs=1e-12)
    rates = [ours[f"tpr_at_fpr_{percent}"] for percent in ("01", "05", "10")]
    assert rates == sorted(rates) and all(0 <= ours[key] <= 1 for key in KEYS - {"unscored"})


def test_hand_counted() -> None:
    truth = [True] * 4 + [False] * 6
    flags = [True, True, True, False] + [True] + [False] * 5
    scores = [0.9, 0.8, 0.7, 0.2] + [0.75] + [0.1] * 5
    ours = detection(scores, truth, flags)
    assert ours["tpr"] == 0.75 and ours["fpr"] == pytest.approx(1 / 6) and ours["precision"] == 0.75
    assert ours["f1"] == 0.75 and ours["balanced_accuracy"] == pytest.approx((0.75 + 5 / 6) / 2)
    recall_w = 3 / (3 + 9 * 1)
    assert ours["f1_w9"] == pytest.approx(2 * 0.75 * recall_w / (0.75 + recall_w))
    assert ours["auroc"] == pytest.approx((6 + 6 + 5 + 5) / 24)
    assert ours["auprc"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
    assert ours["tpr_at_fpr_01"] == 0.5 == ours["tpr_at_fpr_10"]
    assert ours["fpr_at_tpr_95"] == pytest.approx(1 / 6)


def test_rates_are_compared_as_counts() -> None:
    """1 of 20 is 5 %, and 19 of 20 is 95 %, whatever floating point makes of them."""
    truth = [True] * 20 + [False] * 20
    scores = [1.0] * 19 + [0.0] + [2.0] + [0.0] * 19
    ours = detection(scores, truth)
    assert ours["tpr_at_fpr_05"] == 0.95 and ours["tpr_at_fpr_01"] == 0.0
    assert ours["fpr_at_tpr_95"] == 0.05


class TestEdges:
    def test_nothing_poisoned(self) -> None:
        ours = detection([1.0, 2.0], [False, False], [True, False])
        assert ours["fpr"] == 0.5 and ours["precision"] == 0.0
        assert {key for key in KEYS if math.isnan(ours[key])} == KEYS - {"fpr", "precision", "unscored"}

    def test_everything_poisoned(self) -> None:
        ours = detection([1.0, 2.0], [True, True], [True, False])
        assert (ours["tpr"], ours["precision"], ours["auprc"]) == (0.5, 1.0, 1.0)
        undefined = {
            "fpr",
            "balanced_accuracy",
            "auroc",
            "tpr_at_fpr_01",
            "tpr_at_fpr_05",
            "tpr_at_fpr_10",
            "fpr_at_tpr_95",
        }
        assert {key for key in KEYS if math.isnan(ours[key])} == undefined

    def test_nothing_flagged(self) -> None:
        ours = detection([1.0, 2.0], [True, False], [False, False])
        assert all(ours[key] == 0.0 for key in ("tpr", "fpr", "precision", "f1", "f1_w9"))
        assert ours["balanced_accuracy"] == 0.5

    def test_no_samples(self) -> None:
        ours = detection([], [], [])
        assert ours["precision"] == 0.0 and ours["unscored"] == 0
        assert all(math.isnan(ours[key]) for key in KEYS - {"precision", "unscored"})

    def test_no_flags(self) -> None:
        ours = detection([2.0, 1.0], [True, False])
        assert {key for key in KEYS if math.isnan(ours[key])} == FROM_FLAGS
        assert ours["auroc"] == 1.0

    def test_no_scores(self) -> None:
        ours = detection(None, [True, False], [True, False])
        assert {key for key in KEYS if math.isnan(ours[key])} == KEYS - FROM_FLAGS - {"unscored"}
        assert ours["f1"] == 1.0 and ours["unscored"] == 2

    def test_all_scores_equal(self) -> None:
        ours = detection([3.0] * 10, [True] * 3 + [False] * 7)
        assert ours["auroc"] == 0.5 and ours["auprc"] == pytest.approx(0.3) and ours["tpr_at_fpr_10"] == 0.0

    def test_infinities_are_ranked(self) -> None:
        ours = detection([math.inf, 1.0, -math.inf, 0.0], [True, False, False, False])
        assert ours["auroc"] == 1.0 and ours["unscored"] == 0

    def test_unscored_samples_rank_last(self) -> None:
        truth = [True, False, True, False, False]
        ours = detection([1.0, -math.inf, math.nan, math.nan, 0.0], truth)
        assert ours["unscored"] == 2
        ranks = detection([9, 1, 0, 0, 5], truth)
        assert {**ours, "unscored": 0} == pytest.approx(ranks, nan_ok=True)

    def test_not_scoring_poisoned_samples_never_pays(self) -> None:
        truth = [True, True, False, False]
        assert detection([2.0, math.nan, 1.0, 0.0], truth)["auroc"] < detection([2.0, 0.5, 1.0, 0.0], truth)["auroc"]
        assert detection([math.nan] * 4, truth)["auroc"] == 0.5


class TestInput:
    def test_kinds(self) -> None:
        scores, truth, flags = [0.5, 2.0, 1.0], [False, True, True], [False, True, False]
        expected = detection(scores, truth, flags)
        assert detection(np.float32(scores), np.int64(truth), np.uint8(flags)) == expected
        tensors = torch.tensor(scores, dtype=torch.bfloat16), torch.tensor(truth), torch.tensor(flags)
        assert detection(*tensors) == expected
        assert detection(torch.tensor(scores, requires_grad=True), truth, flags) == expected
        assert detection([1, 4, 2], truth, flags) == expected
        assert all(type(value) in (float, int) for value in expected.values())

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([1.0], [True, False]), ValueError, "scores and truth must have the same length, got 1 and 2"),
            (([1.0], [True], [True, False]), ValueError, "flags and truth must have the same length, got 2 and 1"),
            (([1.0], [0.5]), TypeError, "truth must be bool"),
            (([1.0], [2]), ValueError, "truth must be bool or 0 and 1, got 2"),
            (([1.0], [True], [1.0]), TypeError, "flags must be bool"),
            ((["a"], [True]), TypeError, "scores must be real numbers"),
            (([1j], [True]), TypeError, "scores must be real numbers"),
            (([[1.0]], [True]), ValueError, r"scores must have one dimension \[N\], got shape \[1, 1\]"),
            (([1.0], [[True]]), ValueError, "truth must have one dimension"),
        ],
    )
    def test_bad_input(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            detection(*arguments)
