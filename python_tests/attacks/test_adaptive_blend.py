"""Adaptive-Blend: which pieces a training image carries, cover samples, and the whole picture at test time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast import Recipe, attacks, datasets
from bbfast.attacks._picture import draw_picture
from bbfast.attacks.adaptive_blend import kept_pieces
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

MakeSet = Callable[..., ImageSet]


def test_defaults_are_the_papers() -> None:
    c: Any = attacks.create("adaptive_blend").config
    assert (c.ratio, c.train_alpha, c.test_alpha, c.pieces, c.mask_rate) == (0.003, 0.15, 0.2, 16, 0.5)


@pytest.mark.parametrize("size", [32, 28])
def test_half_of_the_pieces_in_training_all_at_test_time(size: int, make_set: MakeSet) -> None:
    """spec/attacks section 18, pixel by pixel."""
    data = make_set(40, size=size)
    attack = attacks.create("adaptive_blend")
    attack.prepare(data, 10, seed=2)
    x, picture = data.images.double(), draw_picture((3, size, size)).double()
    out = attack.trigger(data.images, data.ids, "train").double()
    step = size // 4
    whole = x + 0.15 * (picture - x)
    touched = torch.zeros(40, 16, dtype=torch.bool)
    for piece in range(16):
        rows, columns = piece // 4 * step, piece % 4 * step
        part = (..., slice(rows, rows + step), slice(columns, columns + step))
        near = [(out[part] - other[part]).abs().flatten(1).amax(1) <= 0.5 + 1e-4 for other in (x, whole)]
        assert bool((near[0] | near[1]).all())
        touched[:, piece] = ~near[0]
    assert bool((touched.sum(1) == 8).all())
    assert touched.unique(dim=0).shape[0] > 35
    at_test = attack.trigger(data.images, data.ids, "test").double()
    assert float((at_test - (x + 0.2 * (picture - x))).abs().max()) <= 0.5 + 1e-4


def test_every_piece_is_as_likely() -> None:
    kept = kept_pieces(1, torch.arange(8000), 16, 8)
    assert kept.shape == (8000, 4, 4) and bool((kept.flatten(1).sum(1) == 8).all())
    assert float((kept.double().mean(0) - 0.5).abs().max()) < 0.03
    pairs = kept.flatten(1).double()
    together = pairs.T @ pairs / 8000
    off = together[~torch.eye(16, dtype=torch.bool)]
    assert float((off - 8 * 7 / (16 * 15)).abs().max()) < 0.03
    assert torch.equal(kept_pieces(1, torch.tensor([77, 3]), 16, 8), kept[[77, 3]])
    assert bool(kept_pieces(1, torch.arange(5), 9, 0).all())


def test_roles(make_set: MakeSet) -> None:
    data = make_set(1000, size=16)
    for rate, covers in ((None, 50), (0.1, 100), (0.0, 0)):
        out = attacks.create("adaptive_blend", ratio=0.05, cover_rate=rate, target=3).poison(data, seed=1)
        poison, cover = out.role == 1, out.role == 2
        assert (int(poison.sum()), int(cover.sum())) == (50, covers)
        assert bool((out.labels[poison] == 3).all()) and torch.equal(out.labels[~poison], data.labels[~poison])
        changed = (out.images != data.images).flatten(1).any(1)
        assert torch.equal(changed, poison | cover)
        assert data.labels[poison].unique().numel() == 10


def test_pictures(make_set: MakeSet, tmp_path: Path) -> None:
    images = make_set(3).images
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "white.png")
    own = attacks.create("adaptive_blend", trigger_path=tmp_path / "white.png", test_alpha=1.0)
    assert bool((own.trigger(images) == 255).all())
    noise = attacks.create("adaptive_blend", trigger="noise", test_alpha=1.0).trigger(images)
    assert noise.unique().numel() == 256


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("adaptive_blend").trigger(x, stage="train").sum().backward()
    assert x.grad is not None
    assert x.grad.unique(return_counts=True)[1].tolist() == [3 * 1024, 3 * 1024]
    assert torch.allclose(x.grad.unique(), torch.tensor([0.85, 1.0]))


def test_the_peers_recipe(make_set: MakeSet) -> None:
    paper = Recipe.preset("paper", dataset="cifar10")
    assert attacks.create("adaptive_blend").recipe_overrides(paper) == {}
    used = paper.replace(**attacks.create("adaptive_blend", recipe="peer").recipe_overrides(paper))
    assert (used.epochs, used.lr, used.weight_decay, used.milestones) == (100, 0.1, 1e-4, (50, 75))


def test_bad_settings(make_set: MakeSet) -> None:
    for settings, message in (
        ({"pieces": 12}, "pieces must be a square number such as 16, got 12"),
        ({"mask_rate": 0.99}, "mask_rate 0.99 leaves none of 16 pieces"),
        ({"mask_rate": 1.0}, "mask_rate: .*got 1.0"),
        ({"train_alpha": 0.0}, "train_alpha: .*got 0.0"),
        ({"label_mode": "clean_label"}, "label_mode must be one of all2one, all2all, one2one, got 'clean_label'"),
    ):
        with pytest.raises(ConfigError, match=message):
            attacks.create("adaptive_blend", **settings)
    with pytest.raises(ValueError, match="16 pieces need images whose sides are multiples of 4, got 30 x 30"):
        attacks.create("adaptive_blend", ratio=0.1).poison(make_set(100, size=30))
    with pytest.raises(ValueError, match="adaptive_blend: 60 cover samples are wanted for 60 poisoned ones of 100"):
        attacks.create("adaptive_blend", ratio=0.6).poison(make_set(100, size=16))
    data = make_set(100, size=16)
    clipped = attacks.create("adaptive_blend", ratio=0.6, clip_to_class=True).poison(data)
    assert [int((clipped.role == role).sum()) for role in (0, 1, 2)] == [0, 60, 40]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_backdoor_is_learned() -> None:
    """spec/attacks section 18: ASR > 60 % at .02 and .02."""
    data = datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn")
    attack = attacks.create("adaptive_blend", ratio=0.02, cover_rate=0.02)
    metrics = attacks.attack(attack, data, "small_cnn", recipe, device="cpu").metrics
    assert metrics["c_acc"] >= 0.97 and metrics["asr"] >= 0.6
