"""Shared inputs of the attack tests: synthetic images, and the golden files where they are to be had."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bbfast.data.imageset import ImageSet

ROOT = Path(__file__).resolve().parents[2]
Golden = Callable[[str], Mapping[str, np.ndarray]]


@pytest.fixture
def golden() -> Golden:
    """Loads a golden file of the shared folder (BBFAST_SHARED, default ../shared); skips where there is none."""
    folder = Path(os.environ.get("BBFAST_SHARED", ROOT.parent / "shared")) / "golden"

    def load(name: str) -> Mapping[str, np.ndarray]:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"golden file {path} is not here; set BBFAST_SHARED")
        with np.load(path) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def make_set() -> Callable[..., ImageSet]:
    """Makes a set of smooth random images with labels that go round the classes."""

    def make(n: int = 200, size: int = 32, classes: int = 10, channels: int = 3, seed: int = 0) -> ImageSet:
        return ImageSet(smooth_images(n, size, channels, seed), torch.arange(n) % classes)

    return make


def smooth_images(n: int, size: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, channels, 5, 5), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (fine * 255).round().to(torch.uint8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small a second thread costs more than it gives, above all beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
