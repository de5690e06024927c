from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from op_cases import (
    IMAGE_DTYPES,
    assert_same,
    golden,
    layouts,
    make_images,
    nchw,
    on_every_device_dtype_and_layout,
    seeds,
    sides,
)

from bbfast import ops
from bbfast.ops import reference

MEAN, STD = (0.4914, 0.4822, 0.4465, 0.5), (0.247, 0.243, 0.261, 0.25)


def draws(b: int, m: int, padding: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, m, (b,), generator=g)
    return index, torch.randint(0, 2 * padding + 1, (b, 2), generator=g), torch.rand(b, generator=g) < 0.5


@given(
    st.sampled_from((0, 1, 3, 7)),
    st.sampled_from((1, 2, 3, 4)),
    sides,
    sides,
    layouts,
    st.sampled_from(IMAGE_DTYPES),
    st.booleans(),
    st.sampled_from((0, 1, 4, 40)),
    seeds,
)
def test_agrees_with_the_reference_to_the_bit(b, c, h, w, layout, dtype, channels_last, padding, seed):
    x = make_images((5, c, h, w), torch.uint8, layout, seed)
    index, offset, flip = draws(b, 5, padding, seed)
    options = {
        "offset": offset if seed % 3 else None,
        "flip": flip if seed % 2 else None,
        "padding": padding,
        "dtype": dtype,
        "channels_last": channels_last,
    }
    if dtype != torch.uint8 and seed % 5:
        options |= {"mean": MEAN[:c], "std": STD[:c]}
    got = ops.gather_augment(x, index, **options)
    assert_same(got, reference.gather_augment(x, index, **options))
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@on_every_device_dtype_and_layout
@pytest.mark.parametrize("channels_last", [False, True])
def test_devices_agree(device, dtype, layout, channels_last):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((9, 3, size, size), torch.uint8, layout, seed, device)
        index, offset, flip = draws(6, 9, 4, seed)
        options = {"padding": 4, "dtype": dtype, "channels_last": channels_last}
        if dtype != torch.uint8:
            options |= {"mean": MEAN[:3], "std": STD[:3]}
        there = {"offset": offset.to(device), "flip": flip.to(device)}
        got = ops.gather_augment(x, index.to(device), **there, **options)
        assert_same(got.cpu(), reference.gather_augment(x.cpu(), index, offset=offset, flip=flip, **options))


def test_whole_batch_at_imagenet_size():
    x = make_images((3, 3, 224, 224), torch.uint8, "contiguous", 0)
    index, offset, flip = draws(4, 3, 4, 0)
    options = {"offset": offset, "flip": flip, "padding": 4, "mean": MEAN[:3], "std": STD[:3], "channels_last": True}
    assert_same(ops.gather_augment(x, index, **options), reference.gather_augment(x, index, **options))


@given(st.integers(0, 255), st.floats(-3, 3, width=32), st.floats(2.0**-10, 8, width=32), seeds)
def test_every_pixel_value_is_divided_correctly(v, mean, std, seed):
    # Odd divisors are where the fast way of dividing could go wrong; all 256 values, random constants.
    x = torch.arange(256, dtype=torch.uint8).roll(v).view(1, 1, 16, 16)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = (x.to(wide) / 255 - torch.tensor(mean, dtype=wide)) / torch.tensor(std, dtype=wide)
        got = ops.gather_augment(x, torch.zeros(1, dtype=torch.int64), mean=[mean], std=[std], dtype=dtype)
        torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("std", [1.1920928e-07, 1.9999999, 0.99999994, 1e-30, 1e30, 3.0])
def test_awkward_divisors(std):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (x.float() / 255 - torch.tensor(0.1)) / torch.tensor(std)
    for channels_last in (False, True):
        twice = x.expand(1, 2, 16, 16)
        got = ops.gather_augment(
            twice, torch.zeros(1, dtype=torch.int64), mean=[0.1] * 2, std=[std] * 2, channels_last=channels_last
        )
        torch.testing.assert_close(got, expected.expand(1, 2, 16, 16), rtol=0, atol=0)


