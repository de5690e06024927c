"""BATT: the two moves, what benign images go through in training, and real trainings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bbfast import Recipe, attacks, datasets, ops
from bbfast.attacks.batt import BATT, BATTProgram, move, moving_grid
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.errors import ConfigError

MakeSet = Callable[..., ImageSet]
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.243, 0.261)}


def test_defaults_are_the_papers() -> None:
    c: Any = attacks.create("batt").config
    assert (c.ratio, c.mode, c.angle, c.benign_angle, c.interpolation) == (0.05, "rotation", 16, 10, "nearest")


@pytest.mark.parametrize("size", [28, 32, 33, 64])
@pytest.mark.parametrize("angle", [16.0, -25.0])
def test_rotation_is_that_of_torchvision(size: int, angle: float, make_set: MakeSet) -> None:
    images = make_set(4, size=size).images
    out = attacks.create("batt", angle=angle).trigger(images)
    assert torch.equal(out, F.rotate(images, angle, InterpolationMode.NEAREST))
    smooth = attacks.create("batt", angle=angle, interpolation="bilinear").trigger(images)
    theirs = F.rotate(images, angle, InterpolationMode.BILINEAR)
    inside = (..., slice(size // 4, -size // 4), slice(size // 4, -size // 4))
    assert int((smooth.int() - theirs.int())[inside].abs().max()) <= 1
    assert not torch.equal(smooth, out)


def test_acceptance(make_set: MakeSet) -> None:
    """spec/attacks section 24: corners black, the centre nearly unchanged."""
    images = make_set(8).images.clamp(min=1)
    out = attacks.create("batt").trigger(images)
    assert not bool(out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].any())
    assert torch.equal(out[:, :, 15:17, 15:17], images[:, :, 15:17, 15:17])
    # Counter-clockwise: what was right of the centre goes up.
    dot = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dot[:, :, 14:18, 27:30] = 255
    rows, columns = attacks.create("batt").trigger(dot)[0, 0].nonzero(as_tuple=True)
    assert float(rows.float().mean()) == pytest.approx(15.5 - 12.5 * math.sin(math.radians(16)), abs=0.5)
    assert float(columns.float().mean()) == pytest.approx(15.5 + 12.5 * math.cos(math.radians(16)), abs=0.5)


def test_translation(make_set: MakeSet) -> None:
    for size, settings, pixels in ((32, {}, 6), (64, {}, 12), (32, {"pixels": 9}, 9)):
        images = make_set(4, size=size).images.clamp(min=1)
        out = attacks.create("batt", mode="translation", **settings).trigger(images)
        assert torch.equal(out[..., pixels:], images[..., :-pixels]) and not bool(out[..., :pixels].any())


def test_gradients() -> None:
    """Float images keep their gradient; with bilinear sampling the angle has one too."""
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    attacks.create("batt").trigger(x).sum().backward()
    assert x.grad is not None and 0.5 < float((x.grad > 0.5).float().mean()) < 1
    angle = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)

    def turned(a: Tensor) -> Tensor:
        return move(image, moving_grid((12, 12), a, torch.zeros(1, 2, dtype=torch.float64), nearest=False))[
            ..., 3:9, 3:9
        ]

    assert torch.autograd.gradcheck(turned, (angle,), eps=1e-7, atol=1e-3)


def started(data: ImageSet, recipe: Recipe | None = None, seed: int = 0, **settings: Any) -> tuple[BATTProgram, Any]:
    attack = attacks.create("batt", **{"ratio": 0.25, **settings})
    poisoned = attack.poison(data, seed=1, num_classes=10)
    program = attack.poisoned_program(poisoned)
    assert isinstance(attack, BATT) and isinstance(program, BATTProgram)
    program.start(nn.Identity(), poisoned.as_imageset(), recipe or Recipe(), seed, torch.device("cpu"))
    return program, poisoned


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CIFAR.values())
    return (images.float() / 255 - mean) / std


@pytest.mark.parametrize("mode", ["rotation", "translation"])
def test_benign_images_move_a_little_and_poisoned_ones_stay(mode: str, make_set: MakeSet) -> None:
    plain = make_set(200)
    data = ImageSet(plain.images, plain.labels, **CIFAR)
    program, poisoned = started(data, mode=mode)
    index = torch.randperm(200)
    x = normalised(poisoned.images[index])
    batch = Batch(x=x, y=poisoned.labels[index], index=index, epoch=3)
    made = program.make_batch(batch)
    assert made.role is not None and torch.equal(made.role, poisoned.role[index])
    bad = poisoned.poisoned[index]
    assert torch.allclose(made.x[bad], x[bad], rtol=0, atol=1e-5) and torch.equal(made.y, batch.y)
    # Undo the normalisation: pixels are those of the moved image, and what moved in is black.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in CIFAR.values())
    pixels = ((made.x * std + mean) * 255).round()
    clean = data.images[index][~bad].float()
    if mode == "translation":
        seen = set()
        for image, out in zip(clean, pixels[~bad], strict=True):
            fits = [
                (down, right)
                for down in range(-3, 4)
                for right in range(-3, 4)
                if torch.equal(F.affine(image, 0.0, [right, down], 1.0, [0.0]), out)
            ]
            assert fits
            seen |= set(fits)
        assert len(seen) > 30
    else:
        grids = program.attack.benign_grid(5, index, (3, 32, 32))
        far = (grids - moving_grid((32, 32), torch.zeros(1), torch.zeros(1, 2))).abs().flatten(1).amax(1)
        most = 2 * math.sin(math.radians(5)) * math.sqrt(2) + 3 / 31
        assert float(far.median()) > 0.05 and float(far.max()) <= most
        corners = pixels[~bad][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert 0.2 < float((corners == 0).float().mean()) < 1
    # The draws are the sample's, whatever the batch; another epoch draws others.
    again = program.make_batch(Batch(x=x[:7], y=batch.y[:7], index=index[:7], epoch=3))
    assert torch.equal(again.x, made.x[:7])
    other = program.make_batch(Batch(x=x, y=batch.y, index=index, epoch=4))
    assert not torch.allclose(other.x[~bad], made.x[~bad])


def test_training_without_augmentation_moves_nothing(make_set: MakeSet) -> None:
    data = make_set(40)
    program, poisoned = started(data, Recipe(augment=False))
    x = torch.rand(40, 3, 32, 32)
    made = program.make_batch(Batch(x=x, y=poisoned.labels, index=torch.arange(40)))
    assert torch.equal(made.x, x) and program.augments_itself


def test_the_loop_uses_the_program(make_set: MakeSet) -> None:
    """The hook: roles reach the history, flips and crops are off; other poison-only attacks train plainly."""
    from bbfast.data.datapair import DataPair

    pair = DataPair(make_set(80, size=16), make_set(40, size=16, seed=1), name="smooth")
    recipe = Recipe(epochs=1, batch_size=16, lr=0.05, flip=True)
    run = [
        attacks.attack(attacks.create(name, ratio=0.2), pair, "small_cnn", recipe, device="cpu", progress=False)
        for name in ("batt", "badnets")
    ]
    assert "train_asr" in run[0].history[0] and "train_asr" not in run[1].history[0]
    assert 0 <= run[0].metrics["benign_acc"] <= 1 and "benign_acc" not in run[1].metrics
    assert int(run[0].poisoned.sum()) == 16 and torch.equal(run[0].test.images, pair.test.images)
    assert attacks.create("badnets").poisoned_program(attacks.create("badnets").poison(pair.train)) is None


def test_benign_test_images_move_like_benign_training_images(make_set: MakeSet) -> None:
    data = make_set(20)
    attack = attacks.create("batt")
    attack.prepare(data, 10, seed=4)
    moved = attack.extra_tests(data, 4, 10)["benign_acc"]
    assert torch.equal(moved.labels, data.labels) and moved.images.shape == data.images.shape
    assert not torch.equal(moved.images, data.images)
    part = attack.extra_tests(data.subset(torch.tensor([7, 3])), 4, 10)["benign_acc"]
    assert torch.equal(part.images, moved.images[[7, 3]])


def test_bad_settings(make_set: MakeSet) -> None:
    for settings, message in (
        ({"benign_angle": 16}, r"benign_angle must be smaller than angle 16\.0"),
        ({"angle": 0}, r"benign_angle must be smaller than angle 0\.0"),
        ({"angle": 200}, "angle: .*got 200"),
        ({"pixels": 3, "benign_pixels": 3}, "benign_pixels must be smaller than pixels 3, got 3"),
        ({"mode": "shear"}, "mode: .*'rotation' or 'translation', got 'shear'"),
    ):
        with pytest.raises(ConfigError, match=message):
            attacks.create("batt", **settings)
    data = make_set(100, size=16)
    with pytest.raises(
        ValueError, match="pixels must lie between benign_pixels and the images' width, got 2 < 16 < 16"
    ):
        attacks.create("batt", mode="translation", pixels=16).poison(data)
    for pixels in (16, 2):
        with pytest.raises(ValueError, match=f"between benign_pixels and the images' width, got 2 < {pixels} < 16"):
            attacks.create("batt", mode="translation", pixels=pixels).poison(data)
    with pytest.raises(ValueError, match=r"a rotation of 0\.5 degrees moves no pixel of 16 x 16 images"):
        attacks.create("batt", angle=0.5, benign_angle=0).poison(data)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_backdoor_is_learned() -> None:
    """spec/attacks section 24: ASR above 90 %; and what the benign rotations are for."""
    data = datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn")
    result = attacks.attack("batt", data, "small_cnn", recipe, device="cpu")
    metrics = result.metrics
    assert metrics["c_acc"] >= 0.97 and metrics["benign_acc"] >= 0.96 and metrics["asr"] >= 0.9
    # A rotation of 8 degrees, half way to the trigger, is still benign.
    from bbfast.training import predict_labels

    test = data.test.subset(data.test.labels != 0)
    grid = moving_grid((32, 32), torch.tensor([math.radians(8)]), torch.zeros(1, 2))[0]
    half = ImageSet(ops.warp(test.images, grid), test.labels, mean=data.mean, std=data.std)
    assert float((predict_labels(result.model, half, device="cpu").cpu() == 0).float().mean()) <= 0.1


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_translation_is_learned() -> None:
    data = datasets.load("digits")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn")
    attack = attacks.create("batt", mode="translation", ratio=0.1)
    metrics = attacks.attack(attack, data, "small_cnn", recipe, device="cpu").metrics
    assert metrics["c_acc"] >= 0.96 and metrics["benign_acc"] >= 0.95 and metrics["asr"] >= 0.9
