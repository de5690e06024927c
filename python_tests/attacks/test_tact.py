"""TaCT: who is poisoned and who covers, the patch, and a backdoor that works for the source class alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast import Recipe, attacks, datasets
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

MakeSet = Callable[..., ImageSet]


def test_defaults_are_the_papers() -> None:
    c: Any = attacks.create("tact").config
    assert (c.ratio, c.cover_rate, c.source_classes, c.cover_classes, c.target) == (0.003, None, (1,), (5, 7), 0)


def test_roles(make_set: MakeSet) -> None:
    """spec/attacks section 17: all poisoned samples are of the source classes; covers keep their labels."""
    data = make_set(1000, size=16)
    settings: dict[str, Any] = {"source_classes": (1, 2), "cover_classes": (4, 6), "target": 3, "ratio": 0.05}
    for rate, covers in ((None, 50), (0.1, 100), (0.0, 0)):
        out = attacks.create("tact", cover_rate=rate, **settings).poison(data, seed=1, num_classes=10)
        poison, cover = out.role == 1, out.role == 2
        assert (int(poison.sum()), int(cover.sum())) == (50, covers)
        assert set(data.labels[poison].tolist()) == {1, 2} and bool((out.labels[poison] == 3).all())
        assert set(data.labels[cover].tolist()) == ({4, 6} if covers else set())
        assert torch.equal(out.labels[~poison], data.labels[~poison])
        # Both carry the same patch; everybody else is as before.
        changed = (out.images != data.images).flatten(1).any(1)
        assert torch.equal(changed, poison | cover)


def test_patch(make_set: MakeSet) -> None:
    """Rows and columns 21..28 at 32 pixels, twice as large at 64; dark and bright cells take turns."""
    for size, first, last in ((32, 21, 28), (64, 42, 57)):
        data = make_set(4, size=size)
        attack = attacks.create("tact")
        attack.prepare(data, 10)
        rows, columns = attack.tensors["mask"][0].nonzero(as_tuple=True)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, last, first, last)
        assert len(rows) == (last - first + 1) ** 2
        out = attack.trigger(data.images)
        inside = out[:, :, first : last + 1, first : last + 1]
        assert bool((inside == attack.tensors["pattern"][:, first : last + 1, first : last + 1]).all())
    cells = inside[0, :, ::2, ::2]
    chess = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0
    assert int(cells[:, chess].min()) >= 128 and int(cells[:, ~chess].max()) <= 127 and cells.unique().numel() > 60


def test_own_picture(make_set: MakeSet, tmp_path: Path) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:4, :4] = 200
    Image.fromarray(picture).save(tmp_path / "trigger.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "mask.png")
    images = make_set(3).images
    out = attacks.create("tact", trigger_path=tmp_path / "trigger.png").trigger(images)
    assert bool((out[:, :, :4, :4] == 200).all()) and torch.equal(out[:, :, 4:], images[:, :, 4:])
    masked = attacks.create("tact", trigger_path=tmp_path / "trigger.png", mask_path=tmp_path / "mask.png")
    assert int(masked.trigger(images)[:, :, 4:].max()) == 0
    Image.fromarray(picture * 0).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="tact: the trigger changes nothing"):
        attacks.create("tact", trigger_path=tmp_path / "black.png").trigger(images)


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("tact").trigger(x).sum().backward()
    assert x.grad is not None and float(x.grad.sum()) == 2 * 3 * (1024 - 64)


def test_bad_settings(make_set: MakeSet, tmp_path: Path) -> None:
    for settings, message in (
        ({"cover_classes": (0, 5)}, r"cover_classes must not hold the target 0, got \[0, 5\]"),
        ({"cover_classes": (1, 5)}, r"cover_classes must not hold a source class \[1\], got \[1, 5\]"),
        ({"cover_classes": ()}, "cover_classes must name at least one class unless cover_rate is 0"),
        ({"target": 1}, r"source_classes must not hold the target 1, got \[1\]"),
        ({"mask_path": tmp_path}, "mask_path needs trigger_path"),
        ({"cover_rate": 1.5}, r"cover_rate: .*got 1\.5"),
        ({"label_mode": "all2one", "source_classes": ()}, "label_mode must be one of one2one, got 'all2one'"),
    ):
        with pytest.raises(ConfigError, match=message):
            attacks.create("tact", **settings)
    data = make_set(100, size=16)
    for settings, message in (
        ({"ratio": 0.2}, r"asks for 20 of 100 samples, but class \[1\] has 10"),
        ({"ratio": 0.05, "cover_rate": 0.3}, "tact: 30 cover samples are wanted for 5 poisoned ones of 100, but 20"),
        ({"ratio": 0.05, "cover_rate": 0.001}, r"tact: cover_rate 0\.001 of 100 samples gives no cover sample"),
        ({"ratio": 0.05, "cover_classes": (5, 10)}, r"cover_classes must be classes in 0\.\.9, got \[5, 10\]"),
    ):
        with pytest.raises(ValueError, match=message):
            attacks.create("tact", **settings).poison(data)
    clipped = attacks.create("tact", ratio=0.2, cover_rate=0.3, clip_to_class=True).poison(data)
    assert [int((clipped.role == role).sum()) for role in (0, 1, 2)] == [70, 10, 20]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_backdoor_is_learned_for_the_source_class_alone() -> None:
    """spec/attacks section 17: source ASR > 90 %, others < 30 %."""
    data = datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn")
    attack = attacks.create("tact", ratio=0.02, cover_rate=0.02)
    metrics = attacks.attack(attack, data, "small_cnn", recipe, device="cpu").metrics
    assert metrics["c_acc"] >= 0.97 and metrics["asr"] >= 0.9 and metrics["leak"] <= 0.3
