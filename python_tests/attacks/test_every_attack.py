"""Every attack, whatever it needs: its data, its trigger, its refusals and a run. The tests loop over the registry.

What an attack needs (a surrogate, an encoder) is made for real, but tiny: ``TINY`` holds the settings by name. A new
attack whose preparation is long adds its own there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import Recipe, attacks
from bbfast.attacks import Attack, AttackContext, AttackResult, run
from bbfast.attacks.base import Stage, registry
from bbfast.attacks.poisoning import LabelRule
from bbfast.attacks.prerequisites import open_store, seeded_model
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError

MakeSet = Callable[..., ImageSet]
Images = Callable[..., ImageSet]
Ready = Callable[..., tuple[Attack, ImageSet]]

NAMES = attacks.available()
CASES = [(name, mode) for name in NAMES for mode in registry.get(name).card.label_modes]
BOUND = [(name, mode) for name, mode in CASES if mode in ("clean_label", "one2one")]
POISON_ONLY = [name for name in NAMES if registry.get(name).card.threat == "poison-only"]
NETWORKS = [name for name in NAMES if registry.get(name).card.needs or registry.get(name).learns_trigger]
"""Attacks that train networks of their own."""
UNTRAINED = [name for name in NAMES if registry.get(name).learns_trigger]
"""Before training their triggers may change less than half a level (LIRA's does); float images show that they do."""
RUNS = [
    pytest.param(name, mode, marks=[pytest.mark.slow] if name in NETWORKS and mode != first else [])
    for name in NAMES
    for first in registry.get(name).card.label_modes[:1]
    for mode in registry.get(name).card.label_modes
]
TINY: dict[str, Any] = {
    "surrogate": "small_cnn",
    "surrogate_preset": "quick",
    "surrogate_epochs": 8,
    "encoder_preset": "quick",
    "encoder_epochs": 1,
    "secret_steps": 1,
    "ramp_steps": 1,
    "injector_width": 2,
    "extractor_width": 4,
    "candidates": 8,
    "craft_batch": 8,
    "deepfool_steps": 50,
    "images": 16,
    "iterations": 2,
    "passes": 1,
    "pool": 4,
    "retrain_epochs": 1,
    "retrain_every": 1,
    "rounds": 20,
    "sources": 8,
    "warmup_epochs": 1,
    "warmup_lr": 0.001,
    "trigger_lr": 100.0,
}
"""Settings that make a preparation short, by name; each attack takes those that it has."""
OWN: dict[str, dict[str, Any]] = {"lira": {"eps": 0.3}}
"""LIRA's own strength is below one grey level: an untrained trigger would change no byte."""
HIDDEN = {"sleeper_agent"}
"""Attacks that are tested on their source classes, but poison images of the target's, each by a change of its own."""
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.02, padding=1, deterministic=True, precision="fp32", eval_every=0)


def stages(name: str) -> tuple[Stage, ...]:
    """Stages in which the trigger can be put on any image."""
    return ("test",) if name in HIDDEN else ("train", "test")


def poisons(name: str, rule: LabelRule) -> LabelRule:
    """Who is poisoned."""
    return dataclasses.replace(rule, mode="clean_label", source_classes=()) if name in HIDDEN else rule


def settings(name: str, mode: str | None = None, **changes: Any) -> dict[str, Any]:
    """Tiny settings of an attack; ``mode`` None is its first."""
    cls = registry.get(name)
    mode = cls.card.label_modes[0] if mode is None else mode
    own = {key: value for key, value in TINY.items() if key in cls.Config.model_fields}
    return {
        **own,
        "label_mode": mode,
        "source_classes": (1, 2) if mode == "one2one" else (),
        "ratio": 0.05,
        "count": None,
        **OWN.get(name, {}),
        **changes,
    }


def make(name: str, mode: str | None = None, **changes: Any) -> Attack:
    return attacks.create(name, **settings(name, mode, **changes))


