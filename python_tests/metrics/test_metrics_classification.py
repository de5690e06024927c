"""C-Acc, ASR, R-Acc, DER and RIR against the reference's outputs, published rows and their definitions."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from bbfast import metrics

FRACTION = st.floats(0, 1)
SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    path = SHARED / "golden" / "metrics.npz"
    if not path.is_file():
        pytest.skip(f"no golden file {path}; set BBFAST_SHARED")
    with np.load(path) as file:
        return dict(file)


class TestGolden:
    """Outputs of BackdoorBench on fixed predictions, tolerance 1e-12.

    ``der_from_predictions`` and ``rir_from_predictions`` are not matched: those two helpers add the loss of accuracy
    instead of subtracting it and measure accuracy on the backdoor predictions. The test says how ours differs from
    them.
    """

    def test_accuracies(self, golden: dict[str, Any]) -> None:
        g = golden
        for suffix, clean, backdoor in (
            ("", "pred_clean", "pred_bd"),
            ("_def", "pred_clean_defended", "pred_bd_defended"),
        ):
            assert abs(metrics.c_acc(g[clean], g["labels"]) - g["c_acc" + suffix]) <= 1e-12
            assert abs(metrics.asr(g[backdoor], g["target_labels"]) - g["asr" + suffix]) <= 1e-12
            assert abs(metrics.r_acc(g[backdoor], g["labels"]) - g["r_acc" + suffix]) <= 1e-12

    def test_per_class(self, golden: dict[str, Any]) -> None:
        g = golden
        for name, predictions, labels in (
            ("c_acc_per_class", "pred_clean", "labels"),
            ("asr_per_class", "pred_bd", "target_labels"),
            ("r_acc_per_class", "pred_bd", "labels"),
        ):
            ours = metrics.accuracy_per_class(g[predictions], g[labels], 10)
            np.testing.assert_allclose(ours, g[name], rtol=0, atol=1e-12, equal_nan=True)
        assert np.isnan(metrics.accuracy_per_class(g["pred_bd"], g["target_labels"], 10)[1:]).all()

    def test_ratings(self, golden: dict[str, Any]) -> None:
        g = golden
        assert abs(metrics.der(g["c_acc"], g["asr"], g["c_acc_def"], g["asr_def"]) - g["der_simplified"]) <= 1e-12
        assert abs(metrics.rir(g["c_acc"], g["r_acc"], g["c_acc_def"], g["r_acc_def"]) - g["rir_simplified"]) <= 1e-12

    def test_ratings_over_a_grid(self, golden: dict[str, Any]) -> None:
        c_before, c_after, x_before, x_after = golden["grid_in"].T
        np.testing.assert_allclose(
            metrics.der(c_before, x_before, c_after, x_after), golden["grid_der"], rtol=0, atol=1e-12
        )
        np.testing.assert_allclose(
            metrics.rir(c_before, x_before, c_after, x_after), golden["grid_rir"], rtol=0, atol=1e-12
        )

    def test_the_bug_of_the_other_helpers_is_not_reproduced(self, golden: dict[str, Any]) -> None:
        g = golden
        ours = metrics.der(g["c_acc"], g["asr"], g["c_acc_def"], g["asr_def"])
        # Theirs: +max(0, dACC), with dACC from the backdoor predictions, where "accuracy" rose: so the term is 0.
        theirs = (max(0, g["asr"] - g["asr_def"]) + max(0, g["r_acc"] - g["r_acc_def"]) + 1) / 2
        assert abs(theirs - g["der_from_predictions"]) <= 1e-12 and abs(ours - g["der_from_predictions"]) > 0.03
        assert (
            abs(metrics.rir(g["c_acc"], g["r_acc"], g["c_acc_def"], g["r_acc_def"]) - g["rir_from_predictions"]) > 0.03
        )


class TestAccuracies:
    @pytest.mark.parametrize("metric", [metrics.c_acc, metrics.asr, metrics.r_acc])
    def test_hand_counted(self, metric: Any) -> None:
        assert metric([0, 1, 2, 3], [0, 1, 1, 3]) == 0.75
        assert metric(np.array([1]), np.array([1], dtype=np.uint8)) == 1.0
        assert metric(torch.tensor([1, 2]), torch.tensor([0, 0], dtype=torch.int32)) == 0.0
        assert isinstance(metric([1], [1]), float)

    @pytest.mark.parametrize("metric", [metrics.c_acc, metrics.asr, metrics.r_acc])
    @pytest.mark.parametrize("empty", [[], np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64)])
    def test_empty_is_not_defined(self, metric: Any, empty: Any) -> None:
        assert math.isnan(metric(empty, empty))

    @given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
    def test_agree_with_scikit_learn(self, pairs: list[tuple[int, int]]) -> None:
        predicted, labels = map(list, zip(*pairs, strict=True))
        assert metrics.c_acc(predicted, labels) == pytest.approx(accuracy_score(labels, predicted), abs=1e-15)
        per_class = metrics.accuracy_per_class(predicted, labels, 6)
        weights = np.bincount(labels, minlength=6) / len(labels)
        assert np.nansum(per_class * weights) == pytest.approx(metrics.c_acc(predicted, labels), abs=1e-12)
        assert np.array_equal(np.isnan(per_class), weights == 0)

    @given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=60))
    def test_asr_and_r_acc_share_the_images(self, rows: list[tuple[int, int]]) -> None:
        predicted, original = map(list, zip(*rows, strict=True))
        assert metrics.asr(predicted, [0] * len(rows)) + metrics.r_acc(predicted, original) <= 1 + 1e-12

    @pytest.mark.parametrize(
        ("predictions", "labels", "error", "message"),
        [
            ([0, 1], [0], ValueError, "predictions and target_labels must have the same length, got 2 and 1"),
            ([0.5], [0], TypeError, "predictions must be integer class numbers.*got float64"),
            ([True], [0], TypeError, "predictions must be integer.*got bool"),
            ([0], [1.0], TypeError, "target_labels must be integer"),
            ([[0, 1]], [0], ValueError, r"predictions must have one dimension \[N\], got shape \[1, 2\]"),
            ([0], [-1], ValueError, "target_labels must be class numbers >= 0, got -1"),
            (torch.zeros(2, 10), torch.zeros(2), TypeError, "argmax of logits"),
        ],
    )
    def test_bad_input(self, predictions: Any, labels: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            metrics.asr(predictions, labels)

    def test_bad_classes(self) -> None:
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 3"):
            metrics.accuracy_per_class([0], [3], 3)
        with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
            metrics.accuracy_per_class([], [], 0)
        assert np.array_equal(metrics.accuracy_per_class([7], [0], 2), [0, np.nan], equal_nan=True)


class TestRatings:
    def test_published_rows(self) -> None:
        """Rows of the published leaderboard; the tolerances are those of their rounding."""
        assert metrics.der(0.9132, 0.95033, 0.89959, 0.01477) == pytest.approx(0.96098, abs=1e-4)
        assert metrics.der(0.8448, 0.98266, 0.1422, 0.0) == pytest.approx(0.6400, abs=2e-4)

    def test_ends_of_the_range(self) -> None:
        assert metrics.der(0.9, 0.8, 0.9, 0.8) == 0.5 == metrics.rir(0.9, 0.1, 0.9, 0.1)
        assert metrics.der(1, 1, 1, 0) == 1.0 == metrics.rir(1, 0, 1, 1)
        assert metrics.der(1, 0, 0, 1) == 0.0 == metrics.rir(1, 1, 0, 0)

    def test_gains_of_accuracy_and_rises_of_asr_are_clipped(self) -> None:
        assert metrics.der(0.5, 0.5, 0.9, 0.9) == 0.5
        assert metrics.rir(0.5, 0.5, 0.9, 0.1) == 0.5

    def test_order_of_arguments(self) -> None:
        assert metrics.der(c_acc_before=0.9, asr_before=0.8, c_acc_after=0.7, asr_after=0.2) == metrics.der(
            0.9, 0.8, 0.7, 0.2
        )
        assert metrics.der(0.9, 0.8, 0.7, 0.2) == pytest.approx((0.6 - 0.2 + 1) / 2)
        assert metrics.rir(c_acc_before=0.9, r_acc_before=0.2, c_acc_after=0.7, r_acc_after=0.6) == metrics.rir(
            0.9, 0.2, 0.7, 0.6
        )
        assert metrics.rir(0.9, 0.2, 0.7, 0.6) == pytest.approx((0.4 - 0.2 + 1) / 2)

    @given(c0=FRACTION, x0=FRACTION, c1=FRACTION, x1=FRACTION)
    def test_properties(self, c0: float, x0: float, c1: float, x1: float) -> None:
        der, rir = metrics.der(c0, x0, c1, x1), metrics.rir(c0, x0, c1, x1)
        assert 0 <= der <= 1 and 0 <= rir <= 1 and isinstance(der, float)
        # The two differ only in which way the second metric ought to go.
        assert metrics.rir(c0, x1, c1, x0) == der
        assert metrics.der(c0, x0, c1, min(x1, x0 / 2)) >= der - 1e-12

    def test_arrays_broadcast(self) -> None:
        rating = metrics.der(0.9, 0.8, np.array([0.9, 0.5]), np.array([[0.8], [0.0]]))
        expected = [[metrics.der(0.9, 0.8, c, a) for c in (0.9, 0.5)] for a in (0.8, 0.0)]
        assert rating.dtype == np.float64 and np.array_equal(rating, expected)

    def test_tensors(self) -> None:
        rating = metrics.rir(torch.tensor(0.5), 0.25, torch.tensor([0.5, 0.25]), 0.75)
        assert isinstance(rating, torch.Tensor) and rating.dtype == torch.float64
        assert rating.tolist() == [0.75, 0.625]
        assert isinstance(metrics.rir(torch.tensor(0.5), 0.25, 0.5, 0.75), float)

    @pytest.mark.parametrize("rating", [metrics.der, metrics.rir])
    def test_undefined_stays_undefined(self, rating: Any) -> None:
        for position in range(4):
            values = [0.5] * 4
            values[position] = math.nan
            assert math.isnan(rating(*values))
        assert np.isnan(rating(0.5, np.array([0.5, np.nan]), 0.5, 0.5)).tolist() == [False, True]

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            (
                (91.3, 0.9, 0.9, 0.1),
                ValueError,
                r"c_acc_before must be a fraction in 0\.\.1 \(not percent\), got 91\.3",
            ),
            ((0.9, 0.9, 0.9, -0.1), ValueError, "asr_after must be a fraction"),
            ((0.9, [0.1, 1.5], 0.9, 0.1), ValueError, "asr_before must be a fraction.*got 1.5"),
            ((0.9, math.inf, 0.9, 0.1), ValueError, "asr_before must be a fraction"),
            ((0.9, "high", 0.9, 0.1), TypeError, "asr_before must be a number"),
            ((0.9, None, 0.9, 0.1), TypeError, "asr_before must be a number"),
            (([0.9] * 2, [0.9] * 3, 0.9, 0.1), ValueError, r"c_acc_before \[2\], asr_before \[3\]"),
        ],
    )
    def test_bad_input(self, values: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            metrics.der(*values)
