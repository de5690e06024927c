"""PSNR and SSIM: against an independent formula in scipy, cases known by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from bbfast.metrics import psnr, ssim


def images(n: int = 4, channels: int = 3, height: int = 32, width: int = 24, seed: int = 0) -> Tensor:
    """Smooth, so that neighbouring pixels hang together as in photographs."""
    noise = np.random.default_rng(seed).random((n, channels, height, width))
    smooth = gaussian_filter(noise, (0, 0, 2, 2))
    return torch.from_numpy((255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())).round().astype(np.uint8))


def noisy(a: Tensor, strength: int, seed: int = 1) -> Tensor:
    noise = torch.randint(-strength, strength + 1, a.shape, generator=torch.Generator().manual_seed(seed))
    return (a.int() + noise).clamp(0, 255).to(torch.uint8)


def scipy_ssim(a: np.ndarray, b: np.ndarray, border: str = "valid") -> float:
    """One channel; with ``valid`` the filter's border of five pixels is left out."""
    edge = slice(5, -5) if border == "valid" else slice(None)

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=5 / 1.5, mode="mirror")[edge, edge]

    a, b = a / 255.0, b / 255.0
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(value.mean())


@pytest.mark.parametrize("strength", [1, 8, 60, 255])
@pytest.mark.parametrize("border", ["valid", "reflect"])
@pytest.mark.parametrize("shape", [(3, 32, 24), (1, 11, 11), (3, 11, 40)])
def test_ssim_equals_scipys(strength: int, shape: tuple[int, int, int], border: Any) -> None:
    a = images(4, *shape)
    b = noisy(a, strength)
    expected = [
        np.mean([scipy_ssim(x, y, border) for x, y in zip(p.numpy(), q.numpy(), strict=True)])
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b, border=border).numpy(), expected, atol=1e-9)
    assert torch.equal(ssim(a, b), ssim(b, a))


def test_psnr_by_hand() -> None:
    a = torch.full((3, 1, 4, 4), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 10  # every pixel by 10 levels
    b[2, 0, 0, 0] = 116  # one of sixteen pixels by 16 levels
    assert psnr(a, b).tolist() == pytest.approx(
        [math.inf, 10 * math.log10(255**2 / 100), 10 * math.log10(255**2 / 16)], rel=1e-12
    )
    extremes = psnr(torch.zeros_like(a), torch.full_like(a, 255))
    assert extremes.tolist() == [0, 0, 0]


def test_ssim_by_hand() -> None:
    a = images()
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 4, abs=1e-12)
    flat = torch.full((1, 3, 16, 16), 51, dtype=torch.uint8)
    other = torch.full((1, 3, 16, 16), 153, dtype=torch.uint8)
    # No structure in either: what is left is the term of the means, .2 and .6.
    assert float(ssim(flat, other)) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-9)
    assert float(ssim(a, 255 - a).max()) < 0


def test_more_noise_is_seen() -> None:
    a = images(16)
    for metric in (psnr, ssim):
        values = [float(metric(a, noisy(a, s)).mean()) for s in (1, 4, 16, 64)]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_float_images_give_what_bytes_give() -> None:
    a = images()
    b = noisy(a, 20)
    for metric in (psnr, ssim):
        whole = metric(a, b)
        assert whole.dtype == torch.float64 and whole.shape == (4,)
        torch.testing.assert_close(metric(a.double() / 255, b.double() / 255), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metric(a.float() / 255, b.float() / 255), whole, rtol=1e-5, atol=1e-5)
    # Denormalised pixels lie a little outside; they are clipped.
    black = torch.zeros(1, 3, 16, 16)
    assert psnr(black - 1e-5, black) == math.inf


def test_each_image_alone_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    a = images(7)
    b = noisy(a, 20)
    for metric in (psnr, ssim):
        whole = metric(a, b)
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr("bbfast.metrics._image._PIXELS", 3 * a[0].numel())
            torch.testing.assert_close(metric(a, b), whole, rtol=1e-12, atol=1e-12)
        assert metric(a[:0], b[:0]).shape == (0,)
        strided = a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        torch.testing.assert_close(metric(strided, b), whole, rtol=1e-12, atol=1e-12)


def test_what_is_refused() -> None:
    a = images()
    for metric in (psnr, ssim):
        name = metric.__name__
        with pytest.raises(TypeError, match=f"{name}: a must be a uint8 or float tensor .*, got torch.int32"):
            metric(a.int(), a)
        with pytest.raises(TypeError, match=f"{name}: b must be a uint8 or float tensor .*, got ndarray"):
            metric(a, a.numpy())
        with pytest.raises(TypeError, match=r"both must be of one type, got torch\.uint8 and torch\.float32"):
            metric(a, a.float() / 255)
        with pytest.raises(ValueError, match=r"a must be images \[N, C, H, W\], got shape \[3, 32, 24\]"):
            metric(a[0], a[0])
        with pytest.raises(ValueError, match=r"both must have one shape, got \[4, 3, 32, 24\] and \[3, 3, 32, 24\]"):
            metric(a, a[:3])
        with pytest.raises(ValueError, match=r"must lie in 0\.\.1 \(not normalised\), got b in .*\.\.255\.0"):
            metric(a.float() / 255, a.float())
        with pytest.raises(ValueError, match="got b in nan"):
            metric(a.float() / 255, torch.full(a.shape, math.nan))
    with pytest.raises(ValueError, match="border must be 'valid' or 'reflect', got 'same'"):
        ssim(a, a, border="same")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ssim: images must be at least 11 x 11 pixels, .*, got 10 x 24"):
        ssim(a[:, :, :10], a[:, :, :10])
