"""What is written about every attack, its settings and its trigger's kind and strength, over the whole registry.

What it does to a set and in a run is in test_every_attack.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bbfast import attacks, models
from bbfast.attacks.base import registry
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError, UnknownNameError
from bbfast.models._registry import MODELS

NAMES = attacks.available()
MakeSet = Callable[..., ImageSet]

PSNR = {
    "adaptive_blend": (12, 30),
    "adaptive_patch": (12, 30),
    "badnets": (18, 45),
    "batt": (10, 30),
    "blended": (12, 30),
    "blind": (20, 35),
    "bpp": (25, 32),
    "ctrl": (30, 35),
    "fiba": (18, 36),
    "ftrojan": (38, 46),
    "input_aware": (5, 25),
    "lc": (8, 30),
    "lf": (15, 30),
    "lira": (15, 45),
    "narcissus": (14, 40),
    "poison_ink": (5, 20),
    "refool": (15, 32),
    "sig": (18.5, 20.5),
    "sleeper_agent": (10, 25),
    "ssba": (5, 20),
    "tact": (15, 30),
    "trojannn": (12, 30),
    "tuap": (22, 40),
    "wanet": (22, 50),
}
"""Decibels between smooth random images and their triggered versions; every attack states its band here."""

LEVELS = {"ftrojan": 3}
"""How far uint8 may lie from the rounded float result, where not one level: FTrojan's YCrCb are bytes of their own."""


NETWORKS = [name for name in NAMES if registry.get(name).card.needs or registry.get(name).learns_trigger]
"""Attacks that train networks of their own: large images take them long."""
SURROGATE = {"surrogate": "linear_of_tests", "surrogate_preset": "quick", "surrogate_epochs": 1}
CHEAP: dict[str, dict[str, Any]] = {
    "lc": {**SURROGATE, "steps": 2},
    "lf": {"trigger": "random_lowpass"},
    # Its own strength is below one grey level: an untrained trigger would change no byte.
    "lira": {"eps": 0.3},
    "narcissus": {**SURROGATE, "warmup_epochs": 0, "rounds": 2, "trigger_lr": 100.0},
    "poison_ink": {"encoder_epochs": 1, "injector_width": 4, "extractor_width": 4, "stages": ("rot",)},
    "sleeper_agent": {**SURROGATE, "iterations": 1, "sources": 8, "clip_to_class": True},
    "ssba": {"encoder_epochs": 1, "secret_bits": 8},
    "trojannn": {**SURROGATE, "iterations": 5},
    "tuap": {**SURROGATE, "images_ratio": 0.5},
}
"""Settings that spare these tests a long preparation; what it makes is tested with the attack."""


@pytest.fixture(autouse=True, scope="module")
def _linear_surrogate() -> Iterator[None]:
    """A surrogate that is trained at once and has no class out of reach of an adversarial step."""

    @models.register("linear_of_tests")
    def linear(spec: models.ModelSpec) -> nn.Module:
        size = spec.in_channels * spec.image_size[0] * spec.image_size[1]
        return nn.Sequential(nn.Flatten(), nn.Linear(size, spec.num_classes))

    yield
    MODELS._entries.pop("linear_of_tests")


def settings_for(name: str, mode: str) -> dict[str, Any]:
    return CHEAP.get(name, {}) | {
        "label_mode": mode,
        "source_classes": (1, 2) if mode == "one2one" else (),
        "ratio": 0.05,
    }


def usual_mode(name: str) -> dict[str, Any]:
    return settings_for(name, registry.get(name).card.label_modes[0])


