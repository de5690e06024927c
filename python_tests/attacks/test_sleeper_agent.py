"""Sleeper Agent: the hidden changes, the patch, gradient matching step by step, and runs on small data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks._matching import Matching, ShiftFlip, gradient_norms, loss_gradient, mismatch, shift_flip
from bbfast.attacks.prerequisites import default_context
from bbfast.attacks.sleeper_agent import SleeperAgent, paste
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.errors import ConfigError
from bbfast.models import build
from bbfast.store import Store

MakeSet = Callable[..., ImageSet]
TINY: dict[str, Any] = {
    "surrogate": "small_cnn",
    "surrogate_preset": "quick",
    "surrogate_epochs": 1,
    "iterations": 3,
    "retrain_every": 2,
    "retrain_epochs": 1,
    "sources": 12,
    "ratio": 0.05,
}
PLAIN = Matching(epsilon=0.1, iterations=25, retrain_every=None, lr=0.05, batch_size=128, shift=0, flip=False)


@pytest.fixture
def context(tmp_path: Path, make_set: MakeSet) -> AttackContext:
    return dataclasses.replace(default_context(make_set(100, 16), 10), store=Store(tmp_path / "store"), progress=False)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("small_cnn", 4, 16).eval().requires_grad_(True)


def flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient])


# The patch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_paste_replaces_one_rectangle(dtype: torch.dtype) -> None:
    images = torch.full((4, 2, 6, 7), 100, dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images / 255
    patch = torch.arange(2 * 2 * 3, dtype=torch.uint8).view(2, 2, 3)
    top, left = torch.tensor([0, 4, 2, 4]), torch.tensor([0, 4, 1, 0])
    out = paste(images, patch, top, left)
    for i in range(4):
        expected = images[i].clone()
        value = patch if dtype == torch.uint8 else patch / 255
        expected[:, top[i] : top[i] + 2, left[i] : left[i] + 3] = value
        assert torch.equal(out[i], expected)
    assert paste(images[:0], patch, top[:0], left[:0]).shape == (0, 2, 6, 7)


def test_the_patch_at_test_time(make_set: MakeSet) -> None:
    data = make_set(100, 16)
    attack = attacks.create("sleeper_agent", **TINY, source_classes=(3, 4))
    attack.prepare(data, 10)
    patch = attack.tensors["patch"]
    assert patch.shape == (3, 4, 4) and set(patch.unique().tolist()) == {0, 255}
    assert torch.equal(patch[0], patch[1]) and torch.equal(patch[0], patch[2])
    grey = torch.full((60, 3, 16, 16), 100, dtype=torch.uint8)
    changed = attack.trigger(grey) != 100
    assert bool((changed.flatten(1).sum(1) == 48).all())
    places = {tuple(c[0].nonzero()[0].tolist()) for c in changed}
    assert len(places) > 20 and max(p[0] for p in places) == 12 and min(p[1] for p in places) == 0
    x = torch.full((2, 3, 16, 16), 0.5, requires_grad=True)
    attack.trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad == 0, changed[:2])


def test_the_corner_and_the_size_are_settings(make_set: MakeSet) -> None:
    attack = attacks.create("sleeper_agent", **TINY, location="corner", patch_size=3)
    attack.prepare(make_set(100, 16), 10)
    changed = attack.trigger(torch.full((5, 3, 16, 16), 100, dtype=torch.uint8)) != 100
    assert bool(changed[:, :, 13:, 13:].all()) and int(changed.sum()) == 5 * 27


# The hidden changes ---------------------------------------------------------------------------------------------------


def test_training_images_carry_changes_and_no_patch(make_set: MakeSet) -> None:
    """Found by the samples' numbers, on a set whose numbers are not positions."""
    data = dataclasses.replace(make_set(200, 16), ids=torch.arange(200).flip(0) * 7 + 3)
    attack = attacks.create("sleeper_agent", **TINY, target=2)
    poisoned = attack.poison(data, num_classes=10)
    rows = poisoned.poisoned.nonzero().flatten()
    assert len(rows) == 10 and bool((data.labels[rows] == 2).all())
    assert torch.equal(poisoned.labels, data.labels)
    difference = (poisoned.images.int() - data.images.int()).abs()
    assert int(difference.max()) <= 16 and float(difference[rows].float().mean()) > 3
    assert not difference[~poisoned.poisoned].any()
    delta, ids = attack.tensors["delta"], attack.tensors["ids"]
    assert float(delta.abs().max()) <= 16 and bool((ids.diff() > 0).all())
    for i, number in enumerate(ids.tolist()):
        row = int((data.ids == number).nonzero())
        expected = (data.images[row].double() + delta[i].double()).round().clamp(0, 255)
        assert torch.equal(poisoned.images[row].double(), expected)
    # Whatever the order, and samples that carry nothing in between.
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attack.trigger(data.images[order], data.ids[order], "train"), poisoned.images[order])
    beyond = torch.tensor([10**6, -1])
    assert torch.equal(attack.trigger(data.images[:2], beyond, "train"), data.images[:2])
    exact = attack.trigger(data.images.float() / 255, data.ids, "train")
    assert float((exact * 255 - poisoned.images).abs().max()) <= 0.51


