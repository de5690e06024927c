"""Frequency saliency: symmetry, a planted wave, the position that ftrojan injects, and no reference faults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bbfast import Recipe, analysis, attack, attacks, datasets
from bbfast.analysis import Subject
from bbfast.analysis._attribution import shown, top_gradient
from bbfast.analysis.tools.frequency_saliency import FrequencySaliency, _js, amplitude, rings
from bbfast.attacks import AttackResult

CPU = torch.device("cpu")


def linear(weight: torch.Tensor) -> nn.Module:
    """Its first logit is the weighted sum of the pixels, its others are far below."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 10))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[0] = weight.flatten()
        net[1].bias.fill_(-1e6)
        net[1].bias[0] = 0.0
    return net


def measured(attacked: AttackResult, net: nn.Module, **options: Any) -> analysis.Numbers:
    stand_in: Any = SimpleNamespace(model=net)
    return FrequencySaliency(**options).measure(Subject(attacked, stand_in, CPU))


@pytest.fixture(scope="module")
def ftrojan() -> AttackResult:
    data = datasets.load("digits")
    small = dataclasses.replace(data, test=data.test[:200], fingerprint="")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(epochs=5, eval_every=0)
    made = attacks.create("ftrojan", ratio=0.3, magnitude=120.0)
    return attack(made, small, "small_cnn", recipe, device="cpu", progress=False)


def test_symmetric_and_as_numpy() -> None:
    gradient = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    found = amplitude(gradient)
    mirrored = found.flip((-2, -1)).roll((1, 1), (-2, -1))
    torch.testing.assert_close(found, mirrored)
    np.testing.assert_allclose(found, np.abs(np.fft.ifft2(gradient.numpy())), rtol=1e-4, atol=1e-7)


def test_rings() -> None:
    found = rings(8, 6)
    assert found[4, 3] == 0 and found[4, 5] == 2 and found[0, 3] == 4 and found[7, 5] == math.hypot(3, 2)


def test_a_planted_wave(badnets: AttackResult) -> None:
    """Weight cos(2 pi 3 u / H) peaks at +-3 rows off the centre; amplitudes elsewhere vanish, and stay finite."""
    wave = torch.cos(2 * math.pi * 3 * torch.arange(32) / 32)[None, :, None].expand(3, 32, 32)
    found = measured(badnets, linear(wave), n_stat=5)
    for side in ("clean", "bd"):
        mean = found.arrays[f"map_{side}"]
        assert sorted(np.argsort(mean.ravel())[-2:].tolist()) == [13 * 32 + 16, 19 * 32 + 16]
        assert np.isfinite(mean).all() and mean.min() >= -12
    assert found.arrays["radial"].shape == (2, 17) and found.arrays["radial"][0].argmax() == 3
    assert found.summary["js_distance"] == 0 and found.summary["high_frequency_share_bd"] < 1e-6


def test_a_gradient_that_vanishes(badnets: AttackResult) -> None:
    """The reference takes the logarithm of zero."""
    found = measured(badnets, linear(torch.zeros(3, 32, 32)), n_stat=5)
    assert (found.arrays["map_clean"] == -12).all() and (found.arrays["fsm_bd"] == 0).all()
    assert math.isnan(found.summary["js_distance"]) and found.summary["high_frequency_share_clean"] == 0


def test_finds_what_ftrojan_injects(ftrojan: AttackResult, tmp_path: Path) -> None:
    assert ftrojan.metrics["asr"] > 0.9
    found = analysis.run("frequency_saliency", ftrojan, out=tmp_path, device="cpu", figures=False)
    assert (found.summary["dct_row"], found.summary["dct_column"]) in {(15, 15), (31, 31)}
    assert found.summary["dct_change"] > 0


def test_same_pairs_and_nothing_changed(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    before = subject.pairs(4)
    numbers = FrequencySaliency(n_stat=7).measure(subject)
    assert numbers.arrays["id"].tolist() == before.ids.tolist() == shown(subject, 4)[0].ids.tolist()
    assert subject.pairs(4).clean.shape == before.clean.shape
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in subject.model.parameters())


def test_batches_do_not_matter(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    images = subject.pairs(9).triggered
    whole, parts = (torch.cat(top_gradient(subject, images, lambda g: g, size)) for size in (9, 2))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_distance_of_profiles() -> None:
    from scipy.spatial.distance import jensenshannon

    first, second = np.array([3.0, 0.0, 1.0]), np.array([1.0, 2.0, 0.5])
    assert _js(first, second) == pytest.approx(jensenshannon(first, second, base=2)) and _js(first, first) == 0