def prepare(attack: Attack, data: ImageSet, seed: int = 1) -> Attack:
    """Make the trigger with what a tiny victim's run would give it, prerequisites from the test session's store."""
    attack.prepare(data, 10, seed, context_for(data, seed))
    return attack


def context_for(data: ImageSet, seed: int) -> AttackContext:
    def fresh_model() -> nn.Module:
        return seeded_model("small_cnn", 10, data.image_size, seed)

    return AttackContext(torch.device("cpu"), fresh_model, RECIPE, store=open_store(None), progress=False)


@pytest.fixture(scope="module")
def images(make_set: MakeSet) -> Callable[..., ImageSet]:
    """100 images; always the same ones, so that the tests find each other's prerequisites in the session's store."""

    def get(size: int = 32, channels: int = 3, seed: int = 0) -> ImageSet:
        plain = make_set(100, size=size, channels=channels, seed=seed)
        return dataclasses.replace(plain, mean=(0.5,) * channels, std=(0.25,) * channels)

    return get


@pytest.fixture(scope="module")
def ready(images: Images) -> Ready:
    """A prepared attack and its images, made once for each size; the trigger may be read, nothing else be done."""

    @functools.cache
    def get(name: str, size: int = 32) -> tuple[Attack, ImageSet]:
        data = images(size)
        return prepare(make(name), data), data

    return get


