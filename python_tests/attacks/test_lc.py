"""LC: golden corners, the perturbation within its bounds and harmful, what training and test images carry, GAN mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks._lc_gan import Generator, encode, train_generator
from bbfast.attacks._rows import add_changes, changes
from bbfast.attacks.lc import LabelConsistent, corner_signs
from bbfast.attacks.prerequisites import default_context
from bbfast.attacks.surrogate import clean_surrogate, l2_pgd, linf_pgd
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError
from bbfast.store import Store

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
STANDARD = {"surrogate_kind": "standard", "ratio": 0.2, "clip_to_class": True, "steps": 6}


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


@pytest.fixture
def context(tmp_path: Path, make_set: MakeSet) -> AttackContext:
    """A surrogate that is a fixed linear map, at once there."""

    def linear(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10, bias=False))
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(10, 768, generator=torch.Generator().manual_seed(0)) * 0.1)
        return model

    plain = default_context(make_set(64, 16), 10, 0)
    recipe = bbfast.Recipe(epochs=0)
    return dataclasses.replace(plain, fresh_model=linear, recipe=recipe, store=Store(tmp_path), progress=False)


@pytest.mark.parametrize("amplitude", ["1", "0.25"])
@pytest.mark.parametrize("corners", ["all-corners", "bottom-right"])
def test_golden_corners(golden: Golden, corners: str, amplitude: str) -> None:
    """compat='reference', bit for bit, also at another size; paper mode rounds what the reference cuts off."""
    stored = golden("lc")
    which = {"all-corners": "all", "bottom-right": "bottom_right"}[corners]
    settings = {"amplitude": float(amplitude), "corners": which}
    for prefix in ("", "48x64_"):
        images = chw(stored["images_48x64" if prefix else "images"])
        reference, paper = (attacks.create("lc", compat=compat, **settings) for compat in ("reference", "paper"))
        for attack in (reference, paper):
            size = (3, *map(int, images.shape[2:]))
            attack.tensors = {"signs": corner_signs(size, which, exact=attack is reference)}
            attack.image_size = size
        expected = chw(stored[f"out_{prefix}{corners}_{amplitude}"])
        assert torch.equal(reference.trigger(images), expected)
        exact = images.double() + float(amplitude) * 255 * paper.tensors["signs"]
        assert torch.equal(paper.trigger(images), exact.clamp(0, 255).round().to(torch.uint8))
        assert torch.equal(paper.trigger(images), expected) == (amplitude == "1")


def test_corners_at_other_sizes() -> None:
    """spec/attacks section 30: 36 pixels at 32, of each corner 4 plus and 5 minus; 6 x 6 corners at 64."""
    signs = corner_signs((3, 32, 32))
    assert signs[0].count_nonzero() == 36 and signs[0].sum() == -4
    assert torch.equal(signs, signs.flip(2)) and torch.equal(signs[:, :3], signs[:, -3:])
    assert torch.equal(signs[0, -3:, -3:], torch.tensor([[-1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]))
    double = corner_signs((1, 64, 64))
    assert torch.equal(double, signs[:1].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert corner_signs((3, 32, 32), "bottom_right")[0].count_nonzero() == 9
    # Smaller images keep whole corners; the reference loses cells.
    assert corner_signs((1, 16, 16)).count_nonzero() == 36
    assert corner_signs((1, 16, 16), exact=True).count_nonzero() < 36
    with pytest.raises(ValueError, match="need images of at least 6 x 6 pixels, got 5 x 16"):
        corner_signs((1, 5, 16))


def test_ascent_stays_in_its_ball(context: AttackContext) -> None:
    model = context.fresh_model(0).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(12, 3, 16, 16, generator=generator), torch.arange(12) % 10
    loss = nn.functional.cross_entropy(model(images), labels)
    near = linf_pgd(model, images, labels, 8 / 255, 1.5 / 255, 20)
    assert float((near - images).abs().max()) <= 8 / 255 + 1e-6
    short = l2_pgd(model, images, labels, 0.5, 0.1, 20)
    norm = (short - images).flatten(1).norm(dim=1)
    assert float(norm.max()) <= 0.5 + 1e-4 and float(norm.min()) > 0.3
    for moved in (near, short):
        assert moved.min() >= 0 and moved.max() <= 1
        assert float(nn.functional.cross_entropy(model(moved), labels)) > float(loss) + 0.1
    # Where gradients vanish nothing moves and nothing becomes NaN.
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    nn.init.zeros_(flat[1].weight)
    assert torch.equal(l2_pgd(flat, images, labels, 0.5, 0.1, 2), images)


@pytest.mark.parametrize(("norm", "eps"), [("linf", None), ("linf", 16 / 255), ("l2", 1.0)])
def test_training_images_carry_both_test_images_the_corners(
    context: AttackContext, make_set: MakeSet, norm: str, eps: float | None
) -> None:
    """spec/attacks section 3, 'Acceptance'."""
    data = make_set(64, 16)
    attack = attacks.create("lc", **STANDARD, perturbation=norm, eps=eps)
    attack.prepare(data, 10, 0, context)
    poisoned = attack.poison(data, 0, 10)
    assert poisoned.poisoned.nonzero().flatten().tolist() == list(range(0, 64, 10))
    assert torch.equal(poisoned.labels, data.labels)
    before, after = data.images[poisoned.poisoned].double(), poisoned.images[poisoned.poisoned].double()
    corner = attack.tensors["signs"][0] != 0
    change = (after - before)[..., ~corner]
    assert float(change.abs().max()) > 0
    if norm == "linf":
        assert float(change.abs().max()) <= round((eps or 8 / 255) * 255)
    else:
        assert float(change.flatten(1).norm(dim=1).max()) <= 255 * 1.0 + 0.5 * change[0].numel() ** 0.5
    plus = attack.tensors["signs"][0] > 0
    assert bool((after[..., plus] == 255).all()) and bool((after[..., corner & ~plus] == 0).all())
    seen = attack.trigger(data.images)
    assert torch.equal(seen[..., ~corner], data.images[..., ~corner]) and bool((seen[..., plus] == 255).all())
    # The surrogate knows the perturbed images less well.
    surrogate = clean_surrogate(context, data, 10, attack.config, 0)
    rows = data.labels == 0
    crafted = add_changes(data.images[rows], data.ids[rows], attack.tensors["ids"], attack.tensors["change"])
    truth = data.labels[rows]
    losses = [nn.functional.cross_entropy(surrogate(x.float() / 255), truth) for x in (data.images[rows], crafted)]
    assert float(losses[1]) > float(losses[0]) + 0.05


def test_amplitudes_of_training_and_test(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(64, 16)
    attack = attacks.create("lc", **STANDARD, amplitude=16 / 255, test_amplitude=64 / 255)
    attack.prepare(data, 10, 0, context)
    grey = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    for stage, level in (("train", 16), ("test", 64)):
        change = attack.trigger(grey, torch.tensor([63]), stage).int() - 128  # type: ignore[arg-type]
        assert change.unique().tolist() == [-level, 0, level]
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    for stage in ("train", "test"):
        x.grad = None
        attack.trigger(x, torch.tensor([0]), stage).sum().backward()  # type: ignore[arg-type]
        assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_perturbed_images_are_made_once_for_all_ratios(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(64, 16)
    for more in ({}, {"ratio": 0.02}, {"amplitude": 0.5}, {"corners": "bottom_right"}):
        attacks.create("lc", **{**STANDARD, **more}).prepare(data, 10, 0, context)
    assert context.store is not None and len(context.store.list("prerequisite", "lc_images")) == 1
    attacks.create("lc", **STANDARD, eps=0.1).prepare(data, 10, 0, context)
    attacks.create("lc", **STANDARD, compat="reference").prepare(data, 10, 0, context)
    assert len(context.store.list("prerequisite", "lc_images")) == 3


def test_reference_truncates_the_perturbed_images(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(64, 16)
    kept = {}
    for compat in ("paper", "reference"):
        attack = attacks.create("lc", **STANDARD, compat=compat, step=1.3 / 255)
        attack.prepare(data, 10, 0, context)
        kept[compat] = attack.tensors["change"].int()
    difference = kept["paper"] - kept["reference"]
    assert difference.unique().tolist() == [0, 1]


def test_changes_go_by_sample_number(make_set: MakeSet) -> None:
    rows = dataclasses.replace(make_set(3, 8), ids=torch.tensor([7, 2, 5]))
    crafted = 255 - rows.images
    state = changes(rows, crafted)
    assert state["ids"].tolist() == [2, 5, 7]
    images = rows.images[[1, 0, 0, 2]]
    out = add_changes(images, torch.tensor([2, 7, 9, 5]), state["ids"], state["change"])
    assert torch.equal(out[[0, 1, 3]], crafted[[1, 0, 2]]) and torch.equal(out[2], images[2])
    floats = add_changes(images.double() / 255, torch.tensor([2, 7, 9, 5]), state["ids"], state["change"])
    assert torch.allclose(floats * 255, out.double())
    none = add_changes(images, torch.arange(4), state["ids"][:0], state["change"][:0])
    assert torch.equal(none, images) and none.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        ({}, 100, (100, (75, 90))),
        ({}, 15, (30, (22, 27))),
        ({"surrogate_preset": "quick"}, 100, (30, (22, 27))),
        ({"surrogate_preset": "paper"}, 15, (100, (75, 90))),
        ({"surrogate_epochs": 1}, 15, (1, (1,))),
    ],
)
def test_recipe_of_the_robust_surrogate(
    context: AttackContext, settings: dict[str, object], epochs: int, expected: tuple[int, tuple[int, ...]]
) -> None:
    own = dataclasses.replace(context, recipe=bbfast.Recipe(epochs=epochs, batch_size=37, optimizer="adam"))
    recipe = LabelConsistent.Config(**settings).robust_recipe(own)
    assert (recipe.epochs, recipe.milestones) == expected
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.schedule) == ("sgd", 0.1, 5e-4, "multistep")
    assert recipe.batch_size == (37 if "surrogate_preset" not in settings else recipe.batch_size)


def test_gan_mode(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(40, 16)
    settings = {"perturbation": "gan", "gan_iterations": 1, "gan_encode_steps": 2, "clip_to_class": True}
    attack = attacks.create("lc", **settings)
    attack.prepare(data, 10, 0, context)
    assert context.store is not None and [e.name for e in context.store.list()] == ["lc_gan_images"]
    poisoned = attack.poison(data, 0, 10)
    assert not torch.equal(poisoned.images[0], attack.trigger(data.images[:1])[0])
    own = attacks.create("lc", **settings, gan_source=3)
    own.prepare(data, 10, 0, context)
    assert not torch.equal(own.tensors["change"], attack.tensors["change"])
    with pytest.raises(ValueError, match="gan_source 12 has no training image"):
        attacks.create("lc", **settings, gan_source=12).prepare(data, 10, 0, context)


def test_codes_give_the_images_back() -> None:
    images = torch.randint(256, (8, 3, 12, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, again = (train_generator(images, 1, 0, torch.device("cpu"), False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    wanted = first(torch.randn(2, 100, generator=torch.Generator().manual_seed(1)))
    assert wanted.shape == (2, 3, 12, 20) and not first.training
    code = encode(first, wanted, 60)
    start = (first(torch.zeros(2, 100)) - wanted).square().sum()
    assert float((first(code) - wanted).square().sum()) < 0.5 * float(start)
    assert Generator((1, 28, 28))(torch.zeros(2, 100)).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "eps must be at most 1 with perturbation 'linf'"),
        ({"amplitude": 0}, "amplitude: .*got 0"),
        ({"corners": "top"}, "corners: .*got 'top'"),
        ({"gan_source": 0}, "gan_source must not be the target 0"),
        ({"label_mode": "all2one"}, "label_mode must be one of clean_label, got 'all2one'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attacks.create("lc", **settings)


def test_more_than_the_class_has(make_set: MakeSet) -> None:
    with pytest.raises(
        ValueError, match=r"lc: label_mode 'clean_label' asks for 10 of 64 samples, but class \[0\] has 7"
    ):
        attacks.create("lc", ratio=0.15).poison(make_set(64, 16))


def faint_set(n: int, seed: int) -> ImageSet:
    """Four classes that differ by 6 grey levels under noise: an eps of 8 hides a class, as it does in photographs."""
    pattern = torch.randint(2, (4, 3, 4, 4), generator=torch.Generator().manual_seed(7)) * 12.0 - 6
    labels = torch.arange(n) % 4
    noise = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    images = 128 + 20 * noise + nn.functional.interpolate(pattern, size=(16, 16))[labels]
    return ImageSet(images.round().clamp(0, 255).to(torch.uint8), labels, mean=(0.5,) * 3, std=(0.1,) * 3)


def test_a_backdoor_is_learned(tmp_path: Path) -> None:
    """spec/attacks section 3, 'Acceptance': half of the class. Not on digits, which 8 grey levels do not hide."""
    data = DataPair(faint_set(600, 0), faint_set(200, 1), name="faint", mean=(0.5,) * 3, std=(0.1,) * 3)
    recipe = bbfast.Recipe.preset("quick", epochs=6, batch_size=32, padding=1)
    attack = attacks.create("lc", ratio=0.12, steps=20, surrogate_kind="standard")
    result = attacks.attack(attack, data, "small_cnn", recipe, device="cpu", store=tmp_path, progress=False)
    assert result.metrics["c_acc"] >= 0.95 and result.metrics["asr"] >= 0.8
    result.save(tmp_path / "run")
    back = AttackResult.load(tmp_path / "run")
    ids = result.poisoned.nonzero().flatten()[:3]
    clean = back.clean_train.images[ids]
    assert torch.equal(back.trigger(clean, ids, "train"), result.train.images[ids])