def test_the_first_three_are_there() -> None:
    assert {"badnets", "blended", "wanet"} <= set(NAMES)
    assert type(attacks.create("badnet")) is registry.get("badnets")


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    cls = registry.get(name)
    card = cls.card
    assert cls.name == name and card.title and card.paper and card.summary.endswith(".")
    assert 2014 <= card.year <= 2030 and card.threat in ("poison-only", "training-controlled")
    assert card.label_modes and set(card.label_modes) <= set(LABEL_MODES)
    assert all(text.endswith(".") for text in card.deviations)
    assert cls.__doc__ and cls.Config.__doc__ and "Args:" in cls.Config.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_info_and_config_round_trip(name: str) -> None:
    facts = attacks.info(name)
    assert json.loads(json.dumps(facts))["name"] == name
    attack = attacks.create(name, **usual_mode(name))
    stored = json.loads(json.dumps(attack.config.model_dump(mode="json")))
    assert attacks.create(name, **stored).config == attack.config
    assert set(facts["defaults"]) == set(facts["schema"]["properties"]) == set(stored)


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 32) for name in NAMES]
    + [pytest.param(name, 224, marks=[pytest.mark.slow] if name in NETWORKS else []) for name in NAMES],
)
def test_trigger_keeps_type_shape_and_input(name: str, size: int, make_set: MakeSet) -> None:
    data = make_set(20, size=size)
    attack = attacks.create(name, **usual_mode(name))
    attack.prepare(data, 10)
    before = data.images.clone()
    out = attack.trigger(data.images)
    assert out.dtype == torch.uint8 and out.shape == data.images.shape
    assert torch.equal(data.images, before) and out.data_ptr() != data.images.data_ptr()
    assert not torch.equal(out, before)
    strided = data.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(attack.trigger(strided), out)
    assert attack.trigger(data.images[:0]).shape == (0, 3, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_float_trigger_is_the_uint8_one_before_rounding(name: str, make_set: MakeSet) -> None:
    data = make_set(16)
    attack = attacks.create(name, **usual_mode(name))
    attack.prepare(data, 10)
    exact = attack.trigger(data.images.float() / 255)
    assert exact.dtype == torch.float32
    levels = (exact * 255).round() - attack.trigger(data.images).float()
    assert float(levels.abs().max()) <= LEVELS.get(name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_trigger_strength(name: str, make_set: MakeSet) -> None:
    data = make_set(32)
    attack = attacks.create(name, **usual_mode(name))
    attack.prepare(data, 10)
    difference = attack.trigger(data.images).double() - data.images.double()
    psnr = 10 * torch.log10(255**2 / difference.pow(2).mean(dim=(1, 2, 3)))
    low, high = PSNR[name]
    assert low <= float(psnr.mean()) <= high


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in NAMES for m in registry.get(n).card.label_modes])
def test_backdoor_test_set(name: str, mode: str, make_set: MakeSet) -> None:
    data = make_set(60, size=16)
    attack = attacks.create(name, **settings_for(name, mode))
    attack.prepare(data, 10, seed=0)
    bad = attack.backdoor_test(data, seed=0, num_classes=10)
    expected = {
        "all2one": [i for i in range(60) if i % 10 != 0],
        "clean_label": [i for i in range(60) if i % 10 != 0],
        "all2all": list(range(60)),
        "one2one": [i for i in range(60) if i % 10 in (1, 2)],
    }[mode]
    assert bad.ids.tolist() == expected
    assert torch.equal(bad.original_labels, data.labels[bad.ids])
    wanted = (bad.original_labels + 1) % 10 if mode == "all2all" else torch.zeros_like(bad.labels)
    assert torch.equal(bad.labels, wanted)
    assert torch.equal(bad.images, attack.trigger(data.images[bad.ids], bad.ids, "test"))
    leak = attack.extra_tests(data, 0, 10).get("leak")
    assert (leak is not None) == (mode == "one2one")
    if leak is not None:
        assert set((leak.ids % 10).tolist()) == {3, 4, 5, 6, 7, 8, 9} and bool((leak.labels == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_state_brings_the_trigger_back(name: str, make_set: MakeSet) -> None:
    data = make_set(20)
    attack = attacks.create(name, **usual_mode(name))
    attack.prepare(data, 10, seed=5)
    other = attacks.create(name, **usual_mode(name))
    other.load_state(attack.state())
    for stage in ("train", "test"):
        assert torch.equal(other.trigger(data.images, stage=stage), attack.trigger(data.images, stage=stage))
        assert torch.equal(other.cover(data.images, data.ids, stage), attack.cover(data.images, data.ids, stage))


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: unknown setting 'ration'; did you mean ratio"):
        attacks.create(name, ration=0.1)
    for ratio in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"{name}: ratio: .*got {ratio}"):
            attacks.create(name, ratio=ratio)
    with pytest.raises(ConfigError, match="target"):
        attacks.create(name, target=-1)
    with pytest.raises(ConfigError, match="label_mode"):
        attacks.create(name, label_mode="some2some")
    with pytest.raises(ConfigError, match="'one2one' needs source_classes"):
        attacks.create(name, label_mode="one2one", source_classes=())
    with pytest.raises(ConfigError, match="must not hold the target 1"):
        attacks.create(name, label_mode="one2one", source_classes=(1,), target=1)
    for mode in set(LABEL_MODES) - set(registry.get(name).card.label_modes):
        with pytest.raises(ConfigError, match=f"label_mode must be one of .*, got {mode!r}"):
            attacks.create(name, **settings_for(name, mode))


@pytest.mark.parametrize("name", NAMES)
def test_bad_trigger_arguments(name: str, make_set: MakeSet) -> None:
    data = make_set(8, size=16)
    attack = attacks.create(name, **CHEAP.get(name, {}), ratio=0.2)
    attack.prepare(data, 10)
    with pytest.raises(TypeError, match="uint8 or float"):
        attack.trigger(data.images.to(torch.int32))
    with pytest.raises(ValueError, match=r"four dimensions"):
        attack.trigger(data.images[0])
    with pytest.raises(ValueError, match=r"made for images of \(3, 16, 16\), got \(3, 8, 8\)"):
        attack.trigger(data.images[..., ::2, ::2])
    with pytest.raises(ValueError, match="stage must be"):
        attack.trigger(data.images, stage="validation")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="index must be an int64"):
        attack.trigger(data.images, index=torch.zeros(8))
    with pytest.raises(ValueError, match="one entry for each of 8 images"):
        attack.trigger(data.images, index=torch.arange(7))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_cpu(name: str, make_set: MakeSet) -> None:
    data = make_set(64)
    attack = attacks.create(name, **usual_mode(name))
    attack.prepare(data, 10)
    for put in (attack.apply, attack.cover):
        here, there = put(data.images, data.ids, "train"), put(data.images.cuda(), data.ids.cuda(), "train").cpu()
        difference = (here.int() - there.int()).abs()
        assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) <= 0.001


