from __future__ import annotations

import numpy as np
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

INF = float("inf")
# Ties, what lies beside them, what a float64 sum rounds to a whole number, and what is clamped.
HARD = (0.5, -0.5, 1.5, -2.5, 0.5 + 2**-24, 0.5 - 2**-25, -1e-14, -2e-14, -1e-30, 1e-30, 254.5, -255.5, 1e9, INF, -INF)


def make_delta(shape: tuple[int, ...], image_dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Noise of the images' range, with hard values for bytes; every third time in float64."""
    reach = 60.0 if image_dtype == torch.uint8 else 0.4
    wide = torch.float64 if seed % 3 == 0 or image_dtype == torch.float64 else torch.float32
    delta = uniform(shape, wide, seed, -reach, reach)
    if image_dtype == torch.uint8 and delta.numel() and seed % 2:
        place = torch.randint(0, delta.numel(), (40,), generator=torch.Generator().manual_seed(seed))
        delta.view(-1)[place] = torch.tensor(HARD, dtype=wide)[place % len(HARD)]
    return delta.to(image_dtype) if image_dtype != torch.uint8 and seed % 5 == 0 else delta


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    delta = make_delta((c, h, w) if seed % 2 == 0 else (n, c, h, w), dtype, seed)
    where = make_where(kind, n, seed)
    before = x.clone(), delta.clone()
    for rounding in ("nearest", "truncate"):
        got = ops.add(x, delta, where, rounding=rounding)
        assert_same(got, reference.add(x, delta, where, rounding=rounding))
        assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close((x, delta), before, rtol=0, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_with_every_hard_delta(rounding, shared, dtype):
    x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 1, 1, len(HARD)).contiguous()
    delta = torch.tensor(HARD, dtype=dtype).view(1, 1, -1)
    got = ops.add(x, delta if shared else delta.expand(256, 1, 1, -1), rounding=rounding)
    given = delta if rounding == "truncate" else delta.float()
    total = x.numpy().astype(np.float64) + given.numpy().astype(np.float64)
    whole = np.trunc(total) if rounding == "truncate" else np.rint(total)
    np.testing.assert_array_equal(got.numpy(), np.clip(whole, 0, 255).astype(np.uint8))


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((5, 3, size, size), dtype, layout, seed, device)
        where = make_where("some", 5, seed)
        for shape in ((3, size, size), (5, 3, size, size)):
            delta = make_delta(shape, dtype, seed)
            for rounding in ("nearest", "truncate"):
                got = ops.add(x, delta.to(device), where.to(device), rounding=rounding)
                assert_same(got.cpu(), reference.add(x.cpu(), delta, where, rounding=rounding))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_whole_batch_at_imagenet_size(dtype):
    x = make_images((3, 3, 224, 224), dtype, "channels_last", 0)
    delta = make_delta((3, 224, 224), dtype, 1)
    assert_same(ops.add(x, delta), reference.add(x, delta))


def test_rounding_and_clamping():
    x = torch.tensor([[[[10, 11, 12, 13, 250, 3]]]], dtype=torch.uint8)
    delta = torch.tensor([[[0.5, 0.5, -0.5, 0.75, 7.0, -4.0]]])
    assert ops.add(x, delta).flatten().tolist() == [10, 12, 12, 14, 255, 0]
    assert ops.add(x, delta, rounding="truncate").flatten().tolist() == [10, 11, 11, 13, 255, 0]
    assert ops.add(torch.tensor([[[[0.25, 0.75]]]]), torch.tensor([[[-0.5, 0.5]]])).flatten().tolist() == [0.0, 1.0]


def test_unchosen_images_pass_through_unclamped():
    x = torch.full((2, 1, 2, 2), 1.5)
    out = ops.add(x, torch.zeros(1, 2, 2), torch.tensor([True, False]))
    assert out.flatten(1).amax(1).tolist() == [1.0, 1.5]


@pytest.mark.parametrize("images", ["images", "gtsrb_images"])
@pytest.mark.parametrize("pattern", ["synth", "ref0", "ref1"])
def test_golden_lf_is_exact(images, pattern):
    data = golden("lf")
    delta = nchw(data[f"pattern_{pattern}"].astype(np.float64))
    out = ops.add(nchw(data[images]), delta[0] if delta.dim() == 4 else delta, rounding="truncate")
    expected = data[f"{'gtsrb_' if images != 'images' else ''}out_{pattern}"]
    torch.testing.assert_close(out, nchw(expected), rtol=0, atol=0)


@pytest.mark.parametrize("amplitude", ["1", "0.25"])
@pytest.mark.parametrize("corners", ["all-corners", "bottom-right"])
def test_golden_lc_is_exact(corners, amplitude):
    data = golden("lc")
    x, expected = nchw(data["images"]), nchw(data[f"out_{corners}_{amplitude}"])
    delta = (expected.double() - x.double()).sum(0).sign()
    inside = torch.zeros(3, 32, 32)
    inside[:, -3:, -3:] = 1
    if corners == "all-corners":
        inside += inside.flip(1) + inside.flip(2) + inside.flip((1, 2))
    assert torch.equal(delta.abs().float(), inside)
    out = ops.add(x, float(amplitude) * 255 * delta, rounding="truncate")
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    in_floats = ops.add(x.float() / 255, float(amplitude) * delta.float())
    torch.testing.assert_close(in_floats * 255, nchw(data[f"float_{corners}_{amplitude}"]), rtol=0, atol=1e-4)
    # For other sizes the reference repeats or drops pixels of the pattern, "nearest".
    larger = torch.nn.functional.interpolate(delta[None], (48, 64))[0]
    out = ops.add(nchw(data["images_48x64"]), float(amplitude) * 255 * larger, rounding="truncate")
    torch.testing.assert_close(out, nchw(data[f"out_48x64_{corners}_{amplitude}"]), rtol=0, atol=0)


@pytest.mark.parametrize("eps", ["0.01", "0.2"])
def test_golden_lira_is_an_addition_in_normalised_units(eps):
    data = golden("lira")
    noise = float(eps) * torch.from_numpy(data["autoencoder_out"]) * STD
    got = (ops.add(nchw(data["images"]).float() / 255, noise) - MEAN) / STD
    # The reference clips all channels to the widest of their ranges.
    expected = torch.from_numpy(data[f"bd_cifar10_{eps}"]).clamp((0 - MEAN) / STD, (1 - MEAN) / STD)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dataset", ["cifar100", "gtsrb", "tiny"])
def test_golden_lira_of_other_data_sets(dataset):
    """The reference clips normalised images to one range for all channels, those of GTSRB even to 0..1, the range of
    pixels. What it does not clip is what we compute."""
    data = golden("lira")
    noise = 0.2 * torch.from_numpy(data["autoencoder_out"]) * STD
    got = (ops.add(nchw(data["images"]).float() / 255, noise) - MEAN) / STD
    expected = torch.from_numpy(data[f"bd_{dataset}_0.2"])
    kept = (expected > expected.min()) & (expected < expected.max())
    kept &= (expected > (0 - MEAN) / STD) & (expected < (1 - MEAN) / STD)
    torch.testing.assert_close(got[kept], expected[kept], rtol=0, atol=1e-5)
    assert float(kept.float().mean()) > (0.2 if dataset == "gtsrb" else 0.9)


@pytest.mark.parametrize("kind", [None, "some"])
@pytest.mark.parametrize("one", [True, False])
def test_gradients(kind, one):
    n, c, h, w = 3, 2, 4, 5
    where = make_where(kind, n, 0)
    x = uniform((n, c, h, w), torch.float64, 1).requires_grad_()
    delta = uniform((c, h, w) if one else (n, c, h, w), torch.float64, 2, -0.6, 0.6).requires_grad_()
    weight = uniform((n, c, h, w), torch.float64, 4)
    got = torch.autograd.grad((ops.add(x, delta, where) * weight).sum(), [x, delta])
    expected = torch.autograd.grad((reference.add(x, delta, where) * weight).sum(), [x, delta])
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda *a: ops.add(*a, where), (x, delta))
    assert torch.autograd.gradgradcheck(lambda *a: ops.add(*a, where), (x, delta))


