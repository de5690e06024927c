from __future__ import annotations

import pytest
import torch
from hypothesis import given
from op_cases import (
    FLOATS,
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


def identity_grid(h: int, w: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, h, dtype=dtype), torch.linspace(-1, 1, w, dtype=dtype), indexing="ij")
    return torch.stack((x, y), 2)


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    shared = seed % 2 == 0
    grid = uniform(
        (h, w, 2) if shared else (n, h, w, 2), torch.float64 if dtype == torch.float64 else torch.float32, seed
    )
    grid = grid * 2.6 - 1.3
    where = make_where(kind, n, seed)
    before = x.clone()
    for rounding in ("nearest", "truncate"):
        got = ops.warp(x, grid, where, rounding=rounding)
        assert_same(got, reference.warp(x, grid, where, rounding=rounding))
        assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((5, 3, size, size), dtype, layout, seed, device)
        where = make_where("some", 5, seed)
        for shape in ((size, size, 2), (5, size, size, 2)):
            grid = uniform(shape, torch.float64 if dtype == torch.float64 else torch.float32, seed, -1.3, 1.3)
            for rounding in ("nearest", "truncate"):
                got = ops.warp(x, grid.to(device), where.to(device), rounding=rounding)
                assert_same(got.cpu(), reference.warp(x.cpu(), grid, where, rounding=rounding))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 4), (33, 32)])
def test_agrees_with_grid_sample(dtype, size):
    h, w = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = make_images((4, 3, h, w), dtype, "contiguous", 0)
    grid = uniform((4, h, w, 2), wide, 1, -1.4, 1.4)
    expected = torch.nn.functional.grid_sample(x.to(wide), grid, "bilinear", "zeros", align_corners=True)
    got = ops.warp(x, grid)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got.to(wide), expected, rtol=0, atol=tolerance)


@given(batches, channels, image_dtypes, seeds)
def test_pixel_centres_give_the_pixels(n, c, dtype, seed):
    # 2^k + 1 pixels a side: the centres -1..1 are exact, and so are the pixels.
    x = make_images((n, c, 9, 17), dtype, "contiguous", seed)
    torch.testing.assert_close(ops.warp(x, identity_grid(9, 17)), x, rtol=0, atol=0)


def test_outside_counts_as_zero():
    x = torch.full((1, 1, 3, 3), 200, dtype=torch.uint8)
    far = torch.full((3, 3, 2), 3.0)
    assert ops.warp(x, far).max() == 0
    assert ops.warp(x, torch.full((3, 3, 2), 1e30)).max() == 0
    half = identity_grid(3, 3)
    half[..., 0] += 0.5  # half a pixel to the right: the last column mixes with the outside
    assert ops.warp(x, half)[0, 0, 0].tolist() == [200, 200, 100]


def test_rounding():
    x = torch.tensor([[[[10, 11, 12, 12, 13]]]], dtype=torch.uint8)
    grid = identity_grid(1, 5)
    grid[..., 0] = torch.tensor([-0.75, -0.25, 0.25, 0.75, 1.0])  # between two pixels, four times
    grid[..., 1] = 0.0
    assert ops.warp(x, grid).flatten().tolist() == [10, 12, 12, 12, 13]
    assert ops.warp(x, grid, rounding="truncate").flatten().tolist() == [10, 11, 12, 12, 13]


def test_infinite_coordinates_lie_outside():
    x = torch.ones(1, 1, 2, 2)
    grid = identity_grid(2, 2)
    grid[0, 0, 0] = float("inf")
    grid[1, 1, 1] = -float("inf")
    assert ops.warp(x, grid).flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_wanet(case):
    data = golden("wanet")
    grid = torch.from_numpy(data[f"grid_{case}"])[0]
    clean = torch.from_numpy(data[f"train_batch_in_{case}"])
    # First four samples carry the warp, the next eight a noisy one, the rest stays.
    out = ops.warp(clean, grid, torch.arange(16) < 4)
    noisy = (grid + (2 * torch.from_numpy(data[f"train_cross_rand_{case}"]) - 1) / 32).clamp(-1, 1)
    out[4:12] = ops.warp(clean[4:12], noisy)
    expected = torch.from_numpy(data[f"train_batch_out_{case}"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    # The test images: warped when normalised, then back to bytes by truncation.
    pixels = nchw(data["images"])
    normalised = (pixels / 255 - MEAN) / STD
    bytes_ = (ops.warp(normalised, grid) * STD + MEAN).mul(255).clamp(0, 255).to(torch.uint8)
    difference = bytes_.int() - nchw(data[f"test_bd_png_{case}"]).int()
    assert difference.abs().max() <= 1
    # Straight on bytes and rounded, no error of normalising is truncated: at most one less than ours is what the
    # reference saved. Outside the image the reference puts a normalised zero, the mean colour; the clamped grid has
    # no point outside.
    ours = ops.warp(pixels, grid).int() - nchw(data[f"test_bd_png_{case}"]).int()
    assert ours.min() >= 0
    assert ours.max() <= 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", [None, "some"])
def test_gradients(shared, kind):
    n, c, h, w = 3, 2, 4, 5
    where = make_where(kind, n, 0)
    x = uniform((n, c, h, w), torch.float64, 1).requires_grad_()
    grid = uniform((h, w, 2) if shared else (n, h, w, 2), torch.float64, 2, -1.2, 1.2).requires_grad_()
    weight = uniform((n, c, h, w), torch.float64, 4)
    got = torch.autograd.grad((ops.warp(x, grid, where) * weight).sum(), (x, grid))
    expected = torch.autograd.grad((reference.warp(x, grid, where) * weight).sum(), (x, grid))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda a, b: ops.warp(a, b, where), (x, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_their_dtype(dtype):
    x = uniform((2, 3, 5, 5), dtype, 0).requires_grad_()
    grid = uniform((5, 5, 2), torch.float32, 1, -1, 1).requires_grad_()
    got = torch.autograd.grad(ops.warp(x, grid).float().sum(), (x, grid))
    expected = torch.autograd.grad(reference.warp(x, grid).float().sum(), (x, grid))
    assert [g.dtype for g in got] == [dtype, torch.float32]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


X = torch.zeros(2, 3, 4, 4)
G = torch.zeros(4, 4, 2)


@pytest.mark.parametrize("function", [ops.warp, reference.warp])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.bool(), G), TypeError, "warp: images must be a uint8 or floating tensor .* got bool"),
        ((X, G.int()), TypeError, "warp: grid must be a floating tensor, got int32"),
        ((X, G[:3]), ValueError, r"warp: grid must be \[4, 4, 2\] or \[2, 4, 4, 2\], got float32 \[3, 4, 2\]"),
        ((X, G.to("meta")), ValueError, "warp: grid must be on cpu .* on meta"),
        ((X * float("nan"), G), ValueError, "warp: images must not contain NaN"),
        ((X, G * float("nan")), ValueError, "warp: grid must not contain NaN"),
        ((X, G.expand(2, 4, 4, 2) * float("nan")), ValueError, "warp: grid must not contain NaN"),
        ((X, G, torch.ones(2, dtype=torch.uint8)), TypeError, "warp: where must be a bool tensor"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_unknown_rounding_is_named():
    with pytest.raises(ValueError, match="warp: rounding must be 'nearest' or 'truncate', got 'floor'"):
        ops.warp(X, G, rounding="floor")
