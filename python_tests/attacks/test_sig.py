"""SIG: golden images bit for bit in reference mode, the wave, its rounding in paper mode, clean labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bbfast import attacks, datasets
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
@pytest.mark.parametrize(("delta", "f"), [(40, 6), (20, 6), (30, 8)])
def test_golden_images(golden: Golden, delta: int, f: int, prefix: str) -> None:
    stored = golden("sig")
    images, expected = chw(stored[f"{prefix}images"]), chw(stored[f"{prefix}out_{delta}_{f}"])
    settings = {"delta_train": delta, "delta_test": delta, "frequency": f}
    reference = attacks.create("sig", compat="reference", **settings)
    for stage in ("train", "test"):
        assert torch.equal(reference.trigger(images, stage=stage), expected)  # type: ignore[arg-type]
    # Paper mode departs in one point: it rounds the clipped sum, which the reference cuts.
    paper = attacks.create("sig", **settings).trigger(images)
    wave = torch.from_numpy(stored[f"pattern_{delta}_{f}"]).double()
    exact = (images.double() + wave).clamp(0, 255)
    assert float((paper.double() - exact).abs().max()) <= 0.5 + 1e-4
    assert set((paper.int() - expected.int()).unique().tolist()) == {0, 1}


def test_the_wave_is_the_one_of_the_paper() -> None:
    """spec/attacks section 30, and the acceptance lines of section 4."""
    grey = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    change = (attacks.create("sig").trigger(grey) - grey)[0] * 255
    row = [0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955, 0, -36.955]
    assert change[0, 0, :10].tolist() == pytest.approx(row, abs=1e-3)
    assert torch.equal(change, change[:1, :1].expand(3, 32, 32))  # along the columns, the same in R, G and B
    assert float(change.square().mean().sqrt()) == pytest.approx(40 / math.sqrt(2), abs=1e-6)


def test_acceptance_band(make_set: MakeSet) -> None:
    """PSNR 19.1 dB before clipping, a little more after it."""
    images = make_set(32).images
    difference = attacks.create("sig").trigger(images).double() - images.double()
    psnr = 10 * math.log10(255**2 / float(difference.square().mean()))
    assert 19.0 <= psnr <= 20.5


def test_heights_of_training_and_test(make_set: MakeSet) -> None:
    grey = torch.full((1, 1, 4, 32), 128, dtype=torch.uint8)
    attack = attacks.create("sig", delta_train=10, delta_test=50)
    peaks = [int(attack.trigger(grey, stage=stage).max()) - 128 for stage in ("train", "test")]  # type: ignore[arg-type]
    assert peaks == [10, 50]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 64])
def test_any_size_and_greyscale(channels: int, size: int, make_set: MakeSet) -> None:
    images = make_set(4, size=size, channels=channels).images
    wave = 40 * torch.sin(2 * math.pi * 6 * torch.arange(size, dtype=torch.float64) / size)
    exact = (images.double() + wave).clamp(0, 255)
    assert float((attacks.create("sig").trigger(images).double() - exact).abs().max()) <= 0.5 + 1e-4


def test_labels_are_clean_by_default(make_set: MakeSet) -> None:
    data = make_set(200)
    poisoned = attacks.create("sig", ratio=0.05, target=3).poison(data)
    assert torch.equal(poisoned.labels, data.labels)
    assert int(poisoned.poisoned.sum()) == 10 and bool((data.labels[poisoned.poisoned] == 3).all())
    with pytest.raises(ValueError, match=r"sig: label_mode 'clean_label' asks for 60 of 200 .* class \[3\] has 20"):
        attacks.create("sig", ratio=0.3, target=3).poison(data)
    clipped = attacks.create("sig", ratio=0.3, target=3, clip_to_class=True).poison(data)
    assert int(clipped.poisoned.sum()) == 20 and clipped.ratio == pytest.approx(0.1)


def test_bad_settings(make_set: MakeSet) -> None:
    for name in ("delta_train", "delta_test"):
        with pytest.raises(ConfigError, match=f"sig: {name}: .*greater than 0, got 0"):
            attacks.create("sig", **{name: 0})
        with pytest.raises(ConfigError, match=f"sig: {name}: .*less than or equal to 255, got 300"):
            attacks.create("sig", **{name: 300})
    with pytest.raises(ConfigError, match=r"sig: frequency: .*greater than 0, got -1"):
        attacks.create("sig", frequency=-1)
    # Whole half waves a pixel: the sine is 0 in every column.
    with pytest.raises(ValueError, match="height 40 and frequency 6 changes no pixel of images 12 wide"):
        attacks.create("sig", ratio=0.05).poison(make_set(200, size=12))


def test_gradients_reach_the_image() -> None:
    x = torch.full((2, 3, 8, 32), 0.5, requires_grad=True)
    attacks.create("sig").trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.slow
def test_backdoor_is_learned_on_digits() -> None:
    """Settings with which it is learned: that depends on the target class (0: no, 8: yes) and on delta_test."""
    attack = attacks.create("sig", ratio=0.08, target=8, delta_test=80)
    result = attacks.attack(attack, datasets.load("digits"), "small_cnn", "quick", device="cpu", progress=False)
    assert result.metrics["c_acc"] >= 0.95 and result.metrics["asr"] >= 0.6
