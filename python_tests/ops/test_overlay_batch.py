from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, IMAGE_DTYPES, LAYOUTS, assert_same, golden, layouts, make_images, seeds, sides

from bbfast import ops
from bbfast.ops import reference

MEAN, STD = (0.4914, 0.4822, 0.4465, 0.5, 0.1), (0.247, 0.243, 0.261, 0.25, 0.9)
BLENDS = (("add_clip", 1.0), ("add_clip", 0.3), ("add_normalised", 0.5), ("convex", 0.6), ("convex", 1.0))


def draw(b: int, n: int, r: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    pairs = torch.stack((torch.randint(0, n, (b,), generator=g), torch.randint(0, r, (b,), generator=g)), 1)
    return pairs[pairs[:, 0].argsort()] if seed % 2 else pairs


@given(
    st.sampled_from((0, 1, 2, 9)),
    st.sampled_from((1, 3, 4, 5)),
    sides,
    sides,
    layouts,
    st.sampled_from(IMAGE_DTYPES),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from(BLENDS),
    seeds,
)
def test_agrees_with_the_reference_to_the_bit(b, c, h, w, layout, stored, dtype, channels_last, blend, seed):
    x, r = make_images((3, c, h, w), stored, layout, seed), make_images((4, c, h, w), stored, layout, seed + 1)
    options = {"blend": blend[0], "alpha": blend[1], "dtype": dtype, "channels_last": channels_last}
    if seed % 5:
        options |= {"mean": MEAN[:c], "std": STD[:c]}
    kept = x.clone(), r.clone()
    pairs = draw(b, 3, 4, seed)
    got = ops.overlay_batch(x, r, pairs, **options)
    assert_same(got, reference.overlay_batch(x, r, pairs, **options))
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(x, kept[0])
    assert torch.equal(r, kept[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_devices_agree(device, stored, dtype, layout, channels_last):
    for seed, size in enumerate((7, 16, 33)):
        x, r = (make_images((n, 3, size, size), stored, layout, seed + n) for n in (5, 9))
        pairs = draw(20, 5, 9, seed)
        options = {"mean": MEAN[:3], "std": STD[:3], "dtype": dtype, "channels_last": channels_last}
        got = ops.overlay_batch(x.to(device), r.to(device), pairs.to(device), **options)
        assert_same(got.cpu(), reference.overlay_batch(x, r, pairs, **options))


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("stored", [torch.uint8, torch.float64])
def test_by_formula(module, blend, stored):
    x, r = make_images((3, 3, 8, 9), stored, "contiguous", 0), make_images((4, 3, 8, 9), stored, "contiguous", 1)
    pairs, (name, alpha) = draw(7, 3, 4, 0), blend
    mean, std = (torch.tensor(v[:3], dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    a, b = (p.double() / (255 if stored == torch.uint8 else 1) for p in (x[pairs[:, 0]], r[pairs[:, 1]]))
    expected = {
        "add_clip": ((a + alpha * b).clamp(0, 1) - mean) / std,
        "add_normalised": (a - mean) / std + alpha * (b - mean) / std,
        "convex": (alpha * a + (1 - alpha) * b - mean) / std,
    }[name]
    options = {"mean": MEAN[:3], "std": STD[:3], "blend": name, "alpha": alpha}
    got = module.overlay_batch(x, r, pairs, dtype=torch.float64, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(module.overlay_batch(x, r, pairs, **options), expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("module", [ops, reference])
def test_every_byte_becomes_its_part_of_one(module):
    # The kernel divides by 255 without a division.
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero = torch.zeros_like(x)
    pairs = torch.zeros(1, 2, dtype=torch.int64)
    for channels_last in (False, True):
        for dtype in FLOATS:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for banks in ((x, zero), (zero, x)):
                got = module.overlay_batch(*banks, pairs, dtype=dtype, channels_last=channels_last)
                assert torch.equal(got, (x.to(wide) / 255).to(dtype))


@pytest.mark.parametrize("module", [ops, reference])
def test_saturation_by_hand(module):
    x = torch.tensor([[[[255, 100, 0]]]], dtype=torch.uint8)
    r = torch.tensor([[[[1, 100, 0]]], [[[51, 255, 255]]]], dtype=torch.uint8)
    pairs = torch.tensor([[0, 0], [0, 1]])
    got = module.overlay_batch(x, r, pairs, mean=[0.5], std=[0.5])
    torch.testing.assert_close(got.flatten(), torch.tensor([1, 200 / 127.5 - 1, -1, 1, 1, 1]))
    plain = module.overlay_batch(x, x, pairs[:1], mean=[0.5], std=[0.5], blend="add_normalised")
    assert plain.flatten()[0] == 2


@pytest.mark.parametrize("module", [ops, reference])
def test_nan_stays(module):
    x = torch.zeros(1, 1, 1, 3)
    r = torch.tensor([[[[0.0, float("nan"), float("inf")]]]])
    got = module.overlay_batch(x, r, torch.zeros(1, 2, dtype=torch.int64))
    assert got.flatten().isnan().tolist() == [False, True, False]
    assert got.flatten()[2] == 1


def test_golden_strip():
    data = {key: torch.from_numpy(value) for key, value in golden("strip").items()}
    # The reference sums normalised images, x + alpha r; the saved logits are those of images without overlays.
    mean, std = (torch.tensor(v[:3]).view(3, 1, 1) for v in (MEAN, STD))
    clean, inspected = (data[name] * std + mean for name in ("clean", "inspected"))
    draws = data["inspect_order"].expand(48, 64)
    pairs = torch.stack((torch.arange(48)[:, None].expand(48, 64), draws), 2).flatten(0, 1)
    options = {"mean": MEAN[:3], "std": STD[:3], "blend": "add_normalised", "alpha": 0.5}
    batch = ops.overlay_batch(inspected, clean, pairs, **options).view(48, 64, 3, 32, 32)
    expected = data["inspected"][:, None] + 0.5 * data["clean"][data["inspect_order"]]
    torch.testing.assert_close(batch, expected, rtol=0, atol=2e-6)
    # Some of the inspected pixels lie between two bytes.
    pixels = [(bank * 255).round().to(torch.uint8) for bank in (inspected, clean)]
    rounded = ops.overlay_batch(*pixels, pairs, **options).view_as(batch)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.5 / 255 / min(STD[:3]))


X = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
P = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize("function", [ops.overlay_batch, reference.overlay_batch])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.int(), X, P), {}, TypeError, "images must be a uint8 or floating tensor .* got int32"),
        ((X[0], X, P), {}, ValueError, r"images must have four dimensions \[N, C, H, W\], got uint8 \[3, 4, 4\]"),
        ((X, X.float(), P), {}, TypeError, "overlays must be a uint8 tensor like images, got float32"),
        ((X, None, P), {}, TypeError, "overlays must be a uint8 tensor like images, got NoneType"),
        ((X, X[:, :2], P), {}, ValueError, r"overlays must be \[R, 3, 4, 4\] like images, got uint8 \[3, 2, 4, 4\]"),
        ((X, X[0], P), {}, ValueError, r"overlays must be \[R, 3, 4, 4\] like images"),
        ((X, X.to("meta"), P), {}, ValueError, "overlays must be on cpu"),
        ((X, X, P.int()), {}, TypeError, r"pairs must be an int64 tensor \[B, 2\], got int32"),
        ((X, X, [(0, 1)]), {}, TypeError, r"pairs must be an int64 tensor \[B, 2\], got list"),
        ((X, X, P[0]), {}, ValueError, r"pairs must be \[B, 2\], got int64 \[2\]"),
        ((X, X, P.to("meta")), {}, ValueError, "pairs must be on cpu"),
        ((X, X, P + torch.tensor([3, 0])), {}, IndexError, r"pairs\[:, 0\] must lie in 0..2, got 3"),
        ((X, X, P - torch.tensor([0, 1])), {}, IndexError, r"pairs\[:, 1\] must lie in 0..2, got -1"),
        ((X, X[:0], P), {}, IndexError, r"pairs\[:, 1\] must lie in 0..-1, got 0"),
        ((X, X, P), {"mean": [0.5]}, ValueError, r"mean must be one number for each of 3 channels, got \[0.5\]"),
        ((X, X, P), {"std": [1, 0, 1]}, ValueError, "std must be positive"),
        ((X, X, P), {"dtype": torch.uint8}, TypeError, "dtype must be float32, bfloat16, float16 or float64, got"),
        ((X, X, P), {"blend": "multiply"}, ValueError, "blend must be one of add_clip, .* got 'multiply'"),
        ((X, X, P), {"alpha": 0}, ValueError, "alpha must be positive, .* got 0"),
        ((X, X, P), {"alpha": float("nan")}, ValueError, "alpha must be positive, .* got nan"),
        ((X, X, P), {"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ((X, X, P), {"alpha": 1.5, "blend": "convex"}, ValueError, "alpha must be positive, and at most 1"),
    ],
)
def test_bad_input_is_named(function, arguments, options, error, message):
    with pytest.raises(error, match=f"overlay_batch: {message}"):
        function(*arguments, **options)
