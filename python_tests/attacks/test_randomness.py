"""Per-sample random numbers depend on key and sample alone, and are random enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbfast.attacks.randomness import _mix, _signed, integers, make_key, uniform


def splitmix64(state: int) -> int:
    """The published finaliser in Python's integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(0, 2**64 - 1))
def test_mix_is_splitmix64(value: int) -> None:
    assert int(_mix(torch.tensor([_signed(value)]))[0]) % 2**64 == splitmix64(value)


def test_a_sample_draws_the_same_whatever_the_batch() -> None:
    key = make_key("test", 3)
    every = uniform(key, torch.arange(1000), (4, 5))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(key, order, (4, 5)), every[order])
    assert torch.equal(uniform(key, torch.tensor([17]), (4, 5))[0], every[17])
    # More numbers for a sample leave the first ones as they are.
    assert torch.equal(uniform(key, torch.arange(1000), (7, 5))[:, :4], every)


def test_keys_and_samples_differ() -> None:
    rows = torch.arange(50)
    draws = [uniform(make_key("a", seed), rows, (8,)) for seed in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.cat(draws).unique().numel() == 3 * 50 * 8


def test_uniform_is_uniform() -> None:
    drawn = uniform(make_key("moments"), torch.arange(20_000), (5,), -1.0, 1.0).double()
    assert drawn.min() >= -1 and drawn.max() < 1
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.var()) - 1 / 3) < 0.01
    counts = np.histogram(drawn.numpy(), bins=64, range=(-1, 1))[0]
    assert ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 120  # chi-square, 63 degrees of freedom
    neighbours = torch.corrcoef(torch.stack([drawn[:-1, 0], drawn[1:, 0]]))[0, 1]
    within = torch.corrcoef(drawn.T) - torch.eye(5, dtype=torch.float64)
    assert abs(float(neighbours)) < 0.03 and float(within.abs().max()) < 0.03


@pytest.mark.parametrize(("low", "high"), [(-5, 5), (0, 1), (3, 3), (0, 2**31 - 1)])
def test_integers_cover_their_range(low: int, high: int) -> None:
    drawn = integers(make_key("int"), torch.arange(5000), (2,), low, high)
    assert drawn.dtype == torch.int64 and drawn.shape == (5000, 2)
    assert int(drawn.min()) >= low and int(drawn.max()) <= high
    if high - low < 100:
        assert set(drawn.unique().tolist()) == set(range(low, high + 1))


def test_golden_values() -> None:
    """Stored results are regenerated from these numbers: two of 24 bits from each word of the stream."""
    step, key = 0x9E3779B97F4A7C15, make_key("golden", 0)
    rows = (0, 1, 2**40)
    words = [[splitmix64(splitmix64(row * step + key) + j * step) for j in (1, 2)] for row in rows]
    expected = [[w >> 40, w >> 8 & 0xFFFFFF, v >> 40] for w, v in words]
    drawn = uniform(key, torch.tensor(rows), (3,))
    assert drawn.tolist() == [[value / 2**24 for value in row] for row in expected]


def test_large_and_empty_draws() -> None:
    key = make_key("large")
    whole = uniform(key, torch.arange(70), (32, 32, 2))
    assert torch.equal(uniform(key, torch.arange(33, 70), (32, 32, 2)), whole[33:])
    assert uniform(key, torch.arange(0), (4,)).shape == (0, 4)
    assert uniform(key, torch.arange(3), (0,)).shape == (3, 0)


@pytest.mark.gpu
def test_cuda_draws_the_same_bits() -> None:
    key, rows = make_key("device"), torch.arange(1000)
    assert torch.equal(uniform(key, rows.cuda(), (32, 32, 2)).cpu(), uniform(key, rows, (32, 32, 2)))
    assert torch.equal(integers(key, rows.cuda(), (2,), -5, 5).cpu(), integers(key, rows, (2,), -5, 5))
