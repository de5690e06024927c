from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import (
    assert_same,
    batches,
    channels,
    chosen,
    golden,
    image_dtypes,
    layouts,
    make_images,
    make_where,
    nchw,
    on_every_device_dtype_and_layout,
    seeds,
    sides,
    uniform,
)

from bbfast import ops
from bbfast.ops import reference


def make_alpha(shape: tuple[int, ...], seed: int) -> float | torch.Tensor:
    n, _, h, w = shape
    kinds = (
        0.2,
        0.0,
        1,
        np.float32(0.3),
        uniform((n,), torch.float32, seed),
        uniform((h, w), torch.float64, seed),
        torch.tensor(0.3),
    )
    return kinds[seed % len(kinds)]


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    one = seed % 2 == 0 or n == 0
    pattern = make_images((1 if one else n, c, h, w), dtype, layout, seed + 1)
    pattern = pattern[0] if one else pattern
    if dtype == torch.uint8 and seed % 3 == 0:
        pattern = pattern.float() * 1.01 - 1
    alpha = make_alpha(x.shape, seed)
    where = make_where(kind, n, seed)
    before = x.clone()
    for rounding in ("nearest", "truncate"):
        got = ops.blend(x, pattern, alpha, where, rounding=rounding)
        assert_same(got, reference.blend(x, pattern, alpha, where, rounding=rounding))
        assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((5, 3, size, size), dtype, layout, seed, device)
        pattern = make_images((1, 3, size, size), dtype, layout, seed + 1)[0]
        where = make_where("some", 5, seed)
        for alpha in (0.2, uniform((5,), torch.float32, seed), uniform((size, size), torch.float32, seed)):
            there = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha
            for rounding in ("nearest", "truncate"):
                got = ops.blend(x, pattern.to(device), there, where.to(device), rounding=rounding)
                assert_same(got.cpu(), reference.blend(x.cpu(), pattern, alpha, where, rounding=rounding))


def test_whole_batch_at_imagenet_size():
    x = make_images((3, 3, 224, 224), torch.uint8, "contiguous", 0)
    assert_same(ops.blend(x, x[0], 0.1), reference.blend(x, x[0], 0.1))


@given(image_dtypes, seeds)
def test_the_ends_of_alpha_are_the_two_images(dtype, seed):
    x = make_images((3, 3, 8, 8), dtype, "contiguous", seed)
    pattern = make_images((1, 3, 8, 8), dtype, "contiguous", seed + 1)[0]
    torch.testing.assert_close(ops.blend(x, pattern, 0.0), x, rtol=0, atol=0)
    torch.testing.assert_close(ops.blend(x, pattern, 1.0), pattern.expand_as(x), rtol=0, atol=0)


def test_rounding():
    x = torch.tensor([[[[10, 11, 12, 13]]]], dtype=torch.uint8)
    pattern = torch.tensor([[[11.0, 12.0, 13.0, 14.0]]])
    assert ops.blend(x, pattern, 0.5).flatten().tolist() == [10, 12, 12, 14]
    assert ops.blend(x, pattern, 0.5, rounding="truncate").flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("trigger", ["synth", "ref"])
def test_golden_blended_is_exact(alpha, trigger):
    data = golden("blended")
    out = ops.blend(nchw(data["images"]), nchw(data[f"trigger_{trigger}"]), alpha, rounding="truncate")
    torch.testing.assert_close(out, nchw(data[f"out_{trigger}_{alpha}"]), rtol=0, atol=0)
    if alpha == 0.2:  # before the cast; the reference takes a part of it in float32
        exact = ops.blend(nchw(data["images"]).double(), nchw(data[f"trigger_{trigger}"]), alpha)
        torch.testing.assert_close(exact, nchw(data[f"float_{trigger}_0.2"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [None, (), (3,), (4, 5)])
@pytest.mark.parametrize("kind", [None, "some"])
@pytest.mark.parametrize("one", [True, False])
def test_gradients(shape, kind, one):
    n, c, h, w = 3, 2, 4, 5
    where = make_where(kind, n, 0)
    x = uniform((n, c, h, w), torch.float64, 1).requires_grad_()
    pattern = uniform((c, h, w) if one else (n, c, h, w), torch.float64, 2).requires_grad_()
    weight = uniform((n, c, h, w), torch.float64, 4)
    inputs = [x, pattern]
    if shape is not None:
        inputs.append(uniform(shape, torch.float64, 3, 0.05, 0.95).requires_grad_())

    def run(function, a):
        return function(a[0], a[1], a[2] if len(a) > 2 else 0.3, where)

    got = torch.autograd.grad((run(ops.blend, inputs) * weight).sum(), inputs)
    expected = torch.autograd.grad((run(reference.blend, inputs) * weight).sum(), inputs)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda *a: run(ops.blend, a), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: run(ops.blend, a), inputs)


X = torch.zeros(2, 3, 4, 4)
P = torch.zeros(3, 4, 4)


@pytest.mark.parametrize("function", [ops.blend, reference.blend])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), P, 0.5), TypeError, "blend: images must be a uint8 or floating tensor .* got int32"),
        ((X, P.to(torch.uint8), 0.5), TypeError, "blend: pattern must be a floating tensor .* got uint8"),
        ((X, P[0], 0.5), ValueError, r"blend: pattern must be \[3, 4, 4\] or \[2, 3, 4, 4\], got float32 \[4, 4\]"),
        ((X, P, 1.5), ValueError, "blend: alpha must lie in 0..1, got 1.5"),
        ((X, P, -0.1), ValueError, "blend: alpha must lie in 0..1, got -0.1"),
        ((X, P, float("nan")), ValueError, "blend: alpha must lie in 0..1, got nan"),
        ((X, P, torch.full((2,), 1.5)), ValueError, "blend: alpha must lie in 0..1"),
        ((X, P, torch.full((4, 4), -0.5)), ValueError, "blend: alpha must lie in 0..1"),
        ((X, P, torch.zeros(3)), ValueError, r"blend: alpha must be a number, \[2\] or \[4, 4\], got float32 \[3\]"),
        ((X, P, "half"), TypeError, "blend: alpha must be a number or a floating tensor, got str 'half'"),
        ((X, P, True), TypeError, "blend: alpha must be a number or a floating tensor, got bool True"),
        ((X, P, torch.zeros(2).to("meta")), ValueError, "blend: alpha must be on cpu .* on meta"),
        ((X * float("nan"), P, 0.5), ValueError, "blend: images must not contain NaN"),
        ((X, P * float("nan"), 0.5), ValueError, "blend: pattern must not contain NaN"),
        ((X, P, 0.5, torch.ones(1, dtype=torch.bool)), ValueError, r"blend: where must have shape \[2\]"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", [ops.blend, reference.blend])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_nan_in_the_pattern_of_uint8_images_is_found(function, rounding):
    with pytest.raises(ValueError, match="blend: pattern must not contain NaN"):
        function(X.to(torch.uint8), P * float("nan"), 0.5, rounding=rounding)


def test_unknown_rounding_is_named():
    with pytest.raises(ValueError, match="blend: rounding must be 'nearest' or 'truncate', got 'up'"):
        ops.blend(X, P, 0.5, rounding="up")
