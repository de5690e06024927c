from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import (
    IMAGE_DTYPES,
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
)

from bbfast import ops
from bbfast.ops import reference

levels = st.sampled_from((2, 3, 5, 8, 11, 16, 32, 35, 100, 255, 256))


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, levels, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, count, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    where = make_where(kind, n, seed)
    before = x.clone()
    for dither in (False, True):
        for rounding in ("nearest", "truncate"):
            got = ops.quantize(x, count, dither, where, rounding=rounding)
            assert_same(got, reference.quantize(x, count, dither, where, rounding=rounding))
            assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_more_planes_than_lanes_and_rows_longer_than_a_tile(dtype, layout):
    x = make_images((23, 3, 35, 50), dtype, layout, 0)
    where = make_where("some", 23, 0)
    assert_same(ops.quantize(x, 6, True, where), reference.quantize(x, 6, True, where))


def test_whole_batch_at_imagenet_size():
    x = make_images((3, 3, 224, 224), torch.uint8, "contiguous", 0)
    for dither in (False, True):
        assert_same(ops.quantize(x, 8, dither), reference.quantize(x, 8, dither))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_every_byte_and_every_number_of_levels(rounding):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for count in range(2, 257):
        steps = [round(Fraction(v * (count - 1), 255)) for v in range(256)]
        exact = [Fraction(255 * s, count - 1) for s in steps]
        expected = [round(e) if rounding == "nearest" else int(e) for e in exact]
        assert ops.quantize(x, count, rounding=rounding).flatten().tolist() == expected, count
        assert reference.quantize(x, count, rounding=rounding).flatten().tolist() == expected, count


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, (height, width) in enumerate(((7, 16), (33, 21), (70, 1), (1, 70))):
        x = make_images((5, 3, height, width), dtype, layout, seed, device)
        where, count = make_where("some", 5, seed), (8, 11)[seed % 2]
        for dither in (False, True):
            for rounding in ("nearest", "truncate") if dtype == torch.uint8 else ("nearest",):
                got = ops.quantize(x, count, dither, where.to(device), rounding=rounding).cpu()
                assert_same(got, reference.quantize(x.cpu(), count, dither, where, rounding=rounding))


def test_known_values():
    """The ramp of the attack's specification."""
    ramp = (4 + 16 * torch.arange(16)).to(torch.uint8).view(1, 1, 4, 4)
    plain = [0, 36, 36, 36, 73, 73, 109, 109, 146, 146, 182, 182, 182, 219, 219, 255]
    dithered = [0, 36, 36, 36, 73, 73, 109, 109, 146, 146, 146, 182, 182, 219, 219, 255]
    for module in (ops, reference):
        assert module.quantize(ramp).flatten().tolist() == plain
        assert module.quantize(ramp, dither=True).flatten().tolist() == dithered


def diffuse(image: np.ndarray, steps: int) -> np.ndarray:
    """The textbook loop over one plane, in float64."""
    value = image.astype(np.float64)
    h, w = value.shape
    for y in range(h):
        for x in range(w):
            level = np.rint(value[y, x] * steps / 255) * 255 / steps
            error, value[y, x] = value[y, x] - level, level
            for dy, dx, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + dy < h and 0 <= x + dx < w:
                    value[y + dy, x + dx] += error * share / 16
    return np.rint(value).clip(0, 255).astype(np.uint8)


@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from((2, 4, 8, 16)), seeds)
def test_agrees_with_the_textbook_loop(h, w, count, seed):
    x = make_images((1, 2, h, w), torch.uint8, "contiguous", seed)
    expected = np.stack([diffuse(plane, count - 1) for plane in x[0].numpy()])
    got = ops.quantize(x.double() / 255, count, dither=True)[0] * 255
    np.testing.assert_array_equal(got.round().numpy(), expected)
    np.testing.assert_array_equal(ops.quantize(x, count, dither=True)[0].numpy(), expected)


