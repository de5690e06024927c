"""TUAP: the search within its bound, clipping and wrapping, shares of the class, the extra perturbation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks.prerequisites import default_context
from bbfast.attacks.surrogate import clean_surrogate
from bbfast.attacks.tuap import TUAP, project, targeted_rate
from bbfast.data.imageset import ImageSet
from bbfast.errors import BBFastError, ConfigError
from bbfast.store import Store

MakeSet = Callable[..., ImageSet]
SMALL = {"images_ratio": 0.1, "clip_to_class": True, "ratio": 0.2}


def linear_context(folder: Path, data: ImageSet, favourite: int | None = None) -> AttackContext:
    """A surrogate that is a fixed linear map; with a favourite it always predicts that class."""

    def linear(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(data.images[0].numel(), 10))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator) * 0.1)
            model[1].bias.zero_()
            if favourite is not None:
                model[1].bias[favourite] = 1e4
        return model

    plain = default_context(data, 10, 0)
    recipe = bbfast.Recipe(epochs=0)
    return dataclasses.replace(plain, fresh_model=linear, recipe=recipe, store=Store(folder), progress=False)


@pytest.fixture
def data(make_set: MakeSet) -> ImageSet:
    return make_set(100, 16)


@pytest.fixture
def context(tmp_path: Path, data: ImageSet) -> AttackContext:
    return linear_context(tmp_path, data)


def test_the_pattern_keeps_its_bound_and_moves_the_surrogate(context: AttackContext, data: ImageSet) -> None:
    """spec/attacks section 23, 'Acceptance': |v| <= eps, targeted rate above 60 %."""
    surrogate = clean_surrogate(context, data, 10, TUAP.Config(), 0)
    others = data.images[data.labels != 0].float() / 255
    for settings, bound in (({}, 10 / 255), ({"eps": 0.02}, 0.02), ({"norm": "l2", "eps": 0.8}, None)):
        attack = attacks.create("tuap", **SMALL, **settings)
        attack.prepare(data, 10, 0, context)
        pattern = attack.tensors["pattern"]
        if bound is None:
            assert float(pattern.norm()) <= 0.8 + 1e-5
        else:
            assert float(pattern.abs().max()) <= bound + 1e-7
        difference = attack.trigger(data.images).double() - data.images.double()
        assert float(difference.abs().max()) <= round(255 * float(pattern.abs().max()))
        if settings == {}:
            rates = [targeted_rate(surrogate, others, factor * pattern, 0) for factor in (0, 1)]
            assert rates[1] > max(0.6, rates[0] + 0.3)


def test_the_bound_follows_the_channels() -> None:
    assert TUAP.Config().bound(3) == 10 / 255 and TUAP.Config().bound(1) == 76 / 255
    assert TUAP.Config(eps=0.2).bound(1) == 0.2


def test_projection() -> None:
    x = torch.tensor([3.0, -4.0]).view(1, 1, 2)
    assert project(x, "linf", 1).flatten().tolist() == [1, -1]
    assert torch.allclose(project(x, "l2", 1).flatten(), torch.tensor([0.6, -0.8]))
    assert torch.equal(project(x, "l2", 6), x)


def test_the_pattern_is_kept_for_all_ratios(context: AttackContext, data: ImageSet) -> None:
    for more in ({}, {"ratio": 0.05}, {"label_mode": "all2one"}, {"adv_first": True, "adv_steps": 2}):
        attacks.create("tuap", **{**SMALL, **more}).prepare(data, 10, 0, context)
    assert context.store is not None and len(context.store.list("prerequisite", "tuap_pattern")) == 1
    assert len(context.store.list("prerequisite", "tuap_images")) == 1
    attacks.create("tuap", **SMALL, target=1).prepare(data, 10, 0, context)
    assert len(context.store.list("prerequisite", "tuap_pattern")) == 2


def test_reference_wraps_and_takes_the_first_samples(context: AttackContext, data: ImageSet) -> None:
    paper, reference = (attacks.create("tuap", **{**SMALL, "ratio": 0.04}, compat=c) for c in ("paper", "reference"))
    for attack in (paper, reference):
        attack.prepare(data, 10, 0, context)
        attack.tensors["pattern"] = torch.full((3, 16, 16), 10.6 / 255)
    images = torch.tensor([0, 100, 250], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    assert paper.trigger(images)[:, 0, 0, 0].tolist() == [11, 111, 255]
    assert reference.trigger(images)[:, 0, 0, 0].tolist() == [10, 110, 4]
    for attack in (paper, reference):
        attack.tensors["pattern"] = torch.full((3, 16, 16), -10.6 / 255)
    assert paper.trigger(images)[:, 0, 0, 0].tolist() == [0, 89, 239]
    assert reference.trigger(images)[:, 0, 0, 0].tolist() == [246, 89, 239]
    chosen = [a.poison(data, 0, 10).poisoned.nonzero().flatten().tolist() for a in (paper, reference)]
    assert chosen[1] == [0, 10, 20, 30] and len(chosen[0]) == 4 and chosen[0] != chosen[1]


def test_the_share_of_the_class(context: AttackContext, data: ImageSet) -> None:
    attack = attacks.create("tuap", images_ratio=0.1, ratio_of_class=0.25)
    attack.prepare(data, 10, 0, context)
    poisoned = attack.poison(data, 0, 10)
    assert int(poisoned.poisoned.sum()) == 2 and bool((data.labels[poisoned.poisoned] == 0).all())
    assert torch.equal(poisoned.labels, data.labels)
    with pytest.raises(ValueError, match=r"ratio_of_class 0\.01 of 10 samples poisons none"):
        attacks.create("tuap", ratio_of_class=0.01).poison(data)


def test_the_extra_perturbation_is_for_training_only(context: AttackContext, data: ImageSet) -> None:
    plain, both = (attacks.create("tuap", **SMALL, adv_first=first, adv_steps=12) for first in (False, True))
    for attack in (plain, both):
        attack.prepare(data, 10, 0, context)
    rows = (data.labels == 0).nonzero().flatten()
    assert torch.equal(both.trigger(data.images), plain.trigger(data.images))
    seen = [a.trigger(data.images[rows], rows, "train").double() for a in (plain, both)]
    assert 0 < float((seen[1] - seen[0]).abs().max()) <= 16
    surrogate = clean_surrogate(context, data, 10, TUAP.Config(), 0)
    changed = data.images[rows].double() + both.tensors["change"]
    assert float(changed.min()) >= 0 and float(changed.max()) <= 255
    losses = [
        float(nn.functional.cross_entropy(surrogate(x.float() / 255), data.labels[rows]))
        for x in (data.images[rows], changed)
    ]
    assert losses[1] > losses[0] + 0.1


def test_a_surrogate_that_sees_the_target_everywhere_is_named(tmp_path: Path, data: ImageSet) -> None:
    with pytest.raises(
        BBFastError, match=r"tuap: DeepFool moved none of 11 images to class 0.*is the surrogate trained"
    ):
        attacks.create("tuap", **SMALL, passes=1).prepare(data, 10, 0, linear_context(tmp_path, data, favourite=0))


def test_gradients_reach_the_image(context: AttackContext, data: ImageSet) -> None:
    attack = attacks.create("tuap", **SMALL)
    attack.prepare(data, 10, 0, context)
    x = (torch.rand(2, 3, 16, 16) * 0.5 + 0.25).requires_grad_()
    attack.trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 10}, "eps must be at most 1 with norm 'linf'"),
        ({"norm": "l2"}, "norm 'l2' needs eps"),
        ({"adv_first": True, "label_mode": "all2one"}, "adv_first is for label_mode 'clean_label', got 'all2one'"),
        ({"ratio_of_class": 0}, "ratio_of_class: .*got 0"),
        ({"delta": 1}, "delta: .*got 1"),
        ({"label_mode": "all2all"}, "label_mode must be one of clean_label, all2one, one2one, got 'all2all'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attacks.create("tuap", **settings)


@pytest.mark.slow
def test_works_on_digits(tmp_path: Path) -> None:
    """At the bound for digits (76/255): 10/255 cannot move a network on black and white images."""
    data = bbfast.datasets.load("digits")
    recipe = bbfast.Recipe.preset("quick", dataset="digits", model="small_cnn", epochs=8)
    settings = {"eps": 76 / 255, "surrogate_epochs": 4, "passes": 2}
    attack = attacks.create("tuap", clip_to_class=True, **settings)
    result = attacks.attack(attack, data, "small_cnn", recipe, device="cpu", store=tmp_path, progress=False)
    assert result.metrics["asr"] >= 0.6
    result.save(tmp_path / "run")
    back = AttackResult.load(tmp_path / "run")
    assert torch.equal(back.trigger(data.test.images[:3]), result.trigger(data.test.images[:3]))
