"""FIBA: what it does to amplitude and phase, pictures, cross samples, a run on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bbfast import attacks, datasets
from bbfast.attacks._picture import draw_picture
from bbfast.attacks._pool import draw_textures
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

MakeSet = Callable[..., ImageSet]


def in_window(size: int, b: int) -> Tensor:
    """The window of the shifted spectrum, rows and columns c-b..c+b around c = size // 2, shifted back."""
    c = size // 2
    window = torch.zeros(size, size, dtype=torch.bool)
    window[c - b : c + b + 1, c - b : c + b + 1] = True
    return torch.fft.ifftshift(window)


def test_amplitude_and_phase(make_set: MakeSet) -> None:
    """spec/attacks sections 20 and 30: at 32 pixels beta .1 is the window of 7 x 7; phase and the rest stay."""
    x = make_set(8).images.double() / 255 * 0.4 + 0.3  # far from both ends, so that nothing is clipped
    before, after = torch.fft.fft2(x), torch.fft.fft2(attacks.create("fiba").trigger(x))
    window = in_window(32, 3)
    wanted = 0.85 * before.abs() + 0.15 * torch.fft.fft2(draw_picture((3, 32, 32)).double() / 255).abs()
    assert torch.allclose(after.abs()[..., window], wanted[..., window])
    assert torch.allclose(after[..., ~window], before[..., ~window])
    turned = torch.angle(after / before)[before.abs() > 1e-3]
    assert float(turned.abs().max()) < 1e-3


def test_uint8_is_clipped_and_rounded(make_set: MakeSet) -> None:
    images = make_set(16).images
    spectrum = torch.fft.fft2(images.double())
    wanted = torch.fft.fft2(draw_picture((3, 32, 32)).double()).abs()
    mixed = torch.where(in_window(32, 3), 0.85 * spectrum.abs() + 0.15 * wanted, spectrum.abs())
    exact = torch.fft.ifft2(torch.polar(mixed, spectrum.angle())).real.clamp(0, 255)
    out = attacks.create("fiba").trigger(images)
    assert float((out.double() - exact).abs().max()) <= 0.5 + 1e-3
    reference = attacks.create("fiba", compat="reference").trigger(images)
    assert torch.equal(reference, out)


def test_alpha_and_beta(make_set: MakeSet) -> None:
    x = make_set(4).images.double() / 255 * 0.2 + 0.4
    only_mean = attacks.create("fiba", beta=0, alpha=0.1).trigger(x) - x
    assert torch.allclose(only_mean, only_mean[..., :1, :1].expand_as(x))
    assert float(only_mean.abs().max()) > 1e-3


def test_own_picture(tmp_path: Path, make_set: MakeSet) -> None:
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "own.png")
    attack = attacks.create("fiba", trigger_path=tmp_path / "own.png")
    attack.prepare(make_set(4), 10)
    assert torch.equal(attack.tensors["picture"], noise.permute(2, 0, 1))
    assert list(attack.files()) == [str(tmp_path / "own.png")]


def test_cross_samples(make_set: MakeSet) -> None:
    data = make_set(200, size=16)
    attack = attacks.create("fiba", ratio=0.1, cross=True)
    poisoned = attack.poison(data, seed=2)
    cross = poisoned.role == 2
    assert int(poisoned.poisoned.sum()) == 20 and int(cross.sum()) == 40 and not bool((cross & poisoned.poisoned).any())
    assert torch.equal(poisoned.labels[cross], data.labels[cross])
    rows = cross.nonzero().flatten()
    assert torch.equal(poisoned.images[rows], attack.cover(data.images[rows], data.ids[rows], "train"))
    # Another picture than the trigger's, and not the same one for all.
    same = data.images[:1].expand(50, -1, -1, -1)
    kinds = attack.cover(same, torch.arange(50), "train").flatten(1).unique(dim=0)
    assert len(kinds) > 20
    assert not (attack.apply(same[:1], torch.arange(1), "train").flatten(1) == kinds).all(1).any()
    extra = attack.extra_tests(data, 2, 10)["cross_acc"]
    assert torch.equal(extra.labels, data.labels) and not torch.equal(extra.images, data.images)
    # Without it there is neither.
    plain = attacks.create("fiba", ratio=0.1)
    assert int((plain.poison(data, seed=2).role == 2).sum()) == 0 and plain.extra_tests(data, 2, 10) == {}