def test_the_images_with_the_longest_gradients_are_taken(make_set: MakeSet) -> None:
    data = make_set(20, 16, classes=4)
    net = network()
    x = data.images.float() / 255
    norms = gradient_norms(net, x, 1)
    for i in (0, 7):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), torch.tensor([1])).backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert float(norms[i]) == pytest.approx(float(expected), rel=1e-4)
    # The choice is the longest, not the drawn one that stands in before they are known.
    attack = attacks.create("sleeper_agent", **{**TINY, "iterations": 1, "ratio": 0.02})
    big = make_set(200, 16)
    attack.prepare(big, 10)
    chosen, _ = attack.select(big.labels, attack.rule(big.labels, 10), 0)
    before, _ = attacks.create("sleeper_agent", **TINY, count=4).select(big.labels, attack.rule(big.labels, 10), 0)
    assert sorted(chosen.tolist()) == sorted(attack.tensors["rows"].tolist()) and len(chosen) == 4
    assert set(chosen.tolist()) != set(before.tolist())


# Gradient matching ----------------------------------------------------------------------------------------------------


def test_the_source_gradient_is_that_of_the_mean_loss(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(), make_set(10, 16).images.float() / 255
    whole = loss_gradient(net, x, 2)
    F.cross_entropy(net(x), torch.full((10,), 2)).backward()
    for ours, p in zip(whole, net.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)
    monkeypatch.setattr("bbfast.attacks._matching._PASS", 3)
    torch.testing.assert_close(flat(loss_gradient(net, x, 2)), flat(whole), rtol=1e-4, atol=1e-6)


def test_mismatch_and_its_derivative(make_set: MakeSet) -> None:
    """One minus the cosine; the double backward against finite differences."""
    net = network().double()
    x = make_set(6, 16).images.double() / 255

    def value(images: Tensor, label: int) -> float:
        return mismatch(net, images, label, wanted).item()

    wanted = loss_gradient(net, x[3:], 2)
    own = flat(loss_gradient(net, x[:3], 1))
    expected = 1 - F.cosine_similarity(own, flat(wanted), dim=0)
    assert value(x[:3], 1) == pytest.approx(float(expected), rel=1e-6)
    assert value(x[3:], 2) == pytest.approx(0, abs=1e-9)
    y = x[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mismatch(net, y, 1, wanted), y)
    direction, step = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype), 1e-6
    ends = [value(x[:3] + s * step * direction, 1) for s in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def craft(
    make_set: MakeSet, tmp_path: Path, matching: Matching = PLAIN, retrain: Any = None
) -> tuple[Tensor, list[float], Tensor]:
    data = make_set(12, 16, seed=3)
    images = data.images[:5].float() / 255
    mean, std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.25)
    source = (data.images[5:].float() / 255 - mean) / std
    delta, losses = matching.craft(
        images, 1, mean, std, network(), lambda net, time: loss_gradient(net, source, 1), retrain, 0, tmp_path
    )
    return delta, losses, images


