"""Common corruptions against scipy, Pillow and one image at a time."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses._corruptions import CORRUPTIONS, SEVERITIES, blur, corrupt, digital, noise, resample, weather
from bbfast.defenses._corruptions.jpeg import jpeg, quantisation_table
from bbfast.defenses._draws import Draws

SHARED = Path(os.environ.get("BBFAST_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def pictures(n: int, seed: int = 0, size: tuple[int, int] = (32, 32), channels: int = 3) -> Tensor:
    """Smooth random colour images with edges: the spectrum of photographs rather than of noise."""
    rng = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(rng.normal(size=(n, channels, *size)), (0, 0.5, 2, 2))
    soft = 90 * soft / soft.std() + 40 * (ndimage.gaussian_filter(rng.normal(size=(n, 1, *size)), (0, 0, 3, 3)) > 0)
    return torch.from_numpy(np.clip(soft + 110, 0, 255).astype(np.uint8))


def draws(n: int = 4, seed: int = 0) -> Draws:
    return Draws(torch.arange(n) * 977 + 13, seed)


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_draws_are_uniform_and_normal() -> None:
    u, z = draws().uniform("a", 3, 41, 43), draws().normal("a", 3, 41, 43)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and u.shape == z.shape == (4, 3, 41, 43)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    flat = z.flatten(1)
    both = flat.unflatten(1, (-1, 3)).reshape(-1, 3).numpy()
    assert np.abs(np.corrcoef(both.T)[np.triu_indices(3, 1)]).max() < 0.05
    half = (flat.shape[1] + 1) // 2
    assert abs(np.corrcoef(flat[0, : flat.shape[1] - half], flat[0, half:])[0, 1]) < 0.05


def test_draws_belong_to_image_seed_and_tag() -> None:
    whole = draws().uniform("a", 50)
    assert torch.equal(Draws(draws().keys[[2, 0]], 0).uniform("a", 50), whole[[2, 0]])
    assert torch.equal(draws().uniform("a", 20), whole[:, :20])
    for other in (draws().uniform("b", 50), draws(seed=1).uniform("a", 50), whole.roll(1, 0)):
        assert abs(np.corrcoef(other.flatten(), whole.flatten())[0, 1]) < 0.2


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_image_alone_and_in_any_order(name: str) -> None:
    images = pictures(5)
    keys, before = content_keys(images), images.clone()
    for severity in (1, 5):
        whole = corrupt(images, keys, name, severity)
        assert whole.dtype == torch.uint8 and whole.shape == images.shape and not torch.equal(whole, images)
        alone = torch.cat([corrupt(images[i : i + 1], keys[i : i + 1], name, severity) for i in (3, 1)])
        # Products of matrices of other sizes round differently.
        assert int((alone.int() - whole[[3, 1]].int()).abs().max()) <= 1
        assert torch.equal(corrupt(images, keys, name, severity), whole)
    assert torch.equal(images, before)


def not_rising(images: Tensor) -> set[str]:
    keys, found = content_keys(images), set()
    for name in CORRUPTIONS:
        damaged = [corrupt(images, keys, name, s) for s in SEVERITIES]
        errors = [float((d.float() - images.float()).square().mean()) for d in damaged]
        assert errors[4] > errors[0] > 0, name
        found |= set() if all(a < b for a, b in itertools.pairwise(errors)) else {name}
    return found


def test_severities_damage_more_and_more() -> None:
    """Mean squared error rises with severity, but for what the tables say: from 3 to 4 fog keeps its amount, ice its
    weight while the image loses some, and glass at 2 has one round instead of two."""
    assert not_rising(pictures(64)) <= {"frost", "glass_blur", "fog"}


def test_severities_on_traffic_signs() -> None:
    """At least 13 of 15 rise."""
    file = SHARED / "data" / "gtsrb_small.npz"
    if not file.exists():
        pytest.skip(f"the data are not here ({file}); set BBFAST_SHARED")
    images = torch.from_numpy(np.load(file)["test_images"][:200]).permute(0, 3, 1, 2).contiguous()
    assert len(not_rising(images)) <= 2


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 9), (2, 5, 20)])
def test_odd_sizes_and_channels(name: str, shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for severity in SEVERITIES:
        assert corrupt(images, content_keys(images), name, severity).shape == images.shape
    assert corrupt(images[:0], content_keys(images[:0]), name, 1).shape == (0, *shape)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_its_distribution() -> None:
    x = torch.full((40, 3, 16, 16), 100 / 255)
    d = draws(40)
    z = (noise.gaussian(x, 0.12, d) - x).flatten().numpy()
    assert stats.kstest(z / 0.12, "norm").pvalue > 1e-3
    counts = (noise.shot(x, 25, d) * 25).flatten().round().long().numpy()
    mean = 25 * 100 / 255
    expected = stats.poisson.pmf(np.arange(40), mean)
    seen = np.bincount(counts, minlength=40)[:40] / len(counts)
    assert np.abs(seen - expected).max() < 0.006 and counts.mean() == pytest.approx(mean, rel=0.01)
    assert float(noise.shot(torch.zeros(2, 1, 8, 8), 3, draws(2)).max()) == 0
    hit = noise.impulse(x, 0.17, d)
    assert float((hit == 0).float().mean()) == pytest.approx(0.085, abs=0.005)
    assert float((hit == 1).float().mean()) == pytest.approx(0.085, abs=0.005)


# -- blur -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sigma"), [(32, 0.7), (20, 1.5), (7, 1.0)])
def test_gaussian_against_scipy(size: int, sigma: float) -> None:
    x = np.random.default_rng(0).random((size, size + 3))
    for truncate, mirror, mode in ((4.0, False, "nearest"), (3.0, True, "reflect")):
        rows, columns = (resample.gaussian_matrix(n, sigma, truncate, mirror) for n in x.shape)
        expected = ndimage.gaussian_filter(x, sigma, mode=mode, truncate=truncate)
        np.testing.assert_allclose(resample.along_axes(torch.from_numpy(x), rows, columns), expected, atol=1e-12)


@pytest.mark.parametrize("radius", [3, 4, 8, 10])
def test_defocus_against_scipy(radius: int) -> None:
    """The kernel by formula; the image mirrored at the centres of its border pixels, as OpenCV does."""
    kernel = blur.disk(radius, 0.5)
    assert float(kernel.sum()) == pytest.approx(1) and torch.allclose(kernel, kernel.T)
    assert kernel.shape[0] % 2
    x = np.random.default_rng(0).random((1, 1, 32, 32))
    found = blur.defocus(torch.from_numpy(x), (radius, 0.5), draws(1))
    expected = ndimage.convolve(x[0, 0], kernel.numpy(), mode="mirror")
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 1.07, 1.3, 2, 2.5, 3, 4.5])
def test_zoom_against_scipy(factor: float) -> None:
    x = np.random.default_rng(0).random((32, 21))
    cut = []
    for size in x.shape:
        kept = int(np.ceil(size / factor))
        cut.append(slice((size - kept) // 2, (size - kept) // 2 + kept))
    expected = ndimage.zoom(x[tuple(cut)], factor, order=1)
    rows, columns = (resample.centre_zoom_matrix(n, factor) for n in x.shape)
    np.testing.assert_allclose(resample.along_axes(torch.from_numpy(x), rows, columns), expected, atol=1e-9)


@pytest.mark.parametrize(("reach", "rounds"), [(1, 2), (2, 1), (4, 2)])
def test_glass_swaps_are_those_of_one_pixel_after_the_other(reach: int, rounds: int) -> None:
    n, height, width = 3, 14, 17
    x = torch.rand(n, 2, height, width, generator=torch.Generator().manual_seed(0))
    d, expected = draws(n), x.clone()
    for turn in range(rounds):
        step = (d.uniform(f"swaps {turn}", 2, height * width) * (2 * reach)).long() - reach
        for i in range(n):
            for h in range(height - reach, reach, -1):
                for w in range(width - reach, reach, -1):
                    dy, dx = step[i, :, h * width + w].tolist()
                    a, b = expected[i, :, h, w].clone(), expected[i, :, h + dy, w + dx].clone()
                    expected[i, :, h, w], expected[i, :, h + dy, w + dx] = b, a
    found = blur.scattered(x, reach, rounds, d)
    assert torch.equal(found, expected)
    # Regression: swapped, not copied, so no pixel is lost.
    assert torch.equal(found.flatten(2).sort().values, x.flatten(2).sort().values)


def test_motion_by_hand() -> None:
    x = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    degrees = torch.tensor([0.0, 45.0, -90.0])
    found = blur.along_angle(x, 2, 1.5, degrees)
    weights = np.exp(-0.5 * (np.arange(5) / 1.5) ** 2)
    weights /= weights.sum()
    for i, (sy, sx) in enumerate(((0, 1), (0.5**0.5, 0.5**0.5), (-1, 0))):
        for r, c in ((4, 4), (0, 0), (8, 2)):
            total = 0.0
            for k, weight in enumerate(weights):
                dy, dx = -int(np.ceil(k * sy - 0.5)), -int(np.ceil(k * sx - 0.5))
                total += weight * float(x[i, 0, min(max(r - dy, 0), 8), min(max(c - dx, 0), 8)])
            assert float(found[i, 0, r, c]) == pytest.approx(total, abs=1e-5)
    flat = torch.full((1, 1, 9, 9), 0.7)
    torch.testing.assert_close(blur.along_angle(flat, 20, 15.0, torch.tensor([30.0])), flat)


# -- light, distortion, compression -----------------------------------------------------------------------------------


def test_brightness_is_that_of_hsv() -> None:
    import colorsys

    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0
    found = digital.brightness(x, 0.3, draws(2))
    for i, r, c in itertools.product(range(2), range(4), range(4)):
        h, s, v = colorsys.rgb_to_hsv(*x[i, :, r, c].tolist())
        assert found[i, :, r, c].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1)), abs=1e-6)


def test_contrast() -> None:
    x = torch.rand(2, 3, 5, 5)
    mean = x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(digital.contrast(x, 0.2, draws(2)), (x - mean) * 0.2 + mean)


def test_elastic_against_scipy() -> None:
    x = pictures(2, size=(24, 32)).double() / 255
    d, alpha = draws(2), 25.0
    found = digital.elastic(x.float(), alpha, d)
    raw = (d.uniform("displacement", 2, 24, 32).double().numpy() * 2 - 1) * 0.005 * 24
    for i in range(2):
        smooth = [ndimage.gaussian_filter(raw[i, k], (0.24, 0.32), mode="reflect", truncate=3) * alpha for k in (0, 1)]
        at = np.meshgrid(np.arange(24), np.arange(32), indexing="ij")
        for c in range(3):
            places = [at[0] + smooth[1], at[1] + smooth[0]]
            expected = ndimage.map_coordinates(x[i, c].numpy(), places, order=1, mode="reflect")
            np.testing.assert_allclose(found[i, c], expected, atol=2e-5)


@pytest.mark.parametrize("factor", [0.6, 0.5, 0.4, 0.3, 0.25])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_pixelate_against_pillow(factor: float, size: tuple[int, int]) -> None:
    image = pictures(1, size=size)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    height, width = size
    small = picture.resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    expected = np.array(small.resize((width, height), Image.Resampling.NEAREST)).transpose(2, 0, 1)
    found = digital.pixelate(image.float() / 255, factor, draws(1))[0] * 255
    assert np.abs(found.numpy() - expected).max() <= 1.01
    assert (np.abs(found.numpy() - expected) > 0.5).mean() < 0.02


@pytest.mark.parametrize("quality", [25, 18, 15, 10, 7, 75])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_against_libjpeg(quality: int, channels: int) -> None:
    """Within 1.5 grey levels on average."""
    images, errors = pictures(6, size=(36, 44), channels=channels), []
    found = jpeg(images.float(), quality)
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(
            image.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else image.permute(1, 2, 0).numpy()
        )
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        theirs = np.array(Image.open(buffer)).reshape(36, 44, channels).transpose(2, 0, 1)
        errors.append(np.abs(theirs - ours.numpy()).mean())
    assert np.mean(errors) < 1.5
    table = Image.open(buffer).quantization  # type: ignore[attr-defined]
    assert sorted(table[0]) == sorted(quantisation_table(quality, chroma=False).flatten().tolist())
    if channels == 3:
        assert sorted(table[1]) == sorted(quantisation_table(quality, chroma=True).flatten().tolist())


# -- weather ----------------------------------------------------------------------------------------------------------


def test_plasma_against_a_loop_over_points() -> None:
    """Diamond-square on a torus, point by point."""
    d, side, decay = draws(2), 8, 1.7
    noise_of = d.uniform("t", side, side).double().mul(2).sub(1).numpy()
    found = weather.plasma(d, "t", 7, decay)
    for i in range(2):
        land, step, reach = np.zeros((side, side)), side, 1.0
        while step >= 2:
            half = step // 2
            for r, c in itertools.product(range(half, side, step), range(half, side, step)):
                near = [land[(r + a) % side, (c + b) % side] for a in (-half, half) for b in (-half, half)]
                land[r, c] = sum(near) / 4 + reach**2 * noise_of[i, r, c]
            for r, c in itertools.product(range(0, side, half), range(0, side, half)):
                if (r + c) // half % 2:
                    near = [
                        land[(r + a) % side, (c + b) % side] for a, b in ((-half, 0), (half, 0), (0, half), (0, -half))
                    ]
                    land[r, c] = sum(near) / 4 + reach**2 * noise_of[i, r, c]
            step, reach = half, reach / decay
        land = (land - land.min()) / (land.max() - land.min())
        np.testing.assert_allclose(found[i], land, atol=1e-5)


def test_fog_keeps_the_brightest_value_in_range() -> None:
    x = pictures(3).float() / 255
    found = weather.fog(x, (2.0, 2.0), draws(3))
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert float(weather.fog(torch.zeros(1, 3, 8, 8), (2.0, 2.0), draws(1)).abs().max()) == 0


def test_ice_has_about_the_brightness_of_the_photographs() -> None:
    ice = weather.frost(torch.zeros(200, 3, 32, 32), (1.0, 1.0), draws(200))
    assert float(ice.min()) >= 0 and float(ice.max()) <= 1
    assert 0.4 < float(ice.mean()) < 0.6 and 0.1 < float(ice.std(dim=(1, 2, 3)).mean()) < 0.3


def test_snow_is_white_and_falls_from_above() -> None:
    x = pictures(3).float() / 255
    found = weather.snow(x, (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55), draws(3))
    assert bool((found >= x - 1e-6).all())
    grey = torch.full((1, 1, 16, 16), 0.4)
    quiet = weather.snow(grey, (-9.0, 0.1, 2, 0.5, 10, 4, 0.7), draws(1))
    torch.testing.assert_close(quiet, grey * 0.7 + 0.3 * (0.4 * 1.5 + 0.5))
