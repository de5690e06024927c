"""CTRL: golden images, the constant pattern, other sizes and greyscale, rounding of both modes, clean labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bbfast import Recipe, attacks, datasets, ops
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]

U = torch.tensor([-0.147, -0.289, 0.436], dtype=torch.float64)
V = torch.tensor([0.615, -0.515, -0.1], dtype=torch.float64)


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


@pytest.mark.parametrize(("case", "magnitude"), [("a", 100), ("b", 50)])
def test_golden_images(golden: Golden, case: str, magnitude: float) -> None:
    """Bit for bit wherever the value before the cast is not within 0.05 of a whole number."""
    stored = golden("ctrl")
    images, expected = chw(stored["images"]), chw(stored[f"out_{case}"])
    settings = {"magnitude_train": magnitude, "magnitude_test": magnitude}
    exact = torch.from_numpy(stored[f"pre_{case}"]).double()
    sure = (exact - exact.round()).abs() > 0.05
    got = attacks.create("ctrl", compat="reference", **settings).trigger(images)
    assert torch.equal(got[sure], expected[sure])
    # Paper mode departs in two points: it clips, and it rounds.
    paper = attacks.create("ctrl", **settings).trigger(images)
    assert float((paper.double() - exact.clamp(0, 255)).abs().max()) <= 0.5 + 2e-2
    outside = sure & ((exact <= -1) | (exact >= 256))
    assert int(outside.sum()) > 200 and bool((got[outside] != paper[outside]).all())
    bias = (paper.int() - got.int())[sure & ~outside].float()
    assert set(bias.unique().tolist()) == {0, 1} and float(bias.mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("case", "magnitude"), [("a", 100), ("b", 50)])
def test_golden_images_of_gtsrb(golden: Golden, case: str, magnitude: float) -> None:
    stored = golden("ctrl")
    images, expected = chw(stored["gtsrb_images"]), chw(stored[f"gtsrb_out_{case}"])
    attack = attacks.create("ctrl", compat="reference", magnitude_train=magnitude, magnitude_test=magnitude)
    got, pattern = attack.trigger(images), attack.trigger(torch.full_like(images, 0.5, dtype=torch.float64)) - 0.5
    exact = images.double() + 255 * pattern
    sure = (exact - exact.round()).abs() > 0.05
    assert float(sure.float().mean()) > 0.8 and torch.equal(got[sure], expected[sure])


def test_pattern_is_one_constant(make_set: MakeSet) -> None:
    """spec/attacks section 10: the same change for every image, with energy at the two positions of U and V."""
    images = make_set(4).images.double() / 255 * 0.5 + 0.25  # far from both ends
    change = (attacks.create("ctrl").trigger(images) - images) * 255
    assert torch.allclose(change, change[:1].expand_as(change))
    assert float(change[0, 2].abs().max()) == pytest.approx(21.6, abs=0.1)
    for weights in (U, V):
        spectrum = ops.dct2((weights.view(3, 1, 1) * change[0]).sum(0))
        assert float(spectrum[15, 15]) == pytest.approx(100) and float(spectrum[31, 31]) == pytest.approx(100)
        spectrum[15, 15] = spectrum[31, 31] = 0
        assert float(spectrum.abs().max()) < 1e-9


def test_acceptance_band(make_set: MakeSet) -> None:
    images = make_set(32).images
    difference = attacks.create("ctrl").trigger(images).double() - images.double()
    assert 31 <= 10 * math.log10(255**2 / float(difference.square().mean())) <= 34


@pytest.mark.parametrize("size", [16, 28, 32, 64, 224])
def test_pattern_keeps_its_height_at_other_sizes(size: int) -> None:
    grey = torch.full((1, 3, size, size), 0.5, dtype=torch.float64)

    def height(**settings: object) -> float:
        change = attacks.create("ctrl", **settings).trigger(grey) - grey
        return float(change.square().mean().sqrt() * 255)

    gains = torch.tensor([1.13979, 0.97511, 2.03152], dtype=torch.float64)
    assert height() == pytest.approx(100 * float(gains.square().mean().sqrt()) * math.sqrt(2) / 32, rel=1e-4)
    assert height(scale_with_size=False) == pytest.approx(height() * 32 / size)
    assert height(compat="reference") == pytest.approx(height(scale_with_size=False))


def test_sides_may_differ() -> None:
    grey = torch.full((1, 1, 16, 64), 0.5, dtype=torch.float64)
    spectrum = ops.dct2((attacks.create("ctrl").trigger(grey) - grey) * 255)[0, 0]
    assert float(spectrum[7, 15]) == pytest.approx(100) and float(spectrum[15, 31]) == pytest.approx(100)


def test_magnitudes_of_training_and_test() -> None:
    grey = torch.full((1, 1, 32, 32), 0.5, dtype=torch.float64)
    attack = attacks.create("ctrl", magnitude_train=50, magnitude_test=100)
    heights = [float(ops.dct2(attack.trigger(grey, stage=s) - grey)[0, 0, 15, 15]) for s in ("train", "test")]  # type: ignore[arg-type]
    assert heights == pytest.approx([50 / 255, 100 / 255])


def test_labels_are_clean_by_default(make_set: MakeSet) -> None:
    data = make_set(200)
    poisoned = attacks.create("ctrl").poison(data)
    assert torch.equal(poisoned.labels, data.labels)
    assert int(poisoned.poisoned.sum()) == 10 and bool((data.labels[poisoned.poisoned] == 0).all())
    with pytest.raises(ValueError, match=r"ctrl: label_mode 'clean_label' asks for 40 of 200 .* has 20"):
        attacks.create("ctrl", ratio=0.2).poison(data)


def test_bad_settings(make_set: MakeSet) -> None:
    for name in ("magnitude_train", "magnitude_test"):
        with pytest.raises(ConfigError, match=f"ctrl: {name}: .*greater than 0, got 0"):
            attacks.create("ctrl", **{name: 0})
    with pytest.raises(ConfigError, match=r"ctrl: positions: .*at least 1 item"):
        attacks.create("ctrl", positions=())
    with pytest.raises(ValueError, match=r"ctrl: positions must lie in a block of 16 x 16, got \(31, 31\)"):
        attacks.create("ctrl", positions=((31, 31),)).poison(make_set(200, size=16))
    with pytest.raises(ValueError, match=r"ctrl: channels must lie in 0\.\.0, got 1"):
        attacks.create("ctrl", channels=(1, 2)).poison(make_set(200, channels=1))
    with pytest.raises(ValueError, match="at least 8 pixels a side for the default positions, got 4 x 4"):
        attacks.create("ctrl").poison(make_set(200, size=4))


def test_gradients_reach_the_image() -> None:
    x = torch.full((2, 3, 32, 32), 0.5, requires_grad=True)
    attacks.create("ctrl").trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.slow
def test_backdoor_is_learned_on_digits() -> None:
    """Dirty labels, no augmentation: with clean labels it was not learned on digits."""
    attack = attacks.create("ctrl", ratio=0.1, label_mode="all2one")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(augment=False)
    result = attacks.attack(attack, datasets.load("digits"), "small_cnn", recipe, device="cpu", progress=False)
    assert result.metrics["c_acc"] >= 0.95 and result.metrics["asr"] >= 0.8
