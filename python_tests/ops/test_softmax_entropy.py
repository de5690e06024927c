from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, seeds, uniform

from bbfast import ops
from bbfast.ops import reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@given(
    st.sampled_from((0, 1, 3, 50)),
    st.sampled_from((1, 2, 10, 16, 17, 43, 128, 129, 1000)),
    st.sampled_from(FLOATS),
    st.sampled_from((0.1, 3.0, 40.0)),
    seeds,
)
def test_agrees_with_the_reference(n, k, dtype, scale, seed):
    logits = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)
    got = ops.softmax_entropy(logits)
    assert got.dtype == dtype
    torch.testing.assert_close(got, reference.softmax_entropy(logits), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert bool((got >= 0).all())
    assert bool((got.double() <= math.log(k) + 0.02).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 2, 3, 10, 31, 32, 33, 1000])
def test_devices_agree(device, dtype, k):
    logits = uniform((37, k), dtype, k, -8, 8)
    got = ops.softmax_entropy(logits.to(device)).cpu()
    torch.testing.assert_close(got, reference.softmax_entropy(logits), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("k", [1, 10, 128])
def test_a_row_does_not_depend_on_its_place(k):
    logits = uniform((37, k), torch.float32, k, -8, 8)
    alone = torch.cat([ops.softmax_entropy(row) for row in logits.split(1)])
    torch.testing.assert_close(ops.softmax_entropy(logits), alone, rtol=0, atol=0)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_values(module, dtype):
    inf = float("inf")
    logits = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],
            [1e30, 0.0, 0.0, 0.0],
            [0.0, 0.0, -inf, -inf],
            [0.0, math.log(3), -inf, -inf],
            [5e4, 5e4, -5e4, 0],
        ],
        dtype=dtype,
    )
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = torch.tensor([math.log(4), 0.0, math.log(2), quarter, math.log(2)], dtype=dtype)
    torch.testing.assert_close(module.softmax_entropy(logits), expected)


def test_agrees_with_the_distribution_of_torch():
    logits = uniform((20, 10), torch.float64, 0, -4, 4)
    torch.testing.assert_close(ops.softmax_entropy(logits), torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("module", [ops, reference])
def test_nan_gives_nan(module):
    logits = torch.zeros(2, 20)
    logits[1, 3] = float("nan")
    assert module.softmax_entropy(logits).isnan().tolist() == [False, True]


def test_strided_rows():
    logits = uniform((20, 30), torch.float32, 0, -4, 4)
    torch.testing.assert_close(
        ops.softmax_entropy(logits.T[::2, ::3]), ops.softmax_entropy(logits.T[::2, ::3].contiguous()), rtol=0, atol=0
    )


@pytest.mark.parametrize("k", [1, 5, 20])
def test_gradients(k):
    logits = uniform((4, k), torch.float64, k, -3, 3).requires_grad_()
    weight = uniform((4,), torch.float64, 1)
    (got,) = torch.autograd.grad((ops.softmax_entropy(logits) * weight).sum(), logits)
    (expected,) = torch.autograd.grad((reference.softmax_entropy(logits) * weight).sum(), logits)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(ops.softmax_entropy, logits)
    assert torch.autograd.gradgradcheck(ops.softmax_entropy, logits)


def test_gradient_at_a_class_of_probability_zero_is_finite():
    logits = torch.tensor([[0.0, 1.0, -float("inf")]], requires_grad=True)
    ops.softmax_entropy(logits).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("function", [ops.softmax_entropy, reference.softmax_entropy])
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"logits must be a floating tensor \[N, K\], got int64"),
        (None, TypeError, "logits must be a floating tensor .* got NoneType"),
        (torch.zeros(3), ValueError, r"logits must be \[N, K\] with K > 0, got float32 \[3\]"),
        (torch.zeros(3, 0), ValueError, r"logits must be \[N, K\] with K > 0, got float32 \[3, 0\]"),
    ],
)
def test_bad_input_is_named(function, logits, error, message):
    with pytest.raises(error, match=f"softmax_entropy: {message}"):
        function(logits)
