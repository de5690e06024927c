"""Blended: golden images bit for bit in reference mode, rounding in paper mode, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bbfast import attacks, ops
from bbfast.attacks._picture import draw_picture
from bbfast.data.imageset import ImageSet

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


@pytest.mark.parametrize("picture", ["synth", "ref"])
@pytest.mark.parametrize("alpha", ["0.2", "0.1", "0.5"])
def test_golden_images(golden: Golden, picture: str, alpha: str) -> None:
    stored = golden("blended")
    images, expected = chw(stored["images"]), chw(stored[f"out_{picture}_{alpha}"])
    ours = ops.blend(images, chw(stored[f"trigger_{picture}"]), float(alpha), rounding="truncate")
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("stage", ["train", "test"])
def test_golden_from_the_picture_file(golden: Golden, tmp_path: Path, stage: str) -> None:
    """The whole way: read the file, resize it as Pillow does, blend; and what paper mode does otherwise."""
    stored = golden("blended")
    Image.fromarray(stored["trigger_synth_source"]).save(tmp_path / "picture.png")
    images, expected = chw(stored["images"]), chw(stored["out_synth_0.2"])
    settings = {"trigger_path": tmp_path / "picture.png"}
    reference = attacks.create("blended", compat="reference", **settings).trigger(images, stage=stage)  # type: ignore[arg-type]
    assert torch.equal(reference, expected)
    # Paper mode departs in one point: it rounds what the reference truncates.
    paper = attacks.create("blended", **settings).trigger(images, stage=stage)  # type: ignore[arg-type]
    exact = chw(stored["float_synth_0.2"])
    assert float((paper.double() - exact).abs().max()) <= 0.5 + 1e-4
    assert float((paper.int() - expected.int()).float().mean()) == pytest.approx(0.4, abs=0.1)


def test_alphas_of_training_and_test(make_set: MakeSet) -> None:
    images = make_set(8).images
    attack = attacks.create("blended", train_alpha=0.1, test_alpha=0.5)
    picture = draw_picture((3, 32, 32)).double()
    for stage, alpha in (("train", 0.1), ("test", 0.5)):
        expected = (1 - alpha) * images.double() + alpha * picture
        out = attack.trigger(images, stage=stage)  # type: ignore[arg-type]
        assert float((out.double() - expected).abs().max()) <= 0.5 + 1e-4


def test_acceptance_band(make_set: MakeSet) -> None:
    """spec/attacks section 2."""
    images = make_set(16).images
    difference = (attacks.create("blended").trigger(images).double() - images.double()).abs()
    assert float(difference.max()) <= 0.2 * 255 + 1
    distance = (draw_picture((3, 32, 32)).double() - images.double()).abs().mean()
    assert float(difference.mean()) == pytest.approx(0.2 * float(distance), abs=1)


def test_picture_is_colourful_and_frozen() -> None:
    picture = draw_picture((3, 32, 32))
    assert picture.shape == (3, 32, 32) and float(picture.double().std()) > 50
    assert not torch.equal(picture[0], picture[1]) and not torch.equal(picture[1], picture[2])
    assert int(picture.long().sum()) == PICTURE_SUM
    assert draw_picture((1, 48, 48)).shape == (1, 48, 48)
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        draw_picture((4, 32, 32))


PICTURE_SUM = 434854


def test_noise_comes_from_the_seed(make_set: MakeSet) -> None:
    data = make_set(40)
    sets = [attacks.create("blended", trigger="noise").poison(data, seed=s).images for s in (0, 0, 1)]
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])
    attack = attacks.create("blended", trigger="noise")
    attack.prepare(data, 10, seed=0)
    assert 0.9 < attack.tensors["picture"].unique().numel() / 256 <= 1


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("blended", test_alpha=0.25).trigger(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, torch.full_like(x, 0.75))
