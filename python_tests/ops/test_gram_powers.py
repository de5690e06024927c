from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, golden, layouts, make_images, seeds

from bbfast import ops
from bbfast.ops import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def by_numpy(x: torch.Tensor, orders: tuple[int, ...], compat: bool) -> torch.Tensor:
    """The definition in float64 (long double for the sums, which holds all powers)."""
    f = x.flatten(2).double().numpy().astype(np.longdouble)
    rows, columns = np.triu_indices(f.shape[1])
    result = []
    for p in orders:
        raised = f if compat else f**p
        gram = np.einsum("ncs,nds->ncd", raised, raised)[:, rows, columns]
        result.append(np.sign(gram) * np.abs(gram) ** (np.longdouble(1) / p))
    return torch.from_numpy(np.stack(result, 1).astype(np.float64))


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Near relative to what an entry would be if nothing cancelled."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@given(
    st.sampled_from((0, 1, 2, 3)),
    st.sampled_from((0, 1, 3, 4, 31, 33, 70)),
    st.sampled_from((0, 1, 3, 8)),
    st.sampled_from((1, 5, 8)),
    st.sampled_from(FLOATS),
    layouts,
    st.sampled_from(((1,), (2, 1), (3, 5, 7), (4, 8), (6, 16, 32), ())),
    st.booleans(),
    seeds,
)
def test_agrees_with_numpy_and_the_reference(n, c, h, w, dtype, layout, orders, compat, seed):
    # All values of one sign, so that the sums are as exact as their terms.
    x = make_images((n, c, h, w), dtype, layout, seed)
    before = x.clone()
    expected = by_numpy(x, orders, compat) if orders else torch.zeros(n, 0, c * (c + 1) // 2, dtype=torch.float64)
    got = ops.gram_powers(x, orders, compat=compat)
    assert_near(got, expected, dtype)
    assert_near(reference.gram_powers(x, orders, compat=compat), expected, dtype)
    assert torch.equal(ops.gram_powers(x.flatten(2), orders, compat=compat), got)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@given(st.sampled_from((1, 2, 5, 40)), st.integers(1, 8), st.booleans(), seeds)
def test_signs(c, order, compat, seed):
    x = torch.randn(2, c, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = by_numpy(x, (order,), compat)
    size = by_numpy(x.abs(), (order,), compat)
    for module in (ops, reference):
        for dtype in (torch.float64, torch.float32):
            got = module.gram_powers(x.to(dtype), [order], compat=compat).double()
            # A sum that cancels is off by eps times what it would have been; then the root is taken.
            noise = 100 * torch.finfo(dtype).eps
            low, high = (expected.sign() * expected.abs() ** order + s * noise * size**order for s in (-1, 1))
            assert bool((got >= low.sign() * low.abs() ** (1 / order) - noise * size).all())
            assert bool((got <= high.sign() * high.abs() ** (1 / order) + noise * size).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("compat", [False, True])
def test_devices_agree(device, dtype, layout, compat):
    for shape in ((3, 65, 7, 7), (2, 130, 2, 3), (40, 5, 1, 1)):
        x = make_images(shape, dtype, layout, 0)
        got = ops.gram_powers(x.to(device), (1, 2, 3, 8), compat=compat)
        assert_near(got.cpu(), by_numpy(x, (1, 2, 3, 8), compat), dtype)


@pytest.mark.parametrize("module", [ops, reference])
def test_by_hand(module):
    x = torch.tensor([[[1.0, 2.0], [-3.0, 1.0]]])
    # F F^T = [[5, -1], [., 10]]; squares [[1, 4], [9, 1]]: [[17, 13], [., 82]]; cubes [[1, 8], [-27, 1]].
    expected = torch.tensor(
        [[5, -1, 10], [17**0.5, 13**0.5, 82**0.5], [65 ** (1 / 3), -(19 ** (1 / 3)), 730 ** (1 / 3)]]
    )
    torch.testing.assert_close(module.gram_powers(x, [1, 2, 3])[0], expected)
    plain = torch.tensor([[5, -1, 10], [5**0.5, -1, 10**0.5], [5 ** (1 / 3), -1, 10 ** (1 / 3)]])
    torch.testing.assert_close(module.gram_powers(x, [1, 2, 3], compat=True)[0], plain)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_scale_overflows_or_vanishes(module, dtype):
    x = torch.rand(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1e-17, 1e17):
        scaled = (x * size).to(dtype)
        assert_near(module.gram_powers(scaled), by_numpy(scaled, tuple(range(1, 9)), False), dtype)
        assert_near(module.gram_powers(scaled, compat=True), by_numpy(scaled, tuple(range(1, 9)), True), dtype)
    # Channels a billion times apart, in one sample.
    mixed = (x * 10.0 ** torch.linspace(-9, 9, 20, dtype=torch.float64)[:, None]).to(dtype)
    assert_near(module.gram_powers(mixed), by_numpy(mixed, tuple(range(1, 9)), False), dtype)


def test_order_one_is_exact():
    x = torch.randint(-8, 9, (3, 33, 25), generator=torch.Generator().manual_seed(0)).float()
    rows, columns = torch.triu_indices(33, 33)
    assert torch.equal(ops.gram_powers(x, [1])[:, 0], (x @ x.mT)[:, rows, columns])


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("order", [1, 3])
def test_zero_nan_and_infinity(module, order):
    x = torch.ones(1, 4, 3)
    x[0, 0] = 0
    x[0, 1, 1] = float("nan")
    x[0, 2, 1] = float("inf")
    got = module.gram_powers(x, [order])[0, 0]
    entry = dict(zip([(i, j) for i in range(4) for j in range(i, 4)], got.tolist(), strict=True))
    assert entry[0, 0] == entry[0, 3] == 0
    for i, j in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        assert np.isnan(entry[i, j]), (i, j)
    assert entry[2, 2] == entry[2, 3] == float("inf")
    assert entry[3, 3] == pytest.approx(3 ** (1 / order))


def test_golden_beatrix():
    data = golden("beatrix")
    orders = range(1, 9)
    rows, columns = torch.triu_indices(12, 12)
    upper = rows * 12 + columns

    def saved(name: str) -> torch.Tensor:
        return torch.from_numpy(data[name])[..., upper]

    first = saved("gram_power_first3").transpose(0, 1)
    test = torch.from_numpy(data["features_test"])[:3]
    torch.testing.assert_close(ops.gram_powers(test, orders, compat=True), first, rtol=1e-5, atol=1e-5)
    # The paper's power is missing there: order 1 is the same, the others are not.
    right = ops.gram_powers(test, orders)
    torch.testing.assert_close(right[:, 0], first[:, 0], rtol=1e-5, atol=1e-5)
    assert all(float((right[:, p] / first[:, p]).max()) > 1.3 for p in range(1, 8))
    clean = ops.gram_powers(torch.from_numpy(data["features_clean"]), orders, compat=True)
    median = clean.median(0).values
    torch.testing.assert_close(median, saved("medians"), rtol=1e-5, atol=1e-5)
    deviation = (clean - median).abs().median(0).values
    torch.testing.assert_close(deviation, saved("mads"), rtol=1e-3, atol=1e-5)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize("function", [ops.gram_powers, reference.gram_powers])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(),), TypeError, "features must be a floating tensor, got int32"),
        ((None,), TypeError, "features must be a floating tensor, got NoneType"),
        ((X[0],), ValueError, r"features must be \[N, C, S\] or \[N, C, H, W\], got float32 \[3, 4\]"),
        ((X, 3), TypeError, "orders must be a sequence of integers, got int 3"),
        ((X, "12"), TypeError, "orders must be a sequence of integers, got str '12'"),
        ((X, [1.5]), TypeError, "orders must be integers, got float 1.5"),
        ((X, [True]), TypeError, "orders must be integers, got bool True"),
        ((X, [1, 0]), ValueError, "orders must lie in 1..32, got 0"),
        ((X, [33]), ValueError, "orders must lie in 1..32, got 33"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"gram_powers: {message}"):
        function(*arguments)