def test_unknown_attack_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown attack 'badnetz'; did you mean .*'badnets'"):
        attacks.create("badnetz")
    with pytest.raises(UnknownNameError, match="wanet"):
        attacks.info("wannet")


def test_prepare_works_once_per_seed_and_size(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = registry.get("wanet")
    fits: list[tuple[int, int]] = []
    fit = cls.fit

    def counted(self: Any, data: ImageSet, num_classes: int, seed: int, context: Any) -> dict[str, Tensor]:
        fits.append((seed, data.image_size[1]))
        return fit(self, data, num_classes, seed, context)

    monkeypatch.setattr(cls, "fit", counted)
    attack = cls()
    attack.prepare(make_set(10), 10, seed=0)
    attack.poison(make_set(100), seed=0)
    attack.backdoor_test(make_set(20))
    attack.prepare(make_set(10), 10, seed=1)
    attack.prepare(make_set(10, size=16), 10, seed=1)
    assert fits == [(0, 32), (1, 32), (1, 16)]


def test_what_is_no_image_set_or_an_empty_one_is_named(make_set: MakeSet) -> None:
    attack, data = attacks.create("badnets"), make_set(20)
    with pytest.raises(TypeError, match="train must be an ImageSet, got Tensor"):
        attack.poison(data.images)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="test must be an ImageSet, got Tensor"):
        attack.backdoor_test(data.images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train must hold at least one image, got an empty set"):
        attack.poison(data[:0])