@given(image_dtypes, levels, seeds)
def test_plain_levels_are_near_few_and_stay(dtype, count, seed):
    x = make_images((2, 3, 9, 9), dtype, "contiguous", seed)
    out = ops.quantize(x, count)
    top = 255 if dtype == torch.uint8 else 1
    assert out.unique().numel() <= count
    assert float((out.double() - x.double()).abs().max()) <= top / (count - 1) / 2 + (0.5 if top == 255 else 4e-3)
    torch.testing.assert_close(ops.quantize(out, count), out, rtol=0, atol=0)


def test_dithering_keeps_local_means():
    x = torch.full((1, 3, 32, 32), 122, dtype=torch.uint8) + torch.arange(32, dtype=torch.uint8) // 8
    means = torch.nn.functional.avg_pool2d(ops.quantize(x, dither=True).float(), 8)
    assert float((means - torch.arange(122.0, 126.0)).abs().max()) < 2
    assert set(ops.quantize(x, dither=True).unique().tolist()) == {109, 146}
    assert set(ops.quantize(x).unique().tolist()) == {109}


@pytest.mark.parametrize("count", [8, 5])
def test_golden_bpp_levels(count):
    data = golden("bpp")
    got = ops.quantize(nchw(data["images"]).float() / 255, count) * 255
    torch.testing.assert_close(got, torch.from_numpy(data[f"quant_float_{count}"]), rtol=0, atol=1e-4)
    plain = ops.quantize(nchw(data["images"]), count)
    torch.testing.assert_close(plain, torch.from_numpy(data[f"quant_float_{count}"]).round().to(torch.uint8))