def agree(name: str, a: Tensor, b: Tensor) -> bool:
    """Equal; float results, and those of networks, up to what another batch does to the order of sums."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return torch.allclose(a, b, rtol=0, atol=1e-3 if name in NETWORKS else 1e-5)
    apart = (a.int() - b.int()).abs()
    return torch.equal(a, b) or (
        name in NETWORKS and int(apart.max()) <= 1 and float((apart > 0).double().mean()) < 1e-3
    )


# The trigger ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 32) for name in NAMES]
    + [pytest.param(name, 64, marks=[pytest.mark.slow] if name in NETWORKS else []) for name in NAMES],
)
def test_trigger_belongs_to_the_sample(name: str, size: int, ready: Ready) -> None:
    """Whatever else is in the batch, however it lies in memory; nothing is written to the input."""
    attack, data = ready(name, size)
    images, index = data.images[:12], data.ids[:12] + 5
    before = images.clone()
    for stage in stages(name):
        whole = attack.trigger(images, index, stage)
        assert whole.dtype == torch.uint8 and whole.shape == (12, 3, size, size)
        assert name in UNTRAINED or not torch.equal(whole, images)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        for rows in (order, order[:1], order[:5]):
            assert agree(name, attack.trigger(images[rows], index[rows], stage), whole[rows])
            cover = attack.cover(images, index, stage)
            assert agree(name, attack.cover(images[rows], index[rows], stage), cover[rows])
        assert attack.trigger(images[:0], index[:0], stage).shape == (0, 3, size, size)
        wide = torch.zeros(12, 3, size, 2 * size, dtype=torch.uint8)
        wide[..., ::2] = images
        for strided in (images.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
            assert agree(name, attack.trigger(strided, index, stage), whole)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_images_stay_float(name: str, dtype: torch.dtype, ready: Ready) -> None:
    attack, data = ready(name)
    x = data.images[:6].to(dtype) / 255
    for stage in stages(name):
        out = attack.trigger(x, data.ids[:6], stage)
        assert out.dtype == dtype and out.shape == x.shape and bool(out.isfinite().all())
        assert float(out.min()) >= -1e-4 and float(out.max()) <= 1 + 1e-4
        assert not torch.equal(out, x)
    order = torch.tensor([4, 0, 5])
    assert agree(name, attack.trigger(x[order], data.ids[order]), attack.trigger(x, data.ids[:6])[order])


@pytest.mark.parametrize("name", NAMES)
def test_preparing_and_poisoning_leave_global_random_numbers_alone(name: str, images: Images) -> None:
    data = images()
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr]
    prepare(make(name), data).poison(data, 1, 10)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


@pytest.mark.parametrize("name", [name for name in POISON_ONLY if not registry.get(name).card.needs])
def test_poisoning_is_cheap(name: str, make_set: MakeSet) -> None:
    """50,000 CIFAR images, 5,000 of them poisoned, shall take seconds; 1,000 poisoned ones get 3 s of one core."""
    data = make_set(5000, size=32)
    modes = registry.get(name).card.label_modes
    attack = make(name, "all2one" if "all2one" in modes else None, ratio=None, count=1000, clip_to_class=True)
    attack.prepare(data, 10)
    started = time.process_time()
    assert int(attack.poison(data, 0, 10).poisoned.sum()) >= 500
    assert time.process_time() - started < 3


# The poisoned set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_poisoned_set(name: str, mode: str, images: Images) -> None:
    """Counts, roles and labels, on a set whose sample numbers are not positions, with target 3 and shift 2."""
    plain = images()
    data = dataclasses.replace(plain, ids=torch.arange(100).flip(0) * 7 + 3)
    attack = prepare(make(name, mode, target=3, shift=2, ratio=0.08), data)
    poison, cover = attack.select(data.labels, attack.rule(data.labels, 10), 1)
    chosen = torch.cat([poison, cover])
    assert len(poison) == 8 and chosen.unique().numel() == len(chosen)
    out = attack.poison(data, seed=1, num_classes=10)
    expected = torch.zeros(100, dtype=torch.int8)
    expected[poison], expected[cover] = 1, 2
    assert (
        torch.equal(out.role, expected)
        and torch.equal(out.poisoned, expected == 1)
        and out.ratio == pytest.approx(0.08)
    )
    rule = LabelRule(mode, 10, 3, 2, (1, 2) if mode == "one2one" else ())  # type: ignore[arg-type]
    assert torch.equal(out.labels[poison], rule.given(data.labels[poison]))
    if mode == "all2all":
        assert torch.equal(out.labels[poison], (data.labels[poison] + 2) % 10)
    assert bool(poisons(name, rule).trainable(data.labels)[poison].all())
    rest = torch.ones(100, dtype=torch.bool)
    rest[poison] = False
    assert torch.equal(out.labels[rest], data.labels[rest])
    assert torch.equal(out.original_labels, data.labels)
    assert out.ids is not None and torch.equal(out.ids, data.ids)
    untouched = expected == 0
    assert torch.equal(out.images[untouched], data.images[untouched])
    changed = (out.images != data.images).flatten(1).any(1)
    assert name in UNTRAINED or float(changed[poison].double().mean()) > 0.5
    # Any part can be made again from the sample numbers alone.
    some = poison[2:5]
    assert agree(name, attack.trigger(data.images[some], data.ids[some], "train"), out.images[some])
    learner = out.as_imageset()
    assert torch.equal(learner.labels, out.labels) and torch.equal(learner.ids, data.ids)
    assert torch.equal(data.images, plain.images)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_poisoned_and_cover_samples_are_disjoint(name: str, mode: str, make_set: MakeSet) -> None:
    """Over 20 seeds: a few samples drawn twice among 100 would often be missed by one."""
    labels, attack = make_set(100).labels, make(name, mode, ratio=0.1)
    for seed in range(20):
        poison, cover = attack.select(labels, attack.rule(labels, 10), seed)
        chosen = torch.cat([poison, cover])
        assert len(poison) == 10 and chosen.unique().numel() == len(chosen)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_bits_and_another_seed_others(name: str, images: Images) -> None:
    data = images()
    first, again, other = (prepare(make(name), data, seed) for seed in (1, 1, 2))
    a, b, c = (x.poison(data, seed, 10) for x, seed in ((first, 1), (again, 1), (other, 2)))
    assert torch.equal(a.images, b.images) and torch.equal(a.role, b.role) and torch.equal(a.labels, b.labels)
    ours, theirs = first.state(), again.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(a.role, c.role)
    # The same object, used for something else in between.
    assert torch.equal(prepare(other, data, 1).poison(data, 1, 10).images, a.images)


@pytest.mark.parametrize("name", [name for name in NAMES if not registry.get(name).selects_after_fit])
def test_index_generators(name: str, make_set: MakeSet) -> None:
    data = make_set(100)
    picked = [
        make(name, index_rng=rng).select(data.labels, make(name).rule(data.labels, 10), 5)[0]
        for rng in ("numpy_legacy", "torch", "torch")
    ]
    assert torch.equal(picked[1], picked[2]) and not torch.equal(picked[0], picked[1])
    assert len(picked[0]) == len(picked[1]) == 5


# Refusals, all before any work ----------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when an attack begins to work."""

    def forbidden(*_: Any, **__: Any) -> Any:
        pytest.fail("work began before the settings were checked")

    for name in NAMES:
        monkeypatch.setattr(registry.get(name), "fit", forbidden)
    monkeypatch.setattr(AttackContext, "obtain", forbidden)
    monkeypatch.setattr(run, "train", forbidden)