@pytest.mark.parametrize("module", [ops, reference])
def test_gradient_at_the_clamp_is_whole_at_its_ends(module):
    x = torch.tensor([[[[0.0, 0.5, 1.0, 1.0, 0.0]]]], requires_grad=True)
    delta = torch.tensor([[[0.0, 0.0, 0.0, 0.25, -0.25]]], requires_grad=True)
    module.add(x, delta).sum().backward()
    assert x.grad.flatten().tolist() == delta.grad.flatten().tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bit_images_keep_their_dtype(dtype):
    x = make_images((2, 3, 4, 4), dtype, "contiguous", 0).requires_grad_()
    delta = make_delta((3, 4, 4), torch.float32, 1).to(dtype).requires_grad_()
    ops.add(x, delta).float().square().sum().backward()
    assert x.grad.dtype == delta.grad.dtype == dtype


X = torch.zeros(2, 3, 4, 4)
D = torch.zeros(3, 4, 4)
NAN = float("nan")


@pytest.mark.parametrize("function", [ops.add, reference.add])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), D), TypeError, "add: images must be a uint8 or floating tensor .* got int32"),
        ((None, D), TypeError, "add: images must be a uint8 or floating tensor .* got NoneType"),
        ((X[0], D), ValueError, r"add: images must have four dimensions \[N, C, H, W\], got float32 \[3, 4, 4\]"),
        ((X, D.int()), TypeError, "add: delta must be a floating tensor, got int32"),
        ((X, 3.0), TypeError, "add: delta must be a floating tensor, got float 3.0"),
        ((X, D[0]), ValueError, r"add: delta must be \[3, 4, 4\] or \[2, 3, 4, 4\], got float32 \[4, 4\]"),
        ((X, D[0, 0]), ValueError, r"add: delta must be \[3, 4, 4\] or \[2, 3, 4, 4\], got float32 \[4\]"),
        ((X, D.to("meta")), ValueError, "add: delta must be on cpu .* on meta"),
        ((X * NAN, D), ValueError, "add: images must not contain NaN"),
        ((X, D * NAN), ValueError, "add: delta must not contain NaN"),
        ((X, X * NAN), ValueError, "add: delta must not contain NaN"),
        ((X, D * NAN, torch.zeros(2, dtype=torch.bool)), ValueError, "add: delta must not contain NaN"),
        ((X, X * NAN, torch.zeros(2, dtype=torch.bool)), ValueError, "add: delta must not contain NaN"),
        ((X.byte(), D * NAN), ValueError, "add: delta must not contain NaN"),
        ((X.byte(), X * NAN), ValueError, "add: delta must not contain NaN"),
        ((X, D, torch.ones(1, dtype=torch.bool)), ValueError, r"add: where must have shape \[2\]"),
        ((X, D, torch.ones(2)), TypeError, "add: where must be a bool tensor"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4)])
def test_nan_in_a_truncated_delta_is_found(shape):
    with pytest.raises(ValueError, match="add: delta must not contain NaN"):
        ops.add(X.byte(), torch.full(shape, NAN), rounding="truncate")


def test_unknown_rounding_is_named():
    with pytest.raises(ValueError, match="add: rounding must be 'nearest' or 'truncate', got 'up'"):
        ops.add(X, D, rounding="up")
