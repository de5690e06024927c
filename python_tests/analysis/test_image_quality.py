"""Quality of triggered images: against numpy and torchmetrics, and of none but the triggered ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bbfast import analysis
from bbfast.analysis.tools.image_quality import distances, frechet
from bbfast.attacks import AttackResult


def test_distances_by_hand() -> None:
    a = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    b = a.clone()
    b[1, 0, 0, 0], b[1, 2, 0, 0], b[1, 1, 1, 1] = 255, 51, 102  # two pixels, three values: 1, 0.2, 0.4
    found = {key: value.tolist() for key, value in distances(a, b).items()}
    assert found["l0"] == [0, 2] and found["linf"] == [0, 1]
    assert found["l1"] == pytest.approx([0, 1.6]) and found["l2"] == pytest.approx([0, 1.2**0.5])
    assert found["mse"] == pytest.approx([0, 1.2 / 12])
    # The other way round: bytes do not wrap.
    assert distances(b, a)["l1"].tolist() == found["l1"]


def test_figures_are_of_the_triggered_images(badnets: AttackResult, tmp_path: Path) -> None:
    """BackdoorBench's loop runs over the front of the set, where clean images raise the average."""
    bad = badnets.backdoor_test
    place = {number: i for i, number in enumerate(badnets.test.ids.tolist())}
    before = badnets.test.images[[place[number] for number in bad.ids.tolist()]].double() / 255
    mse = (before - bad.images.double() / 255).square().mean((1, 2, 3)).numpy()
    found = analysis.run("image_quality", badnets, out=tmp_path, device="cpu", frechet="model")
    assert found.numbers.arrays["id"].tolist() == bad.ids.tolist()
    np.testing.assert_allclose(found.numbers.arrays["mse"], mse, rtol=1e-6)
    assert found.summary["psnr"] == pytest.approx(float((-10 * np.log10(mse)).mean()), abs=1e-5)
    assert found.summary["psnr_of_mean_mse"] == pytest.approx(-10 * np.log10(mse.mean()), abs=1e-9)
    assert found.summary["unchanged"] == 0 and 0 < found.summary["ssim"] < 1 and found.summary["fd_model"] > 0
    assert (found.numbers.arrays["l0"] <= 9).all()


def test_images_that_the_trigger_leaves_alone(badnets: AttackResult, tmp_path: Path) -> None:
    bad = badnets.backdoor_test
    images = bad.images.clone()
    place = {number: i for i, number in enumerate(badnets.test.ids.tolist())}
    originals = badnets.test.images[[place[number] for number in bad.ids.tolist()]]
    images[::2] = originals[::2]
    made = dataclasses.replace(badnets, backdoor_test=dataclasses.replace(bad, images=images))
    found = analysis.run("image_quality", made, out=tmp_path / "a", device="cpu")
    half = analysis.run("image_quality", badnets, out=tmp_path / "b", device="cpu", figures=False).numbers
    assert found.summary["unchanged"] == pytest.approx(0.5, abs=0.01)
    assert np.isinf(found.numbers.arrays["psnr"][::2]).all() and (found.numbers.arrays["ssim"][::2] == 1).all()
    assert found.summary["psnr"] == pytest.approx(float(half.arrays["psnr"][1::2].astype(float).mean()), abs=1e-5)
    made = dataclasses.replace(badnets, backdoor_test=dataclasses.replace(bad, images=originals))
    found = analysis.run("image_quality", made, out=tmp_path / "c", device="cpu")
    assert found.summary["unchanged"] == 1 and np.isnan(found.summary["psnr"])
    assert found.summary["psnr_of_mean_mse"] == np.inf and found.figure is not None


def test_against_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    from bbfast import metrics

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2))
    x, y = a.double() / 255, b.double() / 255
    theirs = functional.peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(metrics.psnr(a, b), theirs, atol=1e-5, rtol=0)
    theirs = functional.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(metrics.ssim(a, b, border="reflect"), theirs, atol=1e-4, rtol=0)


def test_frechet_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 4, 5])
    b = torch.randn(200, 5, generator=generator, dtype=torch.float64) + 1
    assert frechet(a, a) < 1e-9
    c1, c2 = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eig(c1 @ c2)
    wanted = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * values.sqrt().real.sum()
    assert vectors.shape == (5, 5) and frechet(a, b) == pytest.approx(float(wanted), rel=1e-9)
