"""Views for contrastive training: each change against torchvision or scipy, each image with draws of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from bbfast.defenses.training import _views
from bbfast.defenses.training._views import Views, crop_matrix, gaussian_matrices, shift_hue


def pixels(n: int = 8, size: tuple[int, int] = (20, 16)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cubic", [True, False])
def test_crops_against_torchvision(cubic: bool) -> None:
    x = pixels()
    top, h = torch.tensor([3, 0, 11]), torch.tensor([9, 20, 1])
    left, w = torch.tensor([2, 0, 5]), torch.tensor([11, 16, 7])
    rows, columns = crop_matrix(20, top, h, cubic), crop_matrix(16, left, w, cubic)
    mode = V.InterpolationMode.BICUBIC if cubic else V.InterpolationMode.BILINEAR
    for i in range(3):
        box = [int(v[i]) for v in (top, left, h, w)]
        expected = V.resized_crop(x[i], *box, [20, 16], interpolation=mode, antialias=True)
        ours = rows[i].float() @ x[i] @ columns[i].float().T
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_colours_against_torchvision() -> None:
    x = pixels()
    x[0] = x[0, :1]  # grey: no hue
    x[1] = 0
    for shift in (-0.1, 0.07, 0.0):
        torch.testing.assert_close(
            shift_hue(x, torch.full((8, 1, 1, 1), shift)), V.adjust_hue(x, shift), rtol=0, atol=1e-5
        )
    factor = torch.full((8, 1, 1, 1), 1.3)
    for ours, theirs in zip(
        _views._CHANGES[:3], (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation), strict=True
    ):
        torch.testing.assert_close(ours(x, factor), theirs(x, 1.3), rtol=0, atol=1e-6)


def test_blur_against_scipy() -> None:
    matrices, line = gaussian_matrices(20, torch.tensor([1.7, 0.0]).double()), np.random.default_rng(0).random(20)
    expected = gaussian_filter1d(line, 1.7, mode="nearest", truncate=8 / 1.7)
    np.testing.assert_allclose(matrices[0].numpy() @ line, expected, atol=1e-9)
    np.testing.assert_array_equal(matrices[1].numpy() @ line, line)


def test_crop_sizes_against_torchvision() -> None:
    torch.manual_seed(0)
    h, w = _views._crop_sizes(3000, 32, 24)
    image = torch.empty(1, 32, 24)
    drawn = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = torch.tensor(drawn, dtype=torch.float64)[:, 2:].T
    for ours, expected in ((h * w, theirs[0] * theirs[1]), (h, theirs[0]), (w, theirs[1])):
        ours = ours.double()
        off = 4 * float((ours.var() + expected.var()) / 3000) ** 0.5
        assert float(ours.mean()) == pytest.approx(float(expected.mean()), abs=off)
        assert int(ours.min()) >= int(expected.min()) - 12 and int(ours.max()) <= 32 * 24
    assert int(h.max()) <= 32 and int(w.max()) <= 24 and int(torch.minimum(h, w).min()) >= 1
    # A line of an image fits none of the draws: as much of it as the ratios allow.
    h, w = _views._crop_sizes(5, 2, 64)
    assert h.tolist() == [2] * 5 and w.tolist() == [3] * 5


def test_each_image_has_its_own_view_and_its_share_of_each_change() -> None:
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(600, -1, -1, -1).contiguous()
    before = images.clone()
    torch.manual_seed(0)
    views = Views()(images)
    assert torch.equal(images, before) and views.dtype == torch.float32
    assert float(views.min()) >= 0 and float(views.max()) <= 1
    # Two that drew neither colours nor blur may have drawn one crop.
    assert len(views.flatten(1).unique(dim=0)) > 590
    grey = (views.amax(1) - views.amin(1)).flatten(1).amax(1) < 1e-4
    assert abs(float(grey.float().mean()) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 600)
    torch.manual_seed(0)
    assert torch.equal(Views()(images), views)


def test_mirror_is_a_choice() -> None:
    """Left black, right white: a crop of it stays darker on the left unless mirrored."""
    images = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    images[:, :, :, 8:] = 255
    for mirror, share in ((True, 0.5), (False, 0.0)):
        torch.manual_seed(0)
        views = Views(mirror=mirror)(images)
        turned = views[:, 0, :, 0].mean(1) > views[:, 0, :, -1].mean(1) + 1e-4
        assert abs(float(turned.float().mean()) - share) < 0.12