def attempt(attack: Attack, data: ImageSet) -> None:
    attacks.attack(attack, DataPair(data, data, name="smooth"), "small_cnn", RECIPE, device="cpu", progress=False)


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.usefixtures("no_work")
def test_classes_that_there_are_not(name: str, mode: str, make_set: MakeSet) -> None:
    data = make_set(100)
    if mode == "all2all":
        with pytest.raises(ValueError, match=rf"{name}: shift must not be a multiple of the 10 classes, got 20"):
            attempt(make(name, mode, shift=20), data)
    else:
        with pytest.raises(ValueError, match=rf"{name}: target must be a class in 0\.\.9, got 10"):
            attempt(make(name, mode, target=10), data)
    if mode == "one2one":
        with pytest.raises(ValueError, match=rf"{name}: source_classes must name classes in 0\.\.9, got \[2, 10\]"):
            attempt(make(name, mode, source_classes=(2, 10)), data)
        with pytest.raises(ConfigError, match=rf"{name}: .*must not hold the target 2, got \[1, 2\]"):
            make(name, mode, target=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_work")
def test_ratios_that_give_no_sample(name: str, make_set: MakeSet) -> None:
    data = make_set(100)
    with pytest.raises(ValueError, match=f"{name}: ratio 0.001 of 100 samples poisons none; use at least 0.01"):
        make(name, ratio=0.001).poison(data, 0, 10)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got 5"):
        make(name, ratio=0.2).poison(data, 0, 5)
    for bad in (0, 1.5):
        with pytest.raises(ConfigError, match=f"{name}: ratio: .*got {bad}"):
            make(name, ratio=bad)
    with pytest.raises(ConfigError, match=f"{name}: "):
        make(name, ratio=None, count=None)
    with pytest.raises(ConfigError, match=f"{name}: unknown setting 'tarjet'; did you mean target"):
        make(name, tarjet=1)


@pytest.mark.parametrize(("name", "mode"), BOUND)
@pytest.mark.usefixtures("no_work")
def test_ratios_that_the_classes_cannot_supply(name: str, mode: str, make_set: MakeSet) -> None:
    data = make_set(100)
    asked = (
        rf"^{name}.* ask(s|ed) for 30 of 100 samples, but class .* has [12]0; use a ratio of at most 0\.[12] or clip"
    )
    with pytest.raises(ValueError, match=asked):
        attempt(make(name, mode, ratio=0.3), data)
    clipped = make(name, mode, ratio=0.3, clip_to_class=True)
    assert len(clipped.select(data.labels, clipped.rule(data.labels, 10), 0)[0]) in (10, 20)


@pytest.mark.parametrize("name", NAMES)
def test_greyscale_works_or_is_refused_before_any_work(
    name: str, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(channels=1)
    asked: list[str] = []
    obtain = AttackContext.obtain

    def counted(self: AttackContext, kind: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(kind)
        return obtain(self, kind, *args, **kwargs)

    monkeypatch.setattr(AttackContext, "obtain", counted)
    try:
        attack = prepare(make(name), data)
    except ValueError as error:
        assert name in str(error) and any(word in str(error) for word in ("channel", "colour", "greyscale"))
        assert not asked
        return
    out = attack.poison(data, 1, 10)
    assert out.images.shape == data.images.shape
    assert name in UNTRAINED or not torch.equal(out.images[out.poisoned], data.images[out.poisoned])


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(images: Images) -> DataPair:
    return DataPair(images(), images(seed=1)[:40], name="smooth")


def recipe(name: str) -> Recipe:
    """One epoch; two for attacks that control the training, which may have stages."""
    return RECIPE if registry.get(name).card.threat == "poison-only" else RECIPE.replace(epochs=2)


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_run(name: str, mode: str, pair: DataPair, tmp_path: Path) -> None:
    """Figures are finite, roles and labels right, and the loaded result puts on the same trigger."""
    result = attacks.attack(make(name, mode), pair, "small_cnn", recipe(name), 1, "cpu", progress=False)
    m = result.metrics
    assert {"c_acc", "asr", "r_acc", "seconds", "poison_ratio"} <= m.keys() and all(map(math.isfinite, m.values()))
    assert all(0 <= m[key] <= 1 for key in m if not key.startswith("seconds"))
    assert m["asr"] + m["r_acc"] <= 1 + 1e-9 and ("leak" in m) == (mode == "one2one")
    assert result.history and all(math.isfinite(row["loss"]) for row in result.history)
    rule = LabelRule(mode, 10, 0, 1, (1, 2) if mode == "one2one" else ())  # type: ignore[arg-type]
    bad = result.poisoned
    assert int(bad.sum()) == 5 and torch.equal(bad, result.role == 1) and m["poison_ratio"] == pytest.approx(0.05)
    assert torch.equal(result.train.labels[bad], rule.given(pair.train.labels[bad]))
    assert torch.equal(result.train.labels[~bad], pair.train.labels[~bad])
    assert torch.equal(result.clean_train.images, pair.train.images)
    assert torch.equal(result.test.images, pair.test.images) and torch.equal(result.test.labels, pair.test.labels)
    kept = rule.testable(pair.test.labels)
    assert torch.equal(result.backdoor_test.ids, pair.test.ids[kept])
    assert torch.equal(result.backdoor_test.labels, rule.wanted(pair.test.labels[kept]))
    back = AttackResult.load(result.save(tmp_path / "run"))
    for stage in ("train", "test"):
        ours, theirs = (r.trigger(pair.test.images, pair.test.ids, stage) for r in (result, back))  # type: ignore[arg-type]
        assert agree(name, ours, theirs)
    assert agree(name, back.trigger(pair.test.images, pair.test.ids)[kept], back.backdoor_test.images)
    assert back.attack().config == make(name, mode).config


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_gives_the_same_bits_and_makes_nothing_twice(
    name: str, pair: DataPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, made = [], 0
    obtain = AttackContext.obtain

    def counted(self: AttackContext, kind: str, config: Any, maker: Any, **kwargs: Any) -> dict[str, Tensor]:
        def counting(work: Path) -> Any:
            nonlocal made
            made += 1
            return maker(work)

        return obtain(self, kind, config, counting, **kwargs)

    monkeypatch.setattr(AttackContext, "obtain", counted)
    for _ in range(2):
        before = made
        results.append(attacks.attack(make(name), pair, "small_cnn", recipe(name), 1, "cpu", progress=False))
    assert made == before
    first, again = results
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.role, again.role)
    assert torch.equal(first.backdoor_test.images, again.backdoor_test.images)
