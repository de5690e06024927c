from __future__ import annotations

import pytest
import torch
from hypothesis import given
from op_cases import (
    MEAN,
    STD,
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

MASKS = ("hw", "1hw", "chw", "n1hw", "nchw", "bool", "binary")


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    n, c, h, w = shape
    if kind == "bool":
        return uniform((h, w), torch.float32, seed) < 0.5
    if kind == "binary":
        return (uniform((c, h, w), torch.float32, seed) < 0.5).to(dtype)
    sizes = {"hw": (h, w), "1hw": (1, h, w), "chw": (c, h, w), "n1hw": (n, 1, h, w), "nchw": shape}[kind]
    return uniform(sizes, dtype, seed)


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    mask = make_mask(MASKS[seed % len(MASKS)], x.shape, torch.float32, seed)
    one = seed % 2 == 0 or n == 0
    pattern = make_images((1 if one else n, c, h, w), dtype, layout, seed + 1)
    pattern = pattern[0] if one else pattern
    if dtype == torch.uint8 and seed % 3 == 0:
        pattern = pattern.float() * 1.01 - 1
    where = make_where(kind, n, seed)
    before = x.clone()
    got = ops.patch(x, pattern, mask, where)
    assert_same(got, reference.patch(x, pattern, mask, where))
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert got.numel() == 0 or got.data_ptr() != x.data_ptr()


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((5, 3, size, size), dtype, layout, seed, device)
        pattern, mask = (
            make_images((1, 3, size, size), dtype, layout, seed + 1)[0],
            uniform((size, size), torch.float32, seed),
        )
        where = make_where("some", 5, seed)
        got = ops.patch(x, pattern.to(device), mask.to(device), where.to(device))
        assert_same(got.cpu(), reference.patch(x.cpu(), pattern, mask, where))


def test_whole_batch_at_imagenet_size():
    x = make_images((3, 3, 224, 224), torch.uint8, "contiguous", 0)
    mask = uniform((224, 224), torch.float32, 1)
    assert_same(ops.patch(x, x[0], mask), reference.patch(x, x[0], mask))


@given(batches, image_dtypes, layouts, seeds)
def test_a_binary_mask_selects_exactly(n, dtype, layout, seed):
    x = make_images((n, 3, 8, 8), dtype, layout, seed)
    pattern = make_images((1, 3, 8, 8), dtype, "contiguous", seed + 1)[0]
    mask = uniform((8, 8), torch.float32, seed) < 0.5
    torch.testing.assert_close(ops.patch(x, pattern, mask), torch.where(mask, pattern, x), rtol=0, atol=0)


def test_uint8_rounds_half_to_even_and_clamps():
    x = torch.tensor([[[[0, 1, 2, 3, 200, 255]]]], dtype=torch.uint8)
    half = torch.full((1, 6), 0.5)
    pattern = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 900.0, -900.0]]])
    assert ops.patch(x, pattern, half).flatten().tolist() == [0, 2, 2, 4, 255, 0]


@pytest.mark.parametrize("name", ["white_square", "grid", "colour"])
@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
def test_golden_badnet_is_exact(name, prefix):
    data = golden("badnet")
    trigger = nchw(data[f"trigger_{name}"])
    # The reference decides element by element: a zero of the trigger is transparent.
    out = ops.patch(nchw(data[f"{prefix}images"]), trigger, trigger != 0)
    torch.testing.assert_close(out, nchw(data[f"{prefix}out_{name}"]), rtol=0, atol=0)


def test_golden_inputaware():
    """The generators' patterns through their masks, in normalised units, where the method trains, and in pixels."""
    data = {key: torch.from_numpy(value) for key, value in golden("inputaware").items()}
    x, pattern, mask = data["x_normalised"], data["patterns_normalised"], data["mask_thresholded"]
    pixels = nchw(data["images"].numpy())
    batch = ops.gather_augment(pixels, torch.arange(16), mean=MEAN.flatten().tolist(), std=STD.flatten().tolist())
    torch.testing.assert_close(batch, x, rtol=0, atol=0)
    torch.testing.assert_close((data["patterns"] - MEAN) / STD, pattern, rtol=0, atol=1e-5)
    torch.testing.assert_close((20 * data["masks"] - 10).tanh() / (2 + 1e-7) + 0.5, mask, rtol=0, atol=1e-5)
    # The cross samples of the file were given the same patterns, so they are the same images.
    for name in ("bd", "cross"):
        torch.testing.assert_close(ops.patch(x, pattern, mask), data[name], rtol=0, atol=1e-5)
        in_pixels = ops.patch(pixels.float() / 255, data["patterns"], mask)
        torch.testing.assert_close((in_pixels - MEAN) / STD, data[name], rtol=0, atol=1e-5)
    where = torch.arange(16) % 3 == 0
    some = ops.patch(x, pattern, mask, where)
    torch.testing.assert_close(some[where], data["bd"][where], rtol=0, atol=1e-5)
    torch.testing.assert_close(some[~where], x[~where], rtol=0, atol=0)


