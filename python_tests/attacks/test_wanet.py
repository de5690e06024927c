"""WaNet: golden grids, batches and images; batch composition; the exported set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import attacks, ops
from bbfast.attacks import wanet
from bbfast.attacks._augment import TensorAugment
from bbfast.attacks.wanet import WaNet, WaNetProgram, batch_counts, noisy_grid
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.errors import ConfigError
from bbfast.training.recipe import Recipe

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)}
CASES: dict[str, dict[str, Any]] = {
    "a": {"k": 4, "s": 0.5, "grid_rescale": 1.0},
    "b": {"k": 8, "s": 1.0, "grid_rescale": 0.97},
}


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


def with_grid(stored: dict[str, np.ndarray], case: str, compat: str = "paper", **settings: Any) -> WaNet:
    """The attack with the golden field."""
    attack = attacks.create("wanet", compat=compat, **CASES[case], **settings)
    images = chw(stored["images"])
    attack.prepare(ImageSet(images, torch.zeros(len(images), dtype=torch.int64), **CIFAR), 10)
    attack.tensors["grid"] = torch.from_numpy(stored[f"grid_{case}"])[0]
    assert isinstance(attack, WaNet)
    return attack


def replay(monkeypatch: pytest.MonkeyPatch, drawn: np.ndarray) -> None:
    """Let the noise of cross samples be the stored numbers (0..1) instead of drawn ones."""
    noise = torch.from_numpy(drawn) * 2 - 1
    monkeypatch.setattr(wanet, "uniform", lambda key, index, shape, low, high: noise[: len(index)].clone())


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_grid(golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden("wanet")
    field = torch.from_numpy(stored[f"ins_{case}"])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: field.clone())
    grid = ops.wanet_grid(32, **CASES[case])
    assert torch.allclose(grid, torch.from_numpy(stored[f"grid_{case}"])[0], rtol=0, atol=1e-6)


def test_grid_is_drawn_from_the_generator() -> None:
    grids = [ops.wanet_grid(32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(grids[0], grids[1]) and not torch.equal(grids[0], grids[2])
    assert grids[0].shape == (32, 32, 2) and grids[0].dtype == torch.float32
    for bad, message in (
        ({"size": 1}, "size must be an integer of at least 2, got int 1"),
        ({"size": 32, "s": 0.0}, "s must be a positive number, got float 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.wanet_grid(**bad)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_golden_test_images(golden: Golden, case: str, compat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden("wanet")
    images, expected = chw(stored["images"]), chw(stored[f"test_bd_png_{case}"])
    attack = with_grid(stored, case, compat)
    difference = (attack.trigger(images).int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    exact = chw(stored[f"test_bd_float_{case}"])
    if compat == "paper":  # rounded: within half a level of the exact value
        assert float((attack.trigger(images).float() - exact).abs().max()) <= 0.501
    else:  # the truncation of the reference: all but the values at a whole number
        assert float((difference > 0).float().mean()) < 0.01
    replay(monkeypatch, stored[f"test_cross_rand_{case}"])
    cross = attack.cover(images, torch.arange(16), "test")
    assert int((cross.int() - chw(stored[f"test_cross_png_{case}"]).int()).abs().max()) <= 1


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_training_batch(golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = golden("wanet")
    attack = with_grid(stored, case, ratio=0.25)
    program, data = started(attack, ImageSet(chw(stored["images"]), torch.from_numpy(stored["labels"]), **CIFAR))
    replay(monkeypatch, stored[f"train_cross_rand_{case}"])
    x = torch.from_numpy(stored[f"train_batch_in_{case}"])
    made = program.make_batch(Batch(x=x, y=data.labels, index=torch.arange(16)))
    expected = torch.from_numpy(stored[f"train_batch_out_{case}"])
    assert torch.allclose(made.x, expected, rtol=0, atol=1e-5)
    assert made.role is not None and made.role.tolist() == [1] * 4 + [2] * 8 + [0] * 4
    assert made.y.tolist() == [0] * 4 + data.labels[4:].tolist()


def started(attack: WaNet, data: ImageSet, **recipe: Any) -> tuple[WaNetProgram, ImageSet]:
    program = attack.program(attack.rule(data.labels, 10))
    assert program is not None
    settings = Recipe(**{"augment": False, **recipe})
    program.start(nn.Identity(), data, settings, 0, torch.device("cpu"))
    program.epoch_start(0, 100, 128)
    return program, data


@pytest.mark.parametrize(
    ("ratio", "batch", "counts"),
    [(0.1, 128, (12, 24)), (0.05, 128, (6, 12)), (0.01, 128, (1, 2)), (0.1, 80, (8, 16)), (0.3, 10, (3, 6))],
)
def test_batch_counts_truncate(ratio: float, batch: int, counts: tuple[int, int]) -> None:
    assert batch_counts(ratio, 2.0, batch, 0.999) == counts


def test_below_one_sample_a_batch_the_draw_decides(make_set: MakeSet) -> None:
    assert batch_counts(0.005, 2.0, 128, 0.63) == (1, 2)
    assert batch_counts(0.005, 2.0, 128, 0.65) == (0, 0)
    data, attack = make_set(10, size=16), WaNet(ratio=0.005)
    attack.prepare(data, 10)
    program, _ = started(attack, data)
    share = np.mean([batch_counts(0.005, 2.0, 128, u)[0] for u in program.draws])
    assert 0.4 < share < 0.9  # 100 draws of probability .64


def test_batches(make_set: MakeSet) -> None:
    """Composition, labels of both modes, clean rows untouched, and a function of seed, epoch and sample."""
    data = make_set(64, size=16)
    x = data.images.float() / 255
    for mode in ("all2one", "all2all"):
        attack = WaNet(label_mode=mode)
        attack.prepare(data, 10)
        program, _ = started(attack, data)
        made = program.make_batch(Batch(x=x, y=data.labels, index=data.ids, epoch=1, step=2))
        assert made.role is not None and made.role.tolist() == [1] * 6 + [2] * 12 + [0] * 46
        given = torch.zeros(6, dtype=torch.int64) if mode == "all2one" else (data.labels[:6] + 1) % 10
        assert torch.equal(made.y[:6], given) and torch.equal(made.y[6:], data.labels[6:])
        assert torch.equal(made.x[18:], x[18:]) and torch.equal(made.x[:6], attack.trigger(x[:6]))
        again = program.make_batch(Batch(x=x, y=data.labels, index=data.ids, epoch=1, step=2))
        assert torch.equal(again.x, made.x)
        later = program.make_batch(Batch(x=x, y=data.labels, index=data.ids, epoch=2, step=2))
        assert not torch.equal(later.x[6:18], made.x[6:18]) and torch.equal(later.x[:6], made.x[:6])
        assert torch.equal(data.labels, make_set(64, size=16).labels)


def test_batch_keeps_its_layout_and_augments_last(make_set: MakeSet) -> None:
    data = make_set(40, size=16)
    x = (data.images.float() / 255).contiguous(memory_format=torch.channels_last)
    attack = WaNet()
    attack.prepare(data, 10)
    plain, _ = started(attack, data)
    moving, _ = started(attack, data, augment=True, flip=True)
    batch = Batch(x=x, y=data.labels, index=data.ids)
    warped, made = plain.make_batch(batch), moving.make_batch(batch)
    assert made.x.is_contiguous(memory_format=torch.channels_last)
    expected = TensorAugment(5, 10.0, True)(warped.x, data.ids, seed=0, epoch=0, step=0)
    assert torch.equal(made.x, expected)
    assert WaNetProgram.augments_itself and WaNetProgram.drop_last is False


def test_reference_mode_augments_batch_wise(make_set: MakeSet) -> None:
    data = make_set(10, size=16)
    for compat, per_sample in (("paper", True), ("reference", False)):
        attack = WaNet(compat=compat)
        attack.prepare(data, 10)
        assert started(attack, data)[0].augment.per_sample is per_sample


def test_field(make_set: MakeSet) -> None:
    """spec/attacks section 13, acceptance: constant images stay, corners stay inside, small displacement."""
    data = make_set(10)
    attack = attacks.create("wanet")
    attack.prepare(data, 10, seed=0)
    grid = attack.tensors["grid"]
    assert grid.shape == (32, 32, 2) and float(grid.abs().max()) <= 1
    constant = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(attack.trigger(constant), constant)
    axis = torch.linspace(-1, 1, 32)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    pixels = ((grid - identity) * 31 / 2).abs()
    assert 0.1 < float(pixels.mean()) < 0.6
    other = attacks.create("wanet")
    other.prepare(data, 10, seed=1)
    assert not torch.equal(other.tensors["grid"], grid)


def test_noise_is_one_pixel_at_most() -> None:
    grid = torch.zeros(32, 32, 2)
    noisy = noisy_grid(grid, 5, torch.arange(20))
    assert noisy.shape == (20, 32, 32, 2) and float(noisy.abs().max()) <= 1 / 32
    assert float(noisy.abs().mean()) == pytest.approx(0.5 / 32, rel=0.02)
    assert not torch.equal(noisy[0], noisy[1])
    assert float(noisy_grid(torch.ones(32, 32, 2), 5, torch.arange(20)).max()) == 1


def test_exported_set(make_set: MakeSet) -> None:
    data = make_set(300, size=16)
    for settings in ({}, {"mode": "data"}, {"label_mode": "all2all"}):
        attack = attacks.create("wanet", **settings)
        out = attack.export_train(data, 0, 10, 128)
        assert [int((out.role == r).sum()) for r in (0, 1, 2)] == [210, 30, 60]
        cross = out.role == 2
        assert torch.equal(out.labels[cross], data.labels[cross]) and not out.poisoned[cross].any()
        assert (out.images[cross] != data.images[cross]).flatten(1).any(1).all()
        assert torch.equal(attack.cover(data.images[cross], data.ids[cross], "train"), out.images[cross])


def test_reference_export_takes_the_first_of_each_batch(make_set: MakeSet) -> None:
    data = make_set(300, size=16)
    out = attacks.create("wanet", compat="reference").export_train(data, 0, 10, 128)
    expected = torch.zeros(300, dtype=torch.int8)
    for start, poison in ((0, 12), (128, 12), (256, 4)):
        expected[start : start + poison] = 1
        expected[start + poison : start + 3 * poison] = 2
    assert torch.equal(out.role, expected)
    assert out.labels[:12].eq(0).all() and torch.equal(out.labels[12:128], data.labels[12:128])


def test_cross_test_set(make_set: MakeSet) -> None:
    data = make_set(30, size=16)
    attack = attacks.create("wanet")
    attack.prepare(data, 10)
    cross = attack.extra_tests(data, 0, 10)["cross_acc"]
    assert torch.equal(cross.labels, data.labels) and len(cross) == 30
    assert not torch.equal(cross.images, attack.trigger(data.images))


def test_gradients_reach_the_image() -> None:
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("wanet").trigger(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_bad_settings(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="give ratio, not count"):
        attacks.create("wanet", count=10)
    with pytest.raises(ConfigError, match=r"ratio \* \(1 \+ cross_ratio\) must be at most 1, got 1.5"):
        attacks.create("wanet", ratio=0.5)
    with pytest.raises(ValueError, match=r"60 poisoned samples ask for 120 cross samples, but 40 are left"):
        attacks.create("wanet", mode="data", count=60).poison(make_set(100, size=16))
    wide = ImageSet(torch.zeros(4, 3, 16, 24, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="images must be square, got 16 x 24"):
        attacks.create("wanet").trigger(wide.images)
    assert len(attacks.create("wanet", mode="data", ratio=1 / 3).poison(make_set(11, size=16), num_classes=10)) == 11


def test_paper_recipe_gets_the_constant_rate() -> None:
    recipe = Recipe.preset("paper", dataset="cifar10")
    changed = recipe.replace(**attacks.create("wanet").recipe_overrides(recipe))
    assert changed.schedule == "multistep" and changed.milestones == (100, 200, 300, 400) and changed.epochs == 100
    assert attacks.create("wanet", mode="data").recipe_overrides(recipe) == {}
    assert attacks.create("badnets").recipe_overrides(recipe) == {}