def test_crop_and_flip_by_hand():
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    index = torch.zeros(3, dtype=torch.int64)
    offset = torch.tensor([[0, 0], [1, 2], [2, 1]])
    flip = torch.tensor([False, False, True])
    out = ops.gather_augment(x, index, offset=offset, flip=flip, padding=1, dtype=torch.uint8)
    assert out[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    assert out[1, 0].tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert out[2, 0].tolist() == [[6, 5, 4], [9, 8, 7], [0, 0, 0]]


def test_padding_is_black_before_normalising():
    x = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    out = ops.gather_augment(
        x, torch.tensor([0]), offset=torch.tensor([[0, 0]]), padding=2, mean=[0.5], std=[0.25], dtype=torch.float32
    )
    assert out.flatten().tolist() == [-2.0] * 4


@pytest.mark.parametrize("offset_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_offsets_of_any_integer_type(offset_dtype):
    x = make_images((2, 3, 8, 8), torch.uint8, "contiguous", 0)
    offset = torch.tensor([[0, 3], [4, 1]])
    index = torch.tensor([1, 0])
    got = ops.gather_augment(x, index, offset=offset.to(offset_dtype), padding=2)
    assert_same(got, ops.gather_augment(x, index, offset=offset, padding=2))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny", "imagenet"])
def test_golden_normalize(name):
    data = golden("normalize")
    pixels = nchw(data["gtsrb_images" if name == "gtsrb" else "images"])
    index = torch.arange(len(pixels))
    got = ops.gather_augment(pixels, index, mean=data[f"{name}_mean"], std=data[f"{name}_std"])
    torch.testing.assert_close(got, torch.from_numpy(data[f"{name}_out"]), rtol=0, atol=1e-6)


I = torch.zeros(2, dtype=torch.int64)  # noqa: E741
X = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
O = torch.zeros(2, 2, dtype=torch.int64)  # noqa: E741


@pytest.mark.parametrize("function", [ops.gather_augment, reference.gather_augment])
@pytest.mark.parametrize(
    ("images", "index", "options", "error", "message"),
    [
        (X.float(), I, {}, TypeError, "images must be a uint8 tensor .* got float32"),
        (X[0], I, {}, ValueError, r"images must be \[M, C, H, W\], got uint8 \[3, 4, 4\]"),
        (X, I.int(), {}, TypeError, "index must be an int64 tensor .* got int32"),
        (X, [0, 1], {}, TypeError, r"index must be an int64 tensor .* got list \[0, 1\]"),
        (X, I[None], {}, ValueError, r"index must be \[B\], got int64 \[1, 2\]"),
        (X, I - 1, {}, IndexError, r"index must lie in 0..2, got -1"),
        (X, I + 3, {}, IndexError, r"index must lie in 0..2, got 3"),
        (X, I.to("meta"), {}, ValueError, "index must be on cpu .* on meta"),
        (X, I, {"padding": -1}, ValueError, "padding must be an integer >= 0, got -1"),
        (X, I, {"padding": 1.5}, ValueError, "padding must be an integer >= 0, got 1.5"),
        (X, I, {"offset": O + 3, "padding": 1}, ValueError, "offset must lie in 0..2, got 3"),
        (X, I, {"offset": O - 1, "padding": 1}, ValueError, "offset must lie in 0..2, got -1"),
        (X, I, {"offset": O[:1]}, ValueError, r"offset must be \[2, 2\], got int64 \[1, 2\]"),
        (X, I, {"offset": O.float()}, TypeError, r"offset must be an integer tensor \[B, 2\], got float32"),
        (X, I, {"flip": I}, TypeError, r"flip must be a bool tensor \[2\], got int64"),
        (X, I, {"mean": [0.5]}, ValueError, r"mean must be one number for each of 3 channels, got \[0.5\]"),
        (X, I, {"std": [1, 0, 1]}, ValueError, "std must be positive"),
        (X, I, {"std": [1, float("nan"), 1]}, ValueError, "std must be one number for each of 3 channels"),
        (X, I, {"dtype": torch.int32}, TypeError, "dtype must be float32, .* got torch.int32"),
        (X, I, {"dtype": torch.uint8, "mean": [0, 0, 0]}, ValueError, "dtype uint8 leaves the pixels as they are"),
    ],
)
def test_bad_input_is_named(function, images, index, options, error, message):
    with pytest.raises(error, match=f"gather_augment: {message}"):
        function(images, index, **options)


def test_nothing_can_be_taken_from_no_images():
    with pytest.raises(IndexError, match="gather_augment: index must lie in"):
        ops.gather_augment(X[:0], I)
    assert ops.gather_augment(X[:0], I[:0]).shape == (0, 3, 4, 4)
