from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bbfast.data.normalize import NORMALIZATION, channel_mean_std, denormalize, normalize


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny"])
def test_golden_files(shared: Path, name: str) -> None:
    golden = np.load(shared / "golden" / "normalize.npz")
    mean, std = NORMALIZATION["tiny_imagenet" if name == "tiny" else name]
    assert np.allclose(mean, golden[f"{name}_mean"], atol=0) and np.allclose(std, golden[f"{name}_std"], atol=0)
    source = golden["gtsrb_images" if name == "gtsrb" else "images"]
    images = torch.from_numpy(source).permute(0, 3, 1, 2)
    out = normalize(images, mean, std)
    assert torch.allclose(out, torch.from_numpy(golden[f"{name}_out"]), rtol=0, atol=1e-6)
    assert torch.allclose(denormalize(out, mean, std), torch.from_numpy(golden[f"{name}_denorm"]), rtol=0, atol=1e-6)


def test_single_images_and_float_dtypes() -> None:
    image = torch.rand(3, 4, 5, dtype=torch.float64)
    mean, std = NORMALIZATION["cifar10"]
    out = normalize(image, mean, std)
    assert out.dtype == torch.float64 and out.shape == image.shape
    assert torch.allclose(denormalize(out, mean, std), image)
    assert torch.equal(
        normalize((image * 255).to(torch.uint8), (0,) * 3, (1,) * 3), (image * 255).to(torch.uint8) / 255
    )


def test_channel_mean_std_is_exact() -> None:
    images = torch.randint(0, 256, (40, 2, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_mean_std(images, digits=12)
    x = images.to(torch.float64) / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert channel_mean_std(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))


def test_bad_input_is_named() -> None:
    images = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="one value for each of 3 channels, got 1 and 3"):
        normalize(images, (0.5,), (1.0,) * 3)
    with pytest.raises(ValueError, match="std must be positive"):
        denormalize(images, (0.5,) * 3, (1.0, 0.0, 1.0))
    with pytest.raises(TypeError, match=r"uint8 \(0..255\) or float \(0..1\), got torch.int64"):
        normalize(images.long(), (0.5,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="at least one pixel"):
        channel_mean_std(torch.zeros(0, 3, 2, 2, dtype=torch.uint8))
