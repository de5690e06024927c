"""What the tests of the operations share: inputs of many shapes, dtypes and memory layouts, and exact comparison."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def on_every_device_dtype_and_layout(test: Callable[..., None]) -> Callable[..., None]:
    """Runs ``test(device, dtype, layout)`` for each of them."""
    for name, values in (("layout", LAYOUTS), ("dtype", IMAGE_DTYPES), ("device", DEVICES)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


# CIFAR-10's, with which the golden files are normalised.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.247, 0.243, 0.261]).view(3, 1, 1)

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


def small_network(data: dict[str, np.ndarray], prefix: str = "w/") -> torch.nn.Sequential:
    """The network of the golden files, with the weights that stand there."""
    w = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in data.items() if k.startswith(prefix)}
    first, second = w["0.weight"].shape[0], w["3.weight"].shape[0]
    nn = torch.nn
    net = nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 10),
    )
    missing = net.load_state_dict(w, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys) and not missing.unexpected_keys
    return net.eval()


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


U8 = make_images((2, 3, 4, 6), torch.uint8, "contiguous", 0)
F32 = U8.float() / 255

# Arguments that fit every operation, by name.
FITTING: dict[str, dict[str, Any]] = {
    "add": {"images": U8, "delta": F32[0] - 0.5, "where": torch.tensor([True, False]), "rounding": "nearest"},
    "amplitude_mix": {"images": U8, "trigger": U8[0], "alpha": 0.2, "beta": 0.3, "where": None},
    "channel_lipschitz": {"weight": F32, "scale": torch.tensor([0.5, 2.0])},
    "channel_stats": {"activations": F32, "labels": torch.tensor([1, 0]), "num_classes": 2, "state": None},
    "dct2": {"x": F32, "window": 2},
    "idct2": {"x": F32, "window": 2},
    "gram_powers": {"features": F32, "orders": (1, 2), "compat": False},
    "overlay_batch": {
        "images": U8,
        "overlays": U8,
        "pairs": torch.tensor([[0, 1], [1, 1]]),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "dtype": torch.float32,
        "blend": "add_clip",
        "alpha": 1.0,
        "channels_last": False,
    },
    "quantize": {"images": U8, "levels": 8, "dither": True, "where": None},
    "reflect": {
        "images": U8,
        "reflection": U8[0],
        "mode": "ghost",
        "alpha_t": 0.4,
        "offset": (1, 2),
        "ghost_alpha": 0.3,
        "sigma": 1.5,
        "att": 1.1,
        "window_offset": (1, 0),
        "where": None,
        "rounding": "truncate",
    },
    "sinusoid": {"images": U8, "amplitude": 20.0, "frequency": 6, "where": None, "rounding": "nearest"},
    "spectral_add": {
        "images": U8,
        "positions": [(1, 0), (1, 1)],
        "magnitude": 30.0,
        "channels": (1, 2),
        "window": 2,
        "color": "ycrcb",
        "where": None,
        "rounding": "nearest",
    },
    "topk_update": {"state": None, "activations": F32.flatten(1), "index": torch.tensor([4, 9]), "k": 2},
    "patch": {"images": U8, "pattern": U8[0], "mask": F32[0, 0], "where": torch.tensor([True, False])},
    "blend": {"images": F32, "pattern": F32[0], "alpha": 0.3, "where": None, "rounding": "nearest"},
    "warp": {"images": U8, "grid": F32[:, :2].permute(0, 2, 3, 1), "where": None, "rounding": "truncate"},
    "gather_augment": {
        "images": U8,
        "index": torch.tensor([1, 0, 1]),
        "offset": torch.tensor([[0, 1], [2, 0], [1, 1]]),
        "flip": torch.tensor([True, False, True]),
        "padding": 1,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "dtype": torch.float32,
        "channels_last": False,
    },
    "class_moments": {"features": F32.flatten(1), "labels": torch.tensor([1, 0]), "num_classes": 2, "state": None},
    "softmax_entropy": {"logits": F32.flatten(1)},
    "wanet_grid": {"size": 8, "k": 4, "s": 0.5, "grid_rescale": 1.0, "generator": torch.Generator().manual_seed(0)},
}
