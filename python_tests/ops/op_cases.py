"""What the tests of the operations share: inputs of many shapes, dtypes and memory layouts, and exact comparison."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMAGE_DTYPES = (torch.uint8, *FLOATS)
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "odd_offset")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]

seeds = st.integers(0, 2**31 - 1)
batches = st.sampled_from((0, 1, 2, 5))
channels = st.sampled_from((1, 3, 4, 5))
sides = st.sampled_from((0, 1, 2, 3, 7, 16, 33))
layouts = st.sampled_from(LAYOUTS)
image_dtypes = st.sampled_from(IMAGE_DTYPES)
chosen = st.sampled_from((None, "all", "none", "some"))


def make_images(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int, device: str = "cpu") -> Tensor:
    """Images of ``shape`` with values all over the range, in one of :data:`LAYOUTS`."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(seed)
    room = {"sliced": (n, c, 2 * h + 1, w + 3), "transposed": (n, c, w, h), "odd_offset": (n + 1, c, h, w)}.get(
        layout, shape
    )
    values = torch.randint(0, 256, room, generator=g, dtype=torch.uint8)
    x = (values if dtype == torch.uint8 else (values.double() / 255).to(dtype)).to(device)
    if layout == "sliced":
        return x[:, :, : 2 * h : 2, 1 : w + 1]
    if layout == "transposed":
        return x.transpose(2, 3)
    if layout == "odd_offset":
        return x.flatten()[1 : 1 + n * c * h * w].view(shape)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def make_where(kind: str | None, n: int, seed: int, device: str = "cpu") -> Tensor | None:
    """None, or a bool vector that is true everywhere, nowhere or here and there."""
    if kind is None:
        return None
    g = torch.Generator().manual_seed(seed + 1)
    some = torch.rand(n, generator=g) < 0.5
    return {"all": torch.ones(n, dtype=torch.bool), "none": torch.zeros(n, dtype=torch.bool), "some": some}[kind].to(
        device
    )


def uniform(shape: tuple[int, ...], dtype: torch.dtype, seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers of ``dtype`` in ``low..high``."""
    g = torch.Generator().manual_seed(seed + 2)
    return (torch.rand(shape, generator=g, dtype=torch.float64) * (high - low) + low).to(dtype)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits, dtype, device and memory format."""
    assert got.dtype == expected.dtype
    assert got.device == expected.device
    for memory_format in (torch.contiguous_format, torch.channels_last) if got.dim() == 4 and got.numel() else ():
        assert got.is_contiguous(memory_format=memory_format) == expected.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def golden(name: str) -> dict[str, np.ndarray]:
    """A golden file of the reference implementation; skips where the shared data is not at hand."""
    path = Path(os.environ.get("BBFAST_SHARED", "../shared")) / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"golden file {path} not at hand; set BBFAST_SHARED to the folder of the shared data")
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def nchw(array: np.ndarray) -> Tensor:
    """Golden images ``[N, H, W, C]`` (or one ``[H, W, C]``) with the channels in front."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, -3)))
