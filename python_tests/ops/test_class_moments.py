from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, seeds

from bbfast import ops
from bbfast.ops import Moments, reference


def make_rows(n: int, d: int, classes: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shift = 5 * torch.randn(classes, d, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=g)
    rows = torch.randn(n, d, generator=g, dtype=torch.float64) + shift[labels]
    return rows.to(dtype), labels


def by_numpy(rows: torch.Tensor, labels: torch.Tensor, classes: int) -> Moments:
    count, mean, scatter = [], [], []
    for k in range(classes):
        own = rows[labels == k].double().numpy()
        centre = own.mean(0) if len(own) else np.zeros(rows.shape[1])
        count.append(len(own))
        mean.append(centre)
        scatter.append((own - centre).T @ (own - centre))
    return Moments(torch.tensor(count), torch.from_numpy(np.stack(mean)), torch.from_numpy(np.stack(scatter)))


def assert_moments(got: Moments, expected: Moments, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    assert isinstance(got, Moments)
    assert [t.dtype for t in got] == [torch.int64, torch.float64, torch.float64]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(
    st.sampled_from((0, 1, 2, 40, 131)),
    st.sampled_from((0, 1, 3, 32, 33, 70)),
    st.integers(1, 6),
    st.sampled_from(FLOATS),
    seeds,
)
def test_agrees_with_numpy_and_the_reference(n, d, classes, dtype, seed):
    rows, labels = make_rows(n, d, classes, dtype, seed)
    expected = by_numpy(rows, labels, classes)
    assert_moments(ops.class_moments(rows, labels, classes), expected)
    assert_moments(reference.class_moments(rows, labels, classes), expected)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 40), seeds)
def test_pieces_give_the_same_as_the_whole(first, second, d, seed):
    rows, labels = make_rows(first + second, d, 4, torch.float32, seed)
    whole = by_numpy(rows, labels, 4)
    for module in (ops, reference):
        state = module.class_moments(rows[:first], labels[:first], 4)
        kept = [t.clone() for t in state]
        joined = module.class_moments(rows[first:], labels[first:], 4, state)
        assert_moments(joined, whole)
        for before, after in zip(kept, state, strict=True):
            torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_devices_agree(device, dtype):
    rows, labels = make_rows(517, 70, 5, dtype, 0)
    labels[labels == 3] = 2  # a class without rows
    state = ops.class_moments(rows[:100].to(device), labels[:100].to(device), 5)
    got = ops.class_moments(rows[100:].to(device), labels[100:].to(device), 5, state)
    assert_moments(Moments(*(t.cpu() for t in got)), by_numpy(rows, labels, 5))
    assert got.count[3] == 0
    assert got.mean[3].abs().max() == 0
    assert got.scatter[3].abs().max() == 0


@pytest.mark.parametrize("module", [ops, reference])
def test_features_far_from_zero_do_not_cancel(module):
    rows, labels = make_rows(300, 8, 2, torch.float64, 3)
    near = module.class_moments(rows, labels, 2)
    far = module.class_moments(rows + 1e8, labels, 2)
    # 1e8 leaves about 1e-8 of absolute precision in the input itself.
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-6, atol=1e-4)


def test_strided_features_and_labels():
    rows, labels = make_rows(60, 20, 3, torch.float32, 0)
    got = ops.class_moments(rows.T.contiguous().T[::2, ::3], labels[::2], 3)
    assert_moments(got, by_numpy(rows[::2, ::3], labels[::2], 3))


def test_scatter_is_symmetric_and_a_covariance():
    rows, labels = make_rows(400, 33, 1, torch.float32, 5)
    moments = ops.class_moments(rows, labels, 1)
    torch.testing.assert_close(moments.scatter, moments.scatter.mT, rtol=0, atol=0)
    torch.testing.assert_close(moments.scatter[0] / 399, torch.cov(rows.double().T))


X = torch.zeros(3, 2)
Y = torch.zeros(3, dtype=torch.int64)
S = ops.class_moments(X, Y, 2)


@pytest.mark.parametrize("function", [ops.class_moments, reference.class_moments])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), Y, 2), TypeError, r"features must be a floating tensor \[N, D\], got int32"),
        ((X[0], Y, 2), ValueError, r"features must be \[N, D\], got float32 \[2\]"),
        ((X, Y.int(), 2), TypeError, r"labels must be a int64 tensor \[3\], got int32"),
        ((X, Y[:2], 2), ValueError, r"labels must have shape \[3\], got int64 \[2\]"),
        ((X, Y + 2, 2), IndexError, "labels must lie in 0..1, got 2"),
        ((X, Y - 1, 2), IndexError, "labels must lie in 0..1, got -1"),
        ((X, Y, 0), ValueError, "num_classes must be a positive integer, got 0"),
        ((X, Y, 2.0), ValueError, "num_classes must be a positive integer, got 2.0"),
        ((X, Y, 3, S), ValueError, r"state.count must be \[3\], got int64 \[2\]"),
        ((X, Y, 2, S._replace(mean=S.mean.float())), TypeError, "state.mean must be a float64 tensor, got float32"),
        ((X, Y, 2, S._replace(scatter=S.scatter[:1])), ValueError, r"state.scatter must be \[2, 2, 2\]"),
        ((X, Y.to("meta"), 2), ValueError, "labels must be on cpu .* on meta"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"class_moments: {message}"):
        function(*arguments)
