"""The anomaly index: medians, one-sidedness, and what is infinite or undefined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from bbfast.metrics import anomaly_index

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)


def test_hand_counted() -> None:
    values = [1.0, 8.0, 10.0, 12.0, 13.0]
    np.testing.assert_allclose(anomaly_index(values), np.array([9, 2, 0, 2, 3]) / (1.4826 * 2))
    np.testing.assert_allclose(anomaly_index(values, scale=1), [4.5, 1, 0, 1, 1.5])
    np.testing.assert_allclose(anomaly_index(values, side="low", scale=1), [4.5, 1, 0, 0, 0])
    np.testing.assert_allclose(anomaly_index(values, side="high", scale=1), [0, 0, 0, 1, 1.5])


def test_medians_of_an_even_number() -> None:
    values = [0.0, 1.0, 3.0, 10.0]
    np.testing.assert_allclose(anomaly_index(values, scale=1), np.array([2, 1, 1, 8]) / 1.5)
    np.testing.assert_allclose(anomaly_index(values, median="lower", scale=1), np.array([1, 0, 2, 9]) / 1.0)


@given(values=VALUES)
def test_average_median_is_scipys(values: list[float]) -> None:
    index = anomaly_index(values)
    spread = median_abs_deviation(values, scale=1.0) * 1.4826
    deviation = np.abs(np.array(values) - np.median(values))
    if spread > 0:
        with np.errstate(over="ignore"):
            expected = deviation / spread
        np.testing.assert_allclose(index, expected, rtol=1e-12)
    else:
        assert np.array_equal(index, np.where(deviation > 0, np.inf, 0.0))


@given(values=VALUES)
def test_lower_median_is_torchs(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    deviation = (x - x.median()).abs()
    spread = 1.4826 * deviation.median()
    index = anomaly_index(x, median="lower")
    assert isinstance(index, torch.Tensor) and index.dtype == torch.float64
    expected = torch.where(deviation > 0, deviation / spread, 0.0)
    torch.testing.assert_close(index, expected, rtol=1e-12, atol=0)


@given(values=VALUES)
def test_independent_of_unit_and_order(values: list[float]) -> None:
    # Whole numbers times 8 and plus 4 are exact, so ties stay ties.
    x = np.round(values)
    np.testing.assert_allclose(anomaly_index(8 * x + 4), anomaly_index(x), rtol=1e-9)
    np.testing.assert_array_equal(anomaly_index(x[::-1])[::-1], anomaly_index(x))
    low, high = anomaly_index(x, side="low"), anomaly_index(x, side="high")
    np.testing.assert_array_equal(np.maximum(low, high), anomaly_index(x))
    np.testing.assert_array_equal(anomaly_index(-x, side="high"), low)


def test_next_to_no_spread() -> None:
    assert anomaly_index([0.0, 1e-310, -1e-310, 1e3]).tolist()[3] == math.inf


def test_no_spread() -> None:
    assert anomaly_index([3.0] * 5).tolist() == [0.0] * 5
    assert anomaly_index([3.0, 3.0, 3.0, 2.0, 4.0]).tolist() == [0, 0, 0, math.inf, math.inf]
    assert anomaly_index([3.0, 3.0, 3.0, 2.0, 4.0], side="low").tolist() == [0, 0, 0, math.inf, 0]
    assert anomaly_index([7.0]).tolist() == [0.0]


def test_infinite_and_undefined_values_are_left_out_of_the_medians() -> None:
    index = anomaly_index([1.0, 2.0, 3.0, math.inf, math.nan, -math.inf], scale=1)
    assert index[:3].tolist() == [1, 0, 1] and index[3] == index[5] == math.inf and math.isnan(index[4])
    assert anomaly_index([1.0, 2.0, 3.0, math.inf], side="low").tolist()[3] == 0.0
    assert np.isnan(anomaly_index([math.inf, math.nan])).all()
    assert anomaly_index([]).shape == (0,)


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ([[1.0]], {}, ValueError, "values must have one dimension"),
        (["a"], {}, TypeError, "values must be real numbers"),
        ([1.0], {"side": "left"}, ValueError, "side must be 'both', 'low' or 'high', got 'left'"),
        ([1.0], {"median": "upper"}, ValueError, "median must be 'average' or 'lower', got 'upper'"),
        ([1.0], {"scale": 0}, ValueError, "scale must be positive, got 0"),
        ([1.0], {"scale": math.nan}, ValueError, "scale must be positive"),
    ],
)
def test_bad_input(values: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        anomaly_index(values, **options)
