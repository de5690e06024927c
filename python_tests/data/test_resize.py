from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bbfast.data.resize import resize_u8


def test_golden_files_bit_for_bit(shared: Path) -> None:
    golden = np.load(shared / "golden" / "resize.npz")
    names = [key.removeprefix("in_") for key in golden.files if key.startswith("in_")]
    assert len(names) == 7
    for side in (32, 64):
        together = resize_u8([golden[f"in_{name}"] for name in names], side)
        for row, name in zip(together, names, strict=True):
            assert np.array_equal(row.permute(1, 2, 0).numpy(), golden[f"out{side}_{name}"]), (side, name)


@settings(max_examples=30, deadline=None)
@given(
    h=st.integers(1, 40), w=st.integers(1, 40), height=st.integers(1, 40), width=st.integers(1, 40), c=st.integers(1, 5)
)
def test_every_channel_is_what_pillow_makes_of_it(h: int, w: int, height: int, width: int, c: int) -> None:
    image = torch.from_numpy(np.random.default_rng(h * w).integers(0, 256, (1, c, h, w), dtype=np.uint8))
    out = resize_u8(image, (height, width))
    assert out.shape == (1, c, height, width)
    for band in range(c):
        expected = Image.fromarray(image[0, band].numpy()).resize((width, height), Image.Resampling.BILINEAR)
        assert np.array_equal(out[0, band].numpy(), np.asarray(expected))


def test_sequences_may_mix_sizes_and_gray_images() -> None:
    out = resize_u8([np.zeros((5, 6), np.uint8), np.full((9, 3, 1), 255, np.uint8)], 4)
    assert out.shape == (2, 1, 4, 4)
    assert out[0].max() == 0 and out[1].min() == 255


def test_same_size_is_the_same_tensor_and_none_is_fine() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert resize_u8(images, 8) is images
    assert resize_u8(images[:0], 4).shape == (0, 3, 4, 4)
    assert resize_u8([], 4).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "size", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4), 2, TypeError, "images must be uint8, got torch.float32"),
        (
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            2,
            ValueError,
            r"four dimensions \[N, C, H, W\], got shape \[3, 4, 4\]",
        ),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0, ValueError, r"size must be positive, got \(0, 0\)"),
        ([np.zeros((4, 4))], 2, TypeError, "uint8, got float64 at position 0"),
        ([np.zeros(4, np.uint8)], 2, ValueError, r"shape \[h, w, C\] or \[h, w\], got \[4\] at position 0"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], 2, ValueError, "one number of channels"),
    ],
)
def test_bad_input_is_named(images: object, size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resize_u8(images, size)  # type: ignore[arg-type]
