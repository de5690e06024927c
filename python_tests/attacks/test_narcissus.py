"""Narcissus: bounds, what the pattern does to the surrogate, the public set, and a backdoor on digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks.narcissus import Narcissus, inward_pattern
from bbfast.attacks.prerequisites import default_context
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError
from bbfast.models import build
from bbfast.store import Store

MakeSet = Callable[..., ImageSet]
TINY: dict[str, Any] = {
    "surrogate": "small_cnn",
    "surrogate_preset": "quick",
    "surrogate_epochs": 1,
    "warmup_epochs": 0,
    "rounds": 3,
    "trigger_lr": 100.0,
    "ratio": 0.05,
}
RECIPE = bbfast.Recipe(batch_size=350, padding=2)


@pytest.fixture
def context(tmp_path: Path, make_set: MakeSet) -> AttackContext:
    return dataclasses.replace(default_context(make_set(100, 16), 10), store=Store(tmp_path), progress=False)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("small_cnn", 4, 16)


def target_set(make_set: MakeSet) -> ImageSet:
    data = make_set(24, 16)
    return dataclasses.replace(data, labels=torch.full((24,), 3), mean=(0.5,) * 3, std=(0.5,) * 3)


def pattern(make_set: MakeSet, work: Path | None = None, **settings: Any) -> dict[str, Tensor]:
    config = Narcissus.Config(**{"warmup_epochs": 0, "rounds": 30, "trigger_lr": 0.05, **settings})
    return inward_pattern(network(), target_set(make_set), config, RECIPE, 5, torch.device("cpu"), work)


def test_acceptance_bounds(make_set: MakeSet) -> None:
    """spec/attacks section 22: at most 16 levels in training, 48 at test time."""
    attack, data = attacks.create("narcissus", **TINY), make_set(100, 16)
    poisoned = attack.poison(data, num_classes=10)
    n = attack.tensors["pattern"]
    assert float(n.abs().max()) == pytest.approx(16) and n.shape == (3, 16, 16)
    rows = poisoned.poisoned
    assert bool((data.labels[rows] == 0).all()) and torch.equal(poisoned.labels, data.labels)
    expected = (data.images[rows].double() + n.double()).round().clamp(0, 255)
    assert torch.equal(poisoned.images[rows].double(), expected)
    tested = attack.backdoor_test(data, num_classes=10)
    exact = (data.images[tested.ids].double() + 3 * n.double()).round().clamp(0, 255)
    assert torch.equal(tested.images.double(), exact)
    assert 40 < int((tested.images.int() - data.images[tested.ids].int()).abs().max()) <= 48


def test_magnification_and_epsilon_are_settings(make_set: MakeSet) -> None:
    attack, data = attacks.create("narcissus", **TINY, epsilon=4, magnification=2), make_set(100, 16)
    attack.prepare(data, 10)
    assert float(attack.tensors["pattern"].abs().max()) == pytest.approx(4)
    grey = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert int((attack.trigger(grey).int() - 100).abs().max()) == 8
    assert int((attack.trigger(grey, stage="train").int() - 100).abs().max()) == 4
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    attack.trigger(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_the_pattern_lowers_the_targets_loss(make_set: MakeSet, batch_statistics: bool) -> None:
    found = pattern(make_set, batch_statistics=batch_statistics, trigger_lr=1.0, epsilon=60)
    loss = found["loss"]
    assert len(loss) == 30 and float(loss[-5:].mean()) < float(loss[0]) - 0.02
    net, data = network().train(batch_statistics), target_set(make_set)
    with torch.no_grad():
        x = (data.images.float() / 255 - 0.5) / 0.5
        moved = (x + found["pattern"] / 127.5).clamp(-1, 1)
        assert F.cross_entropy(net(moved), data.labels) < F.cross_entropy(net(x), data.labels)


def test_batch_statistics_are_used_or_not(make_set: MakeSet) -> None:
    """The one difference between the authors' code and a network frozen whole."""
    seen: list[bool] = []
    net = network()
    net.register_forward_hook(lambda module, args, out: seen.append(module.training))
    for choice in (True, False):
        seen.clear()
        config = Narcissus.Config(warmup_epochs=2, rounds=2, batch_statistics=choice)
        inward_pattern(net, target_set(make_set), config, RECIPE, 5, torch.device("cpu"))
        assert seen == [True, True, choice, choice]
        assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_warm_up_changes_the_network_on_the_targets_images_alone(make_set: MakeSet) -> None:
    cold, warm = network(), network()
    for net, epochs in ((cold, 0), (warm, 3)):
        config = Narcissus.Config(warmup_epochs=epochs, rounds=1, warmup_lr=0.01)
        inward_pattern(net, target_set(make_set), config, RECIPE, 5, torch.device("cpu"))
    assert torch.equal(cold.conv1.weight, network().conv1.weight)
    assert not torch.equal(warm.conv1.weight, cold.conv1.weight)
    other = make_set(40, 16, seed=9).images.float() / 127.5 - 1
    with torch.no_grad():
        assert warm.train()(other).softmax(1)[:, 3].mean() > cold.train()(other).softmax(1)[:, 3].mean()


