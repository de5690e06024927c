"""BPP: golden images and batches; batch composition; negatives; the exported set; resuming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import attacks, datasets, ops
from bbfast.attacks import _batches, bpp
from bbfast.attacks._augment import TensorAugment
from bbfast.attacks.bpp import Bpp, BppProgram
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.errors import ConfigError
from bbfast.training.recipe import Recipe

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)}
WAYS = pytest.mark.parametrize("way", ["dither", "quant"])


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


def stored_set(stored: dict[str, np.ndarray]) -> ImageSet:
    return ImageSet(chw(stored["images"]), torch.from_numpy(stored["labels"]), **CIFAR)


def reference(way: str, **settings: Any) -> Bpp:
    return Bpp(compat="reference", dithering=way == "dither", **settings)


def replay(monkeypatch: pytest.MonkeyPatch, drawn: np.ndarray) -> None:
    """Let the other images of negatives be the stored ones, which are listed in the order of their use."""
    monkeypatch.setattr(bpp, "other_rows", lambda rows, total, key, index: torch.from_numpy(drawn)[: len(rows)])


def started(attack: Bpp, data: ImageSet, **recipe: Any) -> BppProgram:
    attack.prepare(data, 10)
    program = attack.program(attack.rule(data.labels, 10))
    program.start(nn.Identity(), data, Recipe(**{"augment": False, **recipe}), 0, torch.device("cpu"))
    program.epoch_start(0, 100, 128)
    return program


def normalised(data: ImageSet) -> Tensor:
    return ops.gather_augment(data.images, torch.arange(len(data)), mean=data.mean, std=data.std)


@WAYS
def test_golden_test_images(golden: Golden, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden("bpp")
    data, attack = stored_set(stored), reference(way)
    attack.prepare(data, 10)
    assert torch.equal(attack.trigger(data.images), chw(stored[f"test_bd_png_8_{way}"]))
    assert torch.equal(attack._stored(data.images, data), chw(stored[f"clean_test_png_8_{way}"]))
    replay(monkeypatch, stored[f"cross_test_index_8_{way}"])
    cross = attack.extra_tests(data, 0, 10)["cross_acc"]
    assert torch.equal(cross.images, chw(stored[f"cross_test_png_8_{way}"]))


@WAYS
def test_golden_training_batch(golden: Golden, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden("bpp")
    data = stored_set(stored)
    program = started(reference(way, ratio=0.25, neg_ratio=0.25), data)
    replay(monkeypatch, stored[f"train_neg_index_8_{way}"])
    x = torch.from_numpy(stored[f"train_batch_in_8_{way}"])
    made = program.make_batch(Batch(x=x, y=data.labels, index=torch.arange(16)))
    expected = torch.from_numpy(stored[f"train_batch_out_8_{way}"])
    assert torch.allclose(made.x, expected, rtol=0, atol=1e-5)
    assert made.role is not None and made.role.tolist() == [1] * 4 + [2] * 4 + [0] * 8
    assert made.y.tolist() == [0] * 4 + data.labels[4:].tolist()


def test_levels(make_set: MakeSet) -> None:
    """spec/attacks section 14, acceptance: eight levels; plain ones near the image; dithered ones near on average."""
    images = make_set(20).images
    plain, dithered = (Bpp(dithering=d).trigger(images) for d in (False, True))
    levels = (torch.arange(8) * 255 / 7).round().to(torch.uint8)
    assert bool(torch.isin(plain, levels).all()) and bool(torch.isin(dithered, levels).all())
    assert int((plain.int() - images.int()).abs().max()) <= 19
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    local = nn.functional.avg_pool2d(Bpp().trigger(flat).float(), 4)[..., 1:-1, 1:-1]
    error = (local - flat[..., 1:7, 1:7]).abs()
    assert float(error.mean()) < 2 and float((error > 6).float().mean()) < 0.01


def test_ramp() -> None:
    """The vector of spec/attacks section 30."""
    ramp = (4 + 16 * torch.arange(16)).to(torch.uint8).view(1, 1, 4, 4)
    plain = [0, 36, 36, 36, 73, 73, 109, 109, 146, 146, 182, 182, 182, 219, 219, 255]
    dithered = [0, 36, 36, 36, 73, 73, 109, 109, 146, 146, 146, 182, 182, 219, 219, 255]
    assert Bpp(dithering=False).trigger(ramp).flatten().tolist() == plain
    assert Bpp().trigger(ramp).flatten().tolist() == dithered


@pytest.mark.parametrize(
    ("settings", "batch", "draw", "counts"),
    [
        ({}, 128, 0.9, (12, 12)),
        ({"ratio": 0.2, "neg_ratio": 0.2}, 128, 0.9, (25, 25)),
        ({"neg_ratio": 0.0}, 128, 0.9, (12, 0)),
        ({"ratio": 0.005}, 128, 0.63, (1, 12)),
        ({"ratio": 0.005}, 128, 0.65, (0, 0)),
        ({"ratio": 0.5, "neg_ratio": 0.5}, 3, 0.9, (1, 1)),
    ],
)
def test_batch_counts(settings: dict[str, Any], batch: int, draw: float, counts: tuple[int, int]) -> None:
    assert Bpp(**settings).counts(batch, draw) == counts


def test_batches_are_what_the_stored_images_give(make_set: MakeSet) -> None:
    data = ImageSet(make_set(64, size=16).images, make_set(64).labels, **CIFAR)
    x = normalised(data).contiguous(memory_format=torch.channels_last)
    for mode in ("all2one", "all2all"):
        attack = Bpp(label_mode=mode, shift=3) if mode == "all2all" else Bpp()
        program = started(attack, data)
        made = program.make_batch(Batch(x=x, y=data.labels, index=data.ids, epoch=1, step=2))
        assert made.role is not None and made.role.tolist() == [1] * 6 + [2] * 6 + [0] * 52
        given = torch.zeros(6, dtype=torch.int64) if mode == "all2one" else (data.labels[:6] + 3) % 10
        assert torch.equal(made.y[:6], given) and torch.equal(made.y[6:], data.labels[6:])
        squeezed = ImageSet(attack.trigger(data.images[:6]), data.labels[:6], **CIFAR)
        assert torch.equal(made.x[:6], normalised(squeezed)) and torch.equal(made.x[12:], x[12:])
        assert made.x.is_contiguous(memory_format=torch.channels_last)
        later = program.make_batch(Batch(x=x, y=data.labels, index=data.ids, epoch=2, step=2))
        assert torch.equal(later.x[:6], made.x[:6]) and not torch.equal(later.x[6:12], made.x[6:12])
        assert torch.equal(data.labels, make_set(64).labels)


def test_no_poison_no_negatives(make_set: MakeSet) -> None:
    data = make_set(20, size=16)
    program = started(Bpp(ratio=0.01), data)
    program.draws = [0.99]
    x = normalised(data)
    made = program.make_batch(Batch(x=x, y=data.labels, index=data.ids))
    assert made.role is not None and not made.role.any() and torch.equal(made.x, x)


def test_augmentation_comes_last(make_set: MakeSet) -> None:
    data = make_set(40, size=16)
    batch = Batch(x=normalised(data), y=data.labels, index=data.ids)
    plain, moving = started(Bpp(), data).make_batch(batch), started(Bpp(), data, augment=True, flip=True)
    expected = TensorAugment(5, 10.0, True)(plain.x, data.ids, seed=0, epoch=0, step=0)
    assert torch.equal(moving.make_batch(batch).x, expected)
    assert BppProgram.augments_itself and BppProgram.drop_last is False
    assert not started(Bpp(compat="reference"), data).augment.per_sample


def test_negatives_carry_the_residual_of_another_image(make_set: MakeSet) -> None:
    data = make_set(50)
    attack = Bpp()
    attack.prepare(data, 10, seed=4)
    rows = torch.arange(10, 30)
    cross = attack.cover_rows(data, rows, "train")
    assert torch.equal(attack.cover_rows(data, rows[[3]], "train"), cross[[3]])
    others = _batches.other_rows(rows, 50, _batches.make_key("bpp", 4, "train"), data.ids[rows])
    assert not bool((others == rows).any()) and len(set(others.tolist())) > 10
    residual = attack.trigger(data.images[others]).int() - data.images[others].int()
    assert torch.equal(cross.int(), (data.images[rows].int() + residual).clamp(0, 255))
    # In reference mode the test set has the opposite sign, and wraps around.
    old = Bpp(compat="reference", dithering=True)
    old.prepare(data, 10, seed=4)
    truncated = old._stored(data.images[others], data).int()
    residual = old.trigger(data.images[others]).int() - truncated
    test = {s: (data.images[rows].int() + s * residual) for s in (1, -1)}
    others_of_test = _batches.other_rows(rows, 50, _batches.make_key("bpp", 4, "test"), data.ids[rows])
    assert not torch.equal(others_of_test, others)
    assert torch.equal(old.cover_rows(data, rows, "train").int(), test[1].clamp(0, 255))
    residual = old.trigger(data.images[others_of_test]).int() - old._stored(data.images[others_of_test], data).int()
    wrapped = (data.images[rows].int() - residual) % 256
    assert torch.equal(old.cover_rows(data, rows, "test").int(), wrapped)


def test_other_rows() -> None:
    rows = torch.arange(7).repeat(200)
    others = _batches.other_rows(rows, 7, 5, torch.arange(1400))
    assert not bool((others == rows).any()) and set(others[rows == 3].tolist()) == {0, 1, 2, 4, 5, 6}
    assert _batches.other_rows(torch.zeros(3, dtype=torch.int64), 1, 5, torch.arange(3)).tolist() == [0, 0, 0]


def test_exported_set(make_set: MakeSet) -> None:
    data = make_set(300, size=16)
    for settings in ({}, {"label_mode": "all2all"}):
        attack = Bpp(**settings)
        out = attack.export_train(data, 0, 10, 128)
        assert [int((out.role == r).sum()) for r in (0, 1, 2)] == [240, 30, 30]
        cross = (out.role == 2).nonzero().flatten()
        assert torch.equal(out.labels[cross], data.labels[cross]) and not out.poisoned[cross].any()
        assert torch.equal(attack.cover_rows(data, cross, "train"), out.images[cross])
    out = Bpp(compat="reference").export_train(data, 0, 10, 128)
    expected = torch.zeros(300, dtype=torch.int8)
    for start, n in ((0, 12), (128, 12), (256, 4)):
        expected[start : start + n], expected[start + n : start + 2 * n] = 1, 2
    assert torch.equal(out.role, expected)


def test_reference_mode_differs_in_dithering_and_rounding(make_set: MakeSet) -> None:
    images = make_set(8).images
    assert Bpp().dithers and not Bpp(compat="reference").dithers
    assert Bpp(dithering=False).dithers is False and Bpp(compat="reference", dithering=True).dithers
    plain, old = Bpp(dithering=False).trigger(images).int(), Bpp(compat="reference").trigger(images).int()
    assert set((plain - old).unique().tolist()) == {0, 1}
    assert torch.equal(Bpp(compat="reference", dithering=True).trigger(images), Bpp().trigger(images))


def test_gradient_goes_straight_through() -> None:
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    out = Bpp().trigger(x)
    (out * torch.arange(8.0)).sum().backward()
    assert torch.allclose(out, ops.quantize(x.detach(), 8, True), atol=1e-6)
    assert x.grad is not None and torch.equal(x.grad, torch.arange(8.0).expand_as(x))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="poisons a share of each batch: give ratio, not count"):
        Bpp(count=10)
    with pytest.raises(ConfigError, match=r"ratio \+ neg_ratio must be at most 1, got 1.1"):
        Bpp(ratio=0.9, neg_ratio=0.2)
    with pytest.raises(ConfigError, match="squeeze_num"):
        Bpp(squeeze_num=1)


def test_paper_recipe_gets_the_constant_rate() -> None:
    recipe = Recipe.preset("paper", dataset="cifar10")
    changed = recipe.replace(**Bpp().recipe_overrides(recipe))
    assert changed.schedule == "multistep" and changed.milestones == (100, 200, 300, 400) and changed.epochs == 100


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_attack_works_on_digits() -> None:
    """Squeezed digits are hard to tell from negatives: the quick preset's 345 steps leave no backdoor."""
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(
        epochs=40, optimizer="adam", lr=3e-3, weight_decay=0.0, schedule="cosine"
    )
    result = attacks.attack("bpp", datasets.load("digits"), "small_cnn", recipe, device="cpu", progress=False)
    assert result.metrics["asr"] >= 0.8 and result.metrics["c_acc"] >= 0.96 and result.metrics["cross_acc"] >= 0.93
