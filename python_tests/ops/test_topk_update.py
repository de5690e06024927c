from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, golden, seeds

from bbfast import ops
from bbfast.ops import TopK, reference

INF = float("inf")
SPECIAL = (float("nan"), INF, -INF, 0.0, -0.0)


def make(n: int, c: int, dtype: torch.dtype, seed: int, special: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Values with many ties, and ids in no order."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-5, 6, (n, c), generator=g).to(dtype)
    if special:
        place = torch.randint(0, 12, (n, c), generator=g)
        for i, value in enumerate(SPECIAL):
            x[place == i] = value
    return x, torch.randperm(3 * n + 1, generator=g)[:n]


def by_sorting(x: torch.Tensor, ids: torch.Tensor, k: int) -> TopK:
    values, kept = [], []
    for column in x.T.tolist():
        rows = [(-INF if v != v else v, i) for v, i in zip(column, ids.tolist(), strict=True)]
        rows = sorted(rows, key=lambda row: (-row[0], row[1]))[:k]
        rows += [(-INF, -1)] * (k - len(rows))
        values.append([v for v, _ in rows])
        kept.append([i for _, i in rows])
    shape = (x.shape[1], k)
    return TopK(
        torch.tensor(values, dtype=x.dtype).view(shape),
        torch.tensor(kept, dtype=torch.int64).view(shape),
        x.isnan().sum(0),
    )


def assert_equal(got: TopK, expected: TopK) -> None:
    assert isinstance(got, TopK)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@given(
    st.sampled_from((0, 1, 2, 7, 60)),
    st.sampled_from((0, 1, 3, 31, 32, 33, 70)),
    st.sampled_from((1, 2, 10, 33, 100)),
    st.sampled_from(FLOATS),
    st.booleans(),
    seeds,
)
def test_equals_a_full_sort(n, c, k, dtype, special, seed):
    x, ids = make(n, c, dtype, seed, special)
    kept = x.clone()
    expected = by_sorting(x, ids, k)
    for module in (ops, reference):
        assert_equal(module.topk_update(None, x, ids, k), expected)
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.sampled_from((1, 4, 40)), st.booleans(), seeds)
def test_batches_and_their_order_do_not_matter(sizes, k, special, seed):
    x, ids = make(sum(sizes), 5, torch.float32, seed, special)
    expected = by_sorting(x, ids, k)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = list(zip(x.split(sizes), ids.split(sizes), strict=True))
    for module in (ops, reference):
        state = None
        for i in order:
            kept = None if state is None else TopK(*(t.clone() for t in state))
            after = module.topk_update(state, *parts[i], k)
            if state is not None:
                assert_equal(state, kept)
            state = after
        assert_equal(state, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 10, 32, 33, 300])
def test_devices_agree(device, dtype, k):
    x, ids = make(500, 77, dtype, k, special=True)
    state = ops.topk_update(None, x[:200].to(device), ids[:200].to(device), k)
    got = ops.topk_update(state, x[200:].to(device), ids[200:].to(device), k)
    assert_equal(TopK(*(t.cpu() for t in got)), by_sorting(x, ids, k))


@pytest.mark.parametrize("module", [ops, reference])
def test_by_hand(module):
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [float("nan"), 5.0], [3.0, -INF]])
    got = module.topk_update(None, x, torch.tensor([7, 9, 2, 8]), 3)
    assert got.values.tolist() == [[3, 3, 1], [5, 5, 5]]
    assert got.ids.tolist() == [[8, 9, 7], [2, 7, 9]]
    assert got.nans.tolist() == [1, 0]
    more = module.topk_update(got, torch.tensor([[3.0, 4.0]]), torch.tensor([1]), 3)
    assert more.ids.tolist() == [[1, 8, 9], [2, 7, 9]]
    all_of_them = module.topk_update(None, x, torch.tensor([7, 9, 2, 8]), 6)
    # NaN counts as minus infinity, which still comes before a free place.
    assert all_of_them.ids.tolist() == [[8, 9, 7, 2, -1, -1], [2, 7, 9, 8, -1, -1]]
    assert all_of_them.values[:, 4:].tolist() == [[-INF, -INF]] * 2


def test_a_state_in_another_order_is_taken_as_it_is():
    x, ids = make(40, 6, torch.float32, 0)
    state = ops.topk_update(None, x[:20], ids[:20], 8)
    mixed = TopK(state.values.flip(1).roll(3, 1), state.ids.flip(1).roll(3, 1), state.nans)
    assert_equal(ops.topk_update(mixed, x[20:], ids[20:], 8), by_sorting(x, ids, 8))


def test_strided_activations():
    x, ids = make(40, 30, torch.float32, 0)
    rows = x.T.contiguous().T[::2, ::3]
    assert_equal(ops.topk_update(None, rows, ids[::2], 4), by_sorting(rows, ids[::2], 4))


def test_golden_tac_features():
    sums = torch.from_numpy(golden("tac")["feature_bd_sum_1"])
    got = ops.topk_update(None, sums, torch.arange(20), 5)
    best = sums.sort(dim=0, descending=True)
    torch.testing.assert_close(got.values, best.values[:5].T, rtol=0, atol=0)
    assert torch.equal(got.ids, best.indices[:5].T)


X = torch.zeros(3, 2)
I = torch.arange(3)  # noqa: E741
S = ops.topk_update(None, X, I, 4)


@pytest.mark.parametrize("function", [ops.topk_update, reference.topk_update])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, X.int(), I, 4), TypeError, r"activations must be a floating tensor \[N, C\], got int32"),
        ((None, None, I, 4), TypeError, r"activations must be a floating tensor \[N, C\], got NoneType"),
        ((None, X.to_sparse(), I, 4), TypeError, "activations must be a floating tensor .* got sparse_coo float32"),
        ((None, X[0], I, 4), ValueError, r"activations must be \[N, C\], got float32 \[2\]"),
        ((None, X, I.int(), 4), TypeError, r"index must be a int64 tensor \[3\], got int32"),
        ((None, X, I[:2], 4), ValueError, r"index must have shape \[3\], got int64 \[2\]"),
        ((None, X, I.to("meta"), 4), ValueError, "index must be on cpu .* on meta"),
        ((None, X, I - 1, 4), IndexError, "index must not be negative, got -1"),
        ((None, X, I, 0), ValueError, "k must be a positive integer, got 0"),
        ((None, X, I, 2.0), ValueError, "k must be a positive integer, got 2.0"),
        ((S, X, I, 5), ValueError, r"state.values must be \[2, 5\], got float32 \[2, 4\]"),
        ((S, X[:, :1], I, 4), ValueError, r"state.values must be \[1, 4\], got float32 \[2, 4\]"),
        ((S, X.double(), I, 4), TypeError, "state.values must be a float64 tensor, got float32"),
        ((S._replace(ids=S.values), X, I, 4), TypeError, "state.ids must be a int64 tensor, got float32"),
        ((S._replace(nans=S.nans.to("meta")), X, I, 4), ValueError, "state.nans must be on cpu"),
        (([1], X, I, 4), TypeError, "state must be a TopK or None, got list"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"topk_update: {message}"):
        function(*arguments)