def coloured(n: int, seed: int) -> ImageSet:
    """Four classes that a network tells apart by their colour, half normalised."""
    labels = torch.arange(n) % 4
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [160, 160, 60]])
    noise = torch.randint(-50, 50, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    images = (colours[labels][:, :, None, None] + noise).to(torch.uint8)
    return ImageSet(images, labels, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_acceptance(tmp_path: Path) -> None:
    """spec/attacks section 21: the mismatch falls by more than .2, changes stay within epsilon, cosine above .3."""
    data, net = coloured(120, 0), network()
    recipe = bbfast.Recipe.preset("quick", epochs=4, eval_every=0, augment=False)
    bbfast.train(net, data, recipe, device="cpu", progress=False)
    net.requires_grad_(True)
    images, source = data.images[data.labels == 1][:8].float() / 255, data.images[data.labels == 0][:20]
    source = paste(source, torch.full((3, 4, 4), 255, dtype=torch.uint8), torch.full((20,), 12), torch.full((20,), 12))
    wanted = loss_gradient(net, (source.float() / 255 - 0.5) / 0.25, 1)
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    matching = dataclasses.replace(PLAIN, iterations=60, epsilon=0.2)
    delta, losses = matching.craft(images, 1, mean, std, net, lambda net, time: wanted, None, 0, tmp_path)  # type: ignore[arg-type]
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.2 and 1 - losses[-1] > 0.3
    assert float(delta.abs().max()) == pytest.approx(0.2, abs=1e-6)
    assert float((images + delta).min()) >= -1e-6 and float((images + delta).max()) <= 1 + 1e-6
    # What the steps report is what a fresh look finds.
    again = mismatch(net, (images + delta - mean) / std, 1, wanted).item()
    assert again == pytest.approx(losses[-1], abs=0.05)


def test_new_networks_are_trained_in_between(make_set: MakeSet, tmp_path: Path) -> None:
    calls: list[tuple[int, Tensor]] = []

    def retrain(change: Tensor, time: int, folder: Path) -> nn.Module:
        calls.append((time, change.clone()))
        assert folder == tmp_path / f"training-{time}"
        return network(seed=time)

    matching = dataclasses.replace(PLAIN, iterations=6, retrain_every=2)
    _, losses, _ = craft(make_set, tmp_path, matching, retrain)
    # After steps 2 and 4, not after the last.
    assert [time for time, _ in calls] == [1, 2] and len(losses) == 6
    assert not torch.equal(calls[0][1], calls[1][1])
    assert all(float(change.abs().max()) <= 0.1 + 1e-6 for _, change in calls)


def test_an_interrupted_crafting_goes_on_to_the_same_bits(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matching = dataclasses.replace(PLAIN, iterations=8, retrain_every=3, shift=2, flip=True)
    times: list[int] = []

    def retrain(change: Tensor, time: int, folder: Path) -> nn.Module:
        times.append(time)
        return network(seed=time)

    whole = craft(make_set, tmp_path / "whole", matching, retrain)
    assert times == [1, 2]
    step, calls, last = torch.optim.Adam.step, 0, 6

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr("bbfast.training.checkpoint._LARGEST_SHARE", 1e9)
    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        craft(make_set, tmp_path / "cut", matching, retrain)
    calls, last = 0, 0
    times.clear()
    resumed = craft(make_set, tmp_path / "cut", matching, retrain)
    assert calls == 3 and times == [2]
    assert torch.equal(resumed[0], whole[0]) and resumed[1] == whole[1]


def test_shift_and_flip() -> None:
    x = torch.arange(2 * 1 * 4 * 6, dtype=torch.float32).view(2, 1, 4, 6) + 1
    middle = torch.full((2, 3), 0.5)
    torch.testing.assert_close(shift_flip(x, middle, 2, False), x)
    mirrored = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9]])
    torch.testing.assert_close(shift_flip(x, mirrored, 2, True), torch.stack([x[0].flip(-1), x[1]]))
    torch.testing.assert_close(shift_flip(x, mirrored, 2, False), x)
    # Vertical draw 1 reads two rows further down, horizontal draw 0 one column further left.
    moved = shift_flip(x, torch.tensor([[1.0, 0.5, 0.9], [0.5, 0.25, 0.9]]), 2, False)
    torch.testing.assert_close(moved[0], F.pad(x[0, :, 2:], (0, 0, 0, 2)))
    torch.testing.assert_close(moved[1], F.pad(x[1, :, :, :-1], (1, 0)))
    half = shift_flip(x, torch.tensor([[0.5, 0.5 + 1 / 8, 0.9]] * 2), 2, False)
    torch.testing.assert_close(half[0, 0, 0, :3], torch.tensor([1.5, 2.5, 3.5]))


def test_the_surrogates_training_shifts_each_sample_by_its_own(make_set: MakeSet) -> None:
    seen: list[Tensor] = []
    net = network()
    net.register_forward_hook(
        lambda module, args, out: seen.append(args[0].detach().clone()) if module.training else None
    )
    recipe = bbfast.Recipe(epochs=2, batch_size=8, lr=1e-9, eval_every=0, precision="fp32")
    data = dataclasses.replace(make_set(8, 16, classes=4), images=make_set(1, 16).images.expand(8, -1, -1, -1).clone())
    bbfast.train(net, data, recipe, program=ShiftFlip(4, True), device="cpu", progress=False)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])
    assert len({tuple(image.flatten().tolist()) for image in seen[0]}) == 8
    assert ShiftFlip(4, True).describe() != ShiftFlip(3, True).describe()