def test_it_stops_when_no_gradient_is_left(make_set: MakeSet) -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 0, 0, 500]) * self.scale + x.flatten(1)[:, :4] * 1e-3

    config = Narcissus.Config(warmup_epochs=0, rounds=50)
    found = inward_pattern(Sure(), target_set(make_set), config, RECIPE, 5, torch.device("cpu"))
    assert len(found["loss"]) == 1 and not found["pattern"].any()


def test_an_interrupted_pattern_goes_on_to_the_same_bits(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pattern(make_set, rounds=12, warmup_epochs=1)
    step, calls, last = torch.optim.RAdam.step, 0, 8

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr("bbfast.training.checkpoint._LARGEST_SHARE", 1e9)
    monkeypatch.setattr(torch.optim.RAdam, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        pattern(make_set, tmp_path, rounds=12, warmup_epochs=1)
    calls, last = 0, 0
    resumed = pattern(make_set, tmp_path, rounds=12, warmup_epochs=1)
    assert calls == 1 + 12 - 6  # the warm-up again, and the rounds after the last checkpoint
    assert torch.equal(resumed["pattern"], whole["pattern"]) and torch.equal(resumed["loss"], whole["loss"])


def test_it_is_made_once_for_its_settings(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(100, 16)
    kinds = []
    for changes in ({}, {"ratio": 0.02, "magnification": 2.0}, {"epsilon": 8.0}, {"target": 1}):
        attacks.create("narcissus", **{**TINY, **changes}).prepare(data, 10, 0, context)
        assert context.store is not None
        kinds.append(sorted(entry.name for entry in context.store.list()))
    both = ["narcissus_pattern", "narcissus_surrogate"]
    assert kinds == [both, both, sorted([*both, both[0]]), sorted([*both, *both, both[0]])]


# The public set -------------------------------------------------------------------------------------------------------


def test_without_a_public_set_it_is_the_other_classes(make_set: MakeSet) -> None:
    data = make_set(50, 16, classes=5)
    known, extra = attacks.create("narcissus", **TINY, target=2)._surrogate_data(data, 5)
    assert extra == 4 and len(known) == 50 and known.mean == (0.5,) * 3 == known.std
    names = {0: 0, 1: 1, 3: 2, 4: 3, 2: 4}
    for old, new in names.items():
        assert torch.equal(known.images[known.labels == new], data.images[data.labels == old])


def save_npz(path: Path, size: int, channels: int, classes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    shape = (12, size, size, channels) if channels > 1 else (12, size, size)
    images, labels = rng.integers(0, 256, shape, dtype=np.uint8), np.arange(12) % classes
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("own", [1, 3])
def test_a_file_as_public_set(make_set: MakeSet, tmp_path: Path, channels: int, own: int) -> None:
    path = save_npz(tmp_path / "public.npz", 24, channels)
    data = make_set(40, 16, channels=own)
    attack = attacks.create("narcissus", **TINY, pood_path=path, target=1)
    known, extra = attack._surrogate_data(data, 10)
    assert extra == 3 and known.images.shape == (12 + 4, own, 16, 16)
    assert known.labels.tolist() == [0, 1, 2] * 4 + [3] * 4
    assert torch.equal(known.images[12:], data.images[data.labels == 1])
    assert list(attack.files()) == [str(path)]
    attack.prepare(data, 10)
    assert attack.tensors["pattern"].shape == (own, 16, 16)


def test_a_folder_as_public_set_counts_by_its_content(make_set: MakeSet, tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for name in "abc":
            folder = tmp_path / "public" / part / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((20, 20, 3), ord(name), dtype=np.uint8)).save(folder / "0.png")
    attack = attacks.create("narcissus", **TINY, pood_path=tmp_path / "public")
    known, extra = attack._surrogate_data(make_set(40, 16), 10)
    assert extra == 3 and known.images[:3, 0, 0, 0].tolist() == [97, 98, 99]
    before = attack.files()
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(tmp_path / "public" / "train" / "a" / "0.png")
    assert before.keys() == attack.files().keys() and before != attack.files()


def test_a_data_set_by_name_as_public_set(make_set: MakeSet) -> None:
    known, extra = attacks.create("narcissus", **TINY, pood="digits")._surrogate_data(make_set(40, 16), 10)
    assert extra == 10 and known.images.shape == (1442 + 4, 3, 16, 16)


def test_bad_settings(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set(100, 16)
    with pytest.raises(ConfigError, match=r"narcissus: .*pood must be one of .*digits.*, got 'tiny'"):
        attacks.create("narcissus", pood="tiny")
    with pytest.raises(ConfigError, match=r"narcissus: epsilon: .*got 0"):
        attacks.create("narcissus", epsilon=0)
    with pytest.raises(ConfigError, match=r"narcissus: magnification: .*got -1"):
        attacks.create("narcissus", magnification=-1)
    with pytest.raises(ConfigError, match="narcissus: label_mode must be one of clean_label, got 'all2one'"):
        attacks.create("narcissus", label_mode="all2one")
    with pytest.raises(
        ConfigError, match=r"narcissus: pood_path .*nowhere does not exist; give an .npz file or a fold"
    ):
        attacks.create("narcissus", **TINY, pood_path=tmp_path / "nowhere").check(data, 10)
    with pytest.raises(ValueError, match="narcissus: train must hold images of other classes than the target 0"):
        attacks.create("narcissus", **TINY).check(make_set(100, 16, classes=1), 10)
    with pytest.raises(ValueError, match=r"narcissus: ratio 0\.0005 of 100 samples poisons none"):
        attacks.create("narcissus").poison(data)


def test_the_papers_recipe_is_the_default(context: AttackContext) -> None:
    own = Narcissus.Config().surrogate_recipe(context)
    assert (own.epochs, own.batch_size, own.lr, own.momentum, own.weight_decay) == (200, 350, 0.1, 0.9, 5e-4)
    assert (own.schedule, own.padding, own.flip, own.augment) == ("cosine", 4, True, True)
    assert Narcissus.Config(surrogate_epochs=7).surrogate_recipe(context).epochs == 7
    assert Narcissus.Config(surrogate_preset="quick").surrogate_recipe(context).epochs == 20
    config = Narcissus.Config()
    assert (config.ratio, config.epsilon, config.magnification, config.rounds) == (0.0005, 16, 3, 1000)
    assert (config.warmup_epochs, config.warmup_lr, config.trigger_lr) == (5, 0.1, 0.01)
    assert round(50000 * 0.0005) == 25


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_backdoor_on_digits(tmp_path: Path) -> None:
    """Digits are too plain for 16 levels: with 64, and half of the class, the pattern is learned."""
    data = bbfast.datasets.load("digits")
    settings = {"surrogate": "small_cnn", "surrogate_preset": "quick", "warmup_epochs": 0, "rounds": 100}
    attack = attacks.create("narcissus", **settings, epsilon=64, ratio=0.05)
    result = attacks.attack(attack, data, "small_cnn", "quick", device="cpu", store=tmp_path / "store")
    assert result.metrics["c_acc"] >= 0.95 and result.metrics["asr"] >= 0.6
    with torch.random.fork_rng():
        torch.manual_seed(99)
        net = build("small_cnn", 10, 32)
    clean = bbfast.train(net, data.train, bbfast.Recipe.preset("quick", "digits"), device="cpu")
    fooled = bbfast.training.predict_labels(clean.model, result.backdoor_test, device="cpu") == 0
    assert result.metrics["asr"] > float(fooled.float().mean()) + 0.1
    back = AttackResult.load(result.save(tmp_path / "run"))
    assert torch.equal(back.trigger(data.test.images), result.trigger(data.test.images))