@pytest.mark.parametrize("shapes", [("chw", "hw"), ("nchw", "1hw"), ("chw", "chw"), ("nchw", "n1hw"), ("nchw", "nchw")])
@pytest.mark.parametrize("kind", [None, "some"])
def test_gradients(shapes, kind):
    n, c, h, w = 3, 2, 4, 5
    sizes = {"hw": (h, w), "1hw": (1, h, w), "chw": (c, h, w), "n1hw": (n, 1, h, w), "nchw": (n, c, h, w)}
    where = make_where(kind, n, 0)
    x = uniform((n, c, h, w), torch.float64, 1).requires_grad_()
    pattern = uniform(sizes[shapes[0]], torch.float64, 2).requires_grad_()
    mask = uniform(sizes[shapes[1]], torch.float64, 3, 0.05, 0.95).requires_grad_()
    weight = uniform((n, c, h, w), torch.float64, 4)
    inputs = (x, pattern, mask)
    got = torch.autograd.grad((ops.patch(*inputs, where) * weight).sum(), inputs)
    expected = torch.autograd.grad((reference.patch(*inputs, where) * weight).sum(), inputs)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda *a: ops.patch(*a, where), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ops.patch(*a, where), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_their_dtype(dtype):
    x = uniform((2, 3, 4, 4), dtype, 0).requires_grad_()
    pattern = uniform((3, 4, 4), dtype, 1).requires_grad_()
    mask = uniform((4, 4), torch.float32, 2).requires_grad_()
    got = torch.autograd.grad(ops.patch(x, pattern, mask).float().sum(), (x, pattern, mask))
    expected = torch.autograd.grad(reference.patch(x, pattern, mask).float().sum(), (x, pattern, mask))
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


X = torch.zeros(2, 3, 4, 4)
P = torch.zeros(3, 4, 4)
M = torch.zeros(4, 4)


@pytest.mark.parametrize("function", [ops.patch, reference.patch])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, P, M), TypeError, "patch: images must be a uint8 or floating tensor .* got NoneType"),
        ((X.long(), P, M), TypeError, "patch: images must be a uint8 or floating tensor .* got int64"),
        ((X[0], P, M), ValueError, r"patch: images must have four dimensions .* got float32 \[3, 4, 4\]"),
        ((X, P.to(torch.uint8), M), TypeError, "patch: pattern must be a floating tensor .* got uint8"),
        ((X, P[:2], M), ValueError, r"patch: pattern must be \[3, 4, 4\] or \[2, 3, 4, 4\], got float32 \[2, 4, 4\]"),
        ((X, P, M[:3]), ValueError, r"patch: mask must be \[4, 4\], .* got float32 \[3, 4\]"),
        ((X, P, M.long()), TypeError, "patch: mask must be a floating, bool or uint8 tensor, got int64"),
        ((X, P, M + 1.5), ValueError, "patch: mask must lie in 0..1"),
        ((X, P, M - 0.5), ValueError, "patch: mask must lie in 0..1"),
        ((X, P, M * float("nan")), ValueError, "patch: mask must lie in 0..1"),
        ((X * float("nan"), P, M), ValueError, "patch: images must not contain NaN"),
        ((X, P * float("nan"), M), ValueError, "patch: pattern must not contain NaN"),
        ((X.to(torch.uint8), P * float("nan"), M), ValueError, "patch: pattern must not contain NaN"),
        ((X, P, M, torch.ones(2)), TypeError, "patch: where must be a bool tensor"),
        ((X, P, M, torch.ones(3, dtype=torch.bool)), ValueError, r"patch: where must have shape \[2\], got bool \[3\]"),
        ((X, P.to("meta"), M), ValueError, "patch: pattern must be on cpu .* got float32 .* on meta"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_nan_in_an_image_that_is_passed_through_is_found():
    x = X.clone()
    x[1] = float("nan")
    with pytest.raises(ValueError, match="patch: images must not contain NaN"):
        ops.patch(x, P, M, torch.tensor([True, False]))