# The whole ------------------------------------------------------------------------------------------------------------


def test_prerequisites_are_found_again(
    context: AttackContext, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(100, 16)
    first = attacks.create("sleeper_agent", **TINY)
    first.prepare(data, 10, 0, context)
    monkeypatch.setattr(Matching, "craft", lambda *args, **kwargs: pytest.fail("crafted again"))
    again = attacks.create("sleeper_agent", **TINY)
    again.prepare(data, 10, 0, context)
    assert all(torch.equal(again.tensors[key], value) for key, value in first.tensors.items())
    assert context.store is not None
    assert sorted(entry.name for entry in context.store.list()) == ["sleeper_agent_deltas", "surrogate"]
    for changes in ({"epsilon": 8}, {"ratio": 0.1}, {"location": "corner"}, {"source_classes": (2,)}, {"sources": 5}):
        with pytest.raises(pytest.fail.Exception, match="crafted again"):
            attacks.create("sleeper_agent", **{**TINY, **changes}).prepare(data, 10, 0, context)


def test_result_and_metrics(make_set: MakeSet, tmp_path: Path) -> None:
    pair = DataPair(make_set(100, 16), make_set(40, 16, seed=1), num_classes=10)
    recipe = bbfast.Recipe.preset("quick", epochs=1)
    attack = attacks.create("sleeper_agent", **TINY, source_classes=(3, 5))
    result = attacks.attack(attack, pair, "small_cnn", recipe, device="cpu", store=tmp_path / "store", progress=False)
    assert set(result.backdoor_test.original_labels.tolist()) == {3, 5} and "leak" in result.metrics
    assert not result.config["attack_config"]["clip_to_class"] and int(result.poisoned.sum()) == 5
    back = AttackResult.load(result.save(tmp_path / "run"))
    for stage in ("train", "test"):
        ours, theirs = (r.trigger(pair.train.images, pair.train.ids, stage) for r in (result, back))  # type: ignore[arg-type]
        assert torch.equal(ours, theirs)
    assert torch.equal(back.trigger(pair.train.images, stage="train"), result.train.images)


def test_the_papers_settings_are_the_defaults(context: AttackContext) -> None:
    config = SleeperAgent.Config()
    assert (config.epsilon, config.iterations, config.retrain_every, config.sources) == (16, 250, 50, 1000)
    assert (config.craft_lr, config.craft_batch, config.location) == (0.025, 128, "random")
    assert (config.source_classes, config.target, config.ratio) == ((1,), 0, 0.01)
    first, later = config.surrogate_recipe(context), config.retrain_recipe(context)
    assert (first.epochs, first.lr, first.milestones, first.weight_decay) == (100, 0.1, (50, 75), 5e-4)
    assert (later.epochs, later.lr, later.milestones, later.gamma) == (40, 0.1, (14, 24, 35), 0.1)
    quick = SleeperAgent.Config(surrogate_preset="quick", retrain_epochs=3)
    assert quick.retrain_recipe(context).epochs == 3 and quick.surrogate_recipe(context).epochs == 20


def test_bad_settings(make_set: MakeSet) -> None:
    data = make_set(100, 16)
    with pytest.raises(ConfigError, match="sleeper_agent: label_mode must be one of one2one, got 'clean_label'"):
        attacks.create("sleeper_agent", label_mode="clean_label", source_classes=())
    with pytest.raises(ConfigError, match=r"sleeper_agent: iterations: .*got 0"):
        attacks.create("sleeper_agent", iterations=0)
    with pytest.raises(ConfigError, match=r"sleeper_agent: location: .*got 'middle'"):
        attacks.create("sleeper_agent", location="middle")
    with pytest.raises(ValueError, match=r"asks for 30 of 100 samples, but class \[0\] has 10; use a ratio of at most"):
        attacks.create("sleeper_agent", ratio=0.3).check(data, 10)
    with pytest.raises(ValueError, match="a patch of 17 pixels does not fit into 16 x 16 images"):
        attacks.create("sleeper_agent", patch_size=17).check(data, 10)
    with pytest.raises(ValueError, match=r"train holds no image of the source classes \[7\]"):
        attacks.create("sleeper_agent", source_classes=(7,), ratio=0.1).check(make_set(100, 16, classes=5), 10)