def test_cross_pictures_come_back_with_the_state(make_set: MakeSet) -> None:
    data = make_set(20, channels=1)
    attack = attacks.create("fiba", cross=True, cross_pictures=9)
    attack.prepare(data, 10, seed=4)
    assert attack.tensors["cross"].shape == (9, 1, 32, 32)
    other = attacks.create("fiba", cross=True, cross_pictures=9)
    other.load_state(attack.state())
    assert torch.equal(other.cover(data.images, data.ids, "test"), attack.cover(data.images, data.ids, "test"))


def test_cross_pictures_of_a_folder(tmp_path: Path, make_set: MakeSet) -> None:
    for i in range(3):
        Image.fromarray(np.full((20, 24, 3), 60 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    attack = attacks.create("fiba", cross=True, cross_path=tmp_path)
    attack.prepare(make_set(4), 10)
    assert attack.tensors["cross"][:, 0, 0, 0].tolist() == [0, 60, 120]
    assert len(attack.files()) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture"):
        attacks.create("fiba", cross=True, cross_path=tmp_path / "empty").prepare(make_set(4), 10)
    with pytest.raises(FileNotFoundError, match=r"folder of pictures .*none does not exist"):
        attacks.create("fiba", cross=True, cross_path=tmp_path / "none").prepare(make_set(4), 10)


def test_textures_are_colourful_and_come_from_the_seed() -> None:
    drawn = draw_textures((3, 32, 32), 40, 0)
    assert drawn.shape == (40, 3, 32, 32) and drawn.dtype == torch.uint8
    assert torch.equal(draw_textures((3, 32, 32), 5, 0), drawn[:5])
    assert not torch.equal(draw_textures((3, 32, 32), 5, 1), drawn[:5])
    assert len(drawn.flatten(1).unique(dim=0)) == 40
    assert float(drawn.double().std(dim=(2, 3)).mean()) > 15
    assert float((drawn[:, 0].double() - drawn[:, 1].double()).abs().mean()) > 15


def test_bad_settings(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match=r"fiba: alpha: .*greater than 0, got 0"):
        attacks.create("fiba", alpha=0)
    with pytest.raises(ConfigError, match=r"fiba: beta: .*less than 0\.5, got 0\.5"):
        attacks.create("fiba", beta=0.5)
    with pytest.raises(ConfigError, match=r"fiba: .*cross_path needs cross=True"):
        attacks.create("fiba", cross_path="pictures")
    with pytest.raises(ConfigError, match=r"ratio \* \(1 \+ cross_ratio\) must be at most 1, got 1\.2"):
        attacks.create("fiba", ratio=0.4, cross=True)
    with pytest.raises(
        ValueError, match=r"80 poisoned samples with cross_ratio 2\.0 ask for 160 cross samples, but 120"
    ):
        attacks.create("fiba", count=80, cross=True).poison(make_set(200))


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    x.requires_grad_()
    attacks.create("fiba").trigger(x).square().sum().backward()
    assert x.grad is not None and bool((x.grad.abs() > 0).any(dim=(1, 2, 3)).all())


@pytest.mark.slow
def test_backdoor_is_learned_on_digits() -> None:
    result = attacks.attack("fiba", datasets.load("digits"), "small_cnn", "quick", device="cpu", progress=False)
    assert result.metrics["c_acc"] >= 0.95 and result.metrics["asr"] >= 0.8