@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
@pytest.mark.parametrize("count", [8, 5])
def test_golden_bpp_dithering_is_exact(count, prefix):
    data = golden("bpp")
    x = nchw(data[f"{prefix}images"])
    expected = nchw(data[f"{prefix}dither_{count}"])
    torch.testing.assert_close(ops.quantize(x, count, dither=True), expected, rtol=0, atol=0)
    if not prefix:
        raw = ops.quantize(x.double() / 255, count, dither=True) * 255
        torch.testing.assert_close(raw.float(), torch.from_numpy(data[f"dither_raw_{count}"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "dither", "rounding"), [("quant", False, "truncate"), ("dither", True, "nearest")])
def test_golden_bpp_test_images(mode, dither, rounding):
    data = golden("bpp")
    got = ops.quantize(nchw(data["images"]), 8, dither, rounding=rounding)
    expected = nchw(data[f"test_bd_png_8_{mode}"])
    torch.testing.assert_close(got.int(), expected.int(), rtol=0, atol=1)


@pytest.mark.parametrize("mode", ["quant", "dither"])
def test_golden_bpp_training_batch(mode):
    data = golden("bpp")
    x = torch.from_numpy(data[f"train_batch_in_8_{mode}"])[:4] * STD + MEAN
    got = ops.quantize(x, 8, mode == "dither")
    if mode == "dither":  # the reference rounds what its dithering returns
        got = (got * 255).round() / 255
    got = (got - MEAN) / STD
    expected = torch.from_numpy(data[f"train_batch_out_8_{mode}"])
    wrong = (got - expected[:4]).abs() > 1e-5
    assert float(wrong.float().mean()) < 0.005
    # The next four carry the change of another image, clamped; the rest stays as it is.
    index = data[f"train_neg_index_8_{mode}"][:4]
    change = nchw(data[f"test_bd_png_8_{mode}"][index]).float() - nchw(data[f"clean_test_png_8_{mode}"][index])
    negatives = torch.from_numpy(data[f"train_batch_in_8_{mode}"])[4:8] * STD + MEAN
    negatives = (ops.add(negatives, change / 255) - MEAN) / STD
    torch.testing.assert_close(negatives, expected[4:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["quant", "dither"])
def test_golden_bpp_cross_images(mode):
    """The test set's other images carry the change of another one, with the opposite sign. Where a sum leaves 0..255
    the reference's cast to bytes wraps; ours is clamped."""
    data = golden("bpp")
    x, index = nchw(data["images"]), data[f"cross_test_index_8_{mode}"]
    change = nchw(data[f"clean_test_png_8_{mode}"][index]).float() - nchw(data[f"test_bd_png_8_{mode}"][index])
    got, expected, exact = ops.add(x, change), nchw(data[f"cross_test_png_8_{mode}"]), x + change
    inside = (exact >= 0) & (exact <= 255)
    torch.testing.assert_close(got[inside], expected[inside], rtol=0, atol=0)
    assert 0.9 < float(inside.float().mean()) < 1
    torch.testing.assert_close(exact.remainder(256), expected.float(), rtol=0, atol=0)
    assert set(got[~inside].tolist()) == {0, 255}


def test_values_beyond_the_range_of_float_images():
    x = torch.tensor([[[[-0.4, -0.6, 1.4, 1.6, 1e9, -3e30, float("inf"), -float("inf")]]]])
    expected = [0, -1, 1, 2, 1e9, -3e30, float("inf"), -float("inf")]
    for module in (ops, reference):
        assert module.quantize(x, 2).flatten().tolist() == torch.tensor(expected).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dithering_rounds_large_numbers_as_the_reference(dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand((2, 3, 6, 20), generator=g, dtype=torch.float64) - 0.5) * 10 ** torch.arange(20.0)
    assert_same(ops.quantize(x.to(dtype), 4, True), reference.quantize(x.to(dtype), 4, True))


def test_carries_no_gradient():
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert not ops.quantize(x).requires_grad
    (x + (ops.quantize(x, dither=True) - x).detach()).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


X = torch.zeros(2, 3, 4, 4)
NAN, INF = X * float("nan"), torch.full_like(X, float("inf"))
NONE = torch.zeros(2, dtype=torch.bool)


@pytest.mark.parametrize("function", [ops.quantize, reference.quantize])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(),), TypeError, "images must be a uint8 or floating tensor .* got int32"),
        (([1],), TypeError, "images must be a uint8 or floating tensor .* got list"),
        ((X[0],), ValueError, r"images must have four dimensions .* got float32 \[3, 4, 4\]"),
        ((NAN,), ValueError, "images must not contain NaN"),
        ((NAN, 8, False, NONE), ValueError, "images must not contain NaN"),
        ((NAN, 8, True), ValueError, "images must not contain NaN"),
        ((NAN.double(), 8, True, NONE), ValueError, "images must not contain NaN"),
        ((INF, 8, True), ValueError, "images must be finite, and not huge, for dithering"),
        ((INF.half(), 8, True), ValueError, "images must be finite, and not huge, for dithering"),
        ((X + 1e38, 100, True), ValueError, "images must be finite, and not huge, for dithering"),
        ((X, 1), ValueError, r"levels must lie in 2\.\.256, got 1"),
        ((X, -3), ValueError, r"levels must lie in 2\.\.256, got -3"),
        ((X, 257), ValueError, r"levels must lie in 2\.\.256, got 257"),
        ((X, 10**30), ValueError, r"levels must lie in 2\.\.256, got 1000"),
        ((X, 8.0), TypeError, r"levels must be an integer, got float 8\.0"),
        ((X, True), TypeError, "levels must be an integer, got bool True"),
        ((X, None), TypeError, "levels must be an integer, got NoneType None"),
        ((X, 8, 1), TypeError, "dither must be a bool, got int 1"),
        ((X, 8, False, torch.ones(3, dtype=torch.bool)), ValueError, r"where must have shape \[2\]"),
        ((X, 8, False, torch.ones(2)), TypeError, "where must be a bool tensor"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"quantize: {message}"):
        function(*arguments)


def test_infinity_in_an_image_that_is_not_chosen_passes_through():
    for module in (ops, reference):
        assert_same(module.quantize(INF, 8, True, NONE), INF)


def test_unknown_rounding_is_named():
    with pytest.raises(ValueError, match="quantize: rounding must be 'nearest' or 'truncate', got 'up'"):
        ops.quantize(X, rounding="up")
