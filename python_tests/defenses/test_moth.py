"""MOTH: the batched inversion against a plain loop, which pairs are chosen, what is stamped, and going on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader, derive_seed
from bbfast.defenses.mitigation import _keep, moth
from bbfast.defenses.mitigation._distances import Distances
from bbfast.defenses.mitigation._pair_inversion import PairSettings, PairTriggers, Problems, invert_pairs
from bbfast.defenses.mitigation.moth import MOTHConfig, pair_problems, universal_problems
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, DivergedError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
QUICK: dict[str, Any] = {"harden_iters": 7, "universal_iters": 3, "first_iters": 4, "next_iters": 2}


def net() -> nn.Module:
    torch.manual_seed(1)
    return build("small_cnn", 4, 12).eval().requires_grad_(False)


def whole(images: ImageSet) -> tuple[Tensor, Tensor]:
    (batch,) = BatchLoader(images, len(images), augment=False, shuffle=False).epoch(0)
    return batch.x, batch.y


def drawn(shape: tuple[int, ...], seed: int, turn: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(derive_seed("pairs", seed, turn)))


def alone(
    model: nn.Module, images: ImageSet, x: Tensor, target: int, s: PairSettings, seed: int
) -> tuple[Tensor, float]:
    """One problem with torch's Adam, as the method is written down: the best trigger and its size."""
    shape = (4, *x.shape[2:])
    raw = torch.atanh((drawn(shape, seed, 0) - 0.5) * 2 * (1 - 1e-6)).requires_grad_()
    adam = torch.optim.Adam([raw], lr=s.lr, betas=(0.5, 0.9))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    cost, up, down, best, size = s.init_cost, 0, 0, torch.zeros(shape), math.inf
    for step in range(s.steps):
        values = raw.tanh() / 2 + 0.5
        m, p = values[:1], values[1:]
        stamped = ((1 - m) * (x * std + mean) + m * p - mean) / std
        logits = model(stamped)
        loss = F.cross_entropy(logits, torch.full((len(x),), target)) + cost * m.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        good = float((logits.argmax(1) == target).float().mean()) >= s.threshold
        if good and float(m.detach().sum()) < size:
            best, size = values.detach(), float(m.detach().sum())
            shaken = (best + 0.01 * (2 * drawn(shape, seed, step + 1) - 1)).clamp(0, 1)
            with torch.no_grad():
                raw.copy_(torch.atanh(((shaken - 0.5) * 2).clamp(-1 + 1e-6, 1 - 1e-6)))
        up, down = (up + 1, 0) if good else (0, down + 1)
        if up >= s.patience:
            up, cost = 0, cost * s.multiplier
        elif down >= s.patience:
            down, cost = 0, cost / s.multiplier**1.5
    return best, size


def test_every_problem_ends_as_it_would_alone(toy_images: MakeImages) -> None:
    images, model = toy_images(40, 4), net()
    x, y = whole(images)
    pairs = torch.tensor([[0, 1], [1, 0], [2, 3]])
    settings = PairSettings(steps=12, threshold=0.5, patience=2, chunk=11)
    found = invert_pairs(model, images, pair_problems(x, y, pairs), settings, seed=3)
    assert bool(found.found.any())
    for i, (s, t) in enumerate(pairs.tolist()):
        best, size = alone(model, images, x[y == s], t, settings, 3)
        assert float(found.size[i]) == pytest.approx(size, rel=2e-3)
        torch.testing.assert_close(found.trigger[i], best, rtol=0, atol=5e-3)


def test_the_drop_of_the_loss(toy_images: MakeImages) -> None:
    """Regression: the toolbox has 1 for every image when there is more than one batch."""
    images, model = toy_images(40, 4), net()
    x, y = whole(images)
    problems = universal_problems(x, y, 4)
    assert len(problems.rows) == 120 and torch.equal(problems.owner.bincount(), torch.full((4,), 30))
    assert not (y[problems.rows] == problems.owner).any()
    settings = PairSettings(steps=6, threshold=0.4)
    found = invert_pairs(model, images, problems, settings, seed=3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    first = drawn((4, 12, 12), 3, 0)
    for t in range(4):
        rows = problems.rows[problems.owner == t]
        drop = found.loss_drop[problems.owner == t]
        if not found.found[t]:
            assert not drop.any()
            continue
        losses = []
        for trigger in (first, found.trigger[t]):
            stamped = torch.lerp(x[rows], (trigger[1:] - mean) / std, trigger[:1].expand(3, 12, 12))
            losses.append(F.cross_entropy(model(stamped), torch.full((30,), t), reduction="none"))
        torch.testing.assert_close(drop, (losses[0] - losses[1]) / losses[0], rtol=1e-2, atol=1e-3)
        assert drop.std() > 0


def test_which_pair() -> None:
    known = Distances((4, 2, 2), 4)
    known.drop[2, 1] = 0.9
    known.drop[0, 3] = known.drop[3, 0] = 0.5
    known.gain[1, 3] = 5.0
    assert known.choose(0, 1, 0.0, 0).tolist() == [[0, 3]], "the sum of both directions"
    assert known.choose(0, 2, 0.0, 0).tolist() == [[0, 3], [1, 2]]
    assert known.choose(1000, 1, 0.0, 0).tolist() == [[1, 3]]
    drawn = torch.cat([known.choose(turn, 1, 1.0, 0) for turn in range(300)])
    assert (drawn[:, 0] < drawn[:, 1]).all() and len(torch.unique(drawn, dim=0)) == 6
    share = sum(known.choose(0, 1, 0.3, seed).tolist() != [[0, 3]] for seed in range(400)) / 400
    assert share == pytest.approx(0.3 * 5 / 6, abs=0.07)
    assert len(torch.unique(known.choose(3, 9, 0.5, 0), dim=0)) == 6


def test_recorded_distances() -> None:
    known = Distances((4, 2, 2), 3)
    known.size[0, 1] = 10.0
    known.gain[0, 1] = 0.5
    pairs = torch.tensor([[0, 1], [1, 0]])
    known.record(pairs, torch.tensor([12.0, math.inf]))
    assert known.gain[0, 1] == pytest.approx((0.5 + 0.2) / 2) and known.size[0, 1] == 12
    assert known.gain[1, 0] == 0 and known.counts[1, 0] == 0
    known.record(pairs, torch.tensor([6.0, 7.0]))
    assert known.gain[0, 1] == pytest.approx((0.35 - 0.5) / 2) and known.first[0, 1] == 12
    assert known.size[1, 0] == 7 and known.gain[1, 0] == 0, "nothing to compare with"


def test_what_a_step_trains_on(toy_view: MakeView, toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triggers on some images of either class, labels as they are, statistics of BatchNorm too; large ones on none."""
    images = toy_images(40, 4)
    trigger, sizes = torch.rand(4, 12, 12), (9.0, 40.0)
    trigger[0] = 0
    trigger[0, 5, 5] = 1

    def fake(model: nn.Module, images: ImageSet, problems: Problems, *_: Any, **__: Any) -> PairTriggers:
        n = len(problems)
        size = torch.tensor([sizes[i % 2] for i in range(n)], dtype=torch.float64)
        drop = torch.zeros(len(problems.rows))
        return PairTriggers(trigger.expand(n, *trigger.shape), size, torch.ones(n, dtype=torch.bool), drop)

    monkeypatch.setattr(moth, "invert_pairs", fake)
    model, steps = net(), list[tuple[Tensor, Tensor, bool]]()
    real = moth._Hardening._step

    def watched(self: Any, batch: Batch, carriers: Any) -> float:
        def note(module: nn.Module, args: tuple[Tensor]) -> None:
            steps.append((args[0].detach().clone(), batch.y, module.training))

        handle = self.model.register_forward_pre_hook(note)
        try:
            return real(self, batch, carriers)
        finally:
            handle.remove()

    monkeypatch.setattr(moth._Hardening, "_step", watched)
    view = toy_view(model, clean=images, progress=False)
    result = defenses.create("moth", harden_iters=2, batch_size=40, random_share=1.0, portion=0.25).run(view)
    assert len(steps) == 6 and not any(training for _, _, training in steps)
    before = {k: v for k, v in model.state_dict().items() if "running" in k}
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in before.items())  # type: ignore[union-attr]
    mean, std = (torch.tensor(v) for v in (images.mean, images.std))
    wanted = (trigger[1:, 5, 5] - mean) / std
    stamped = [y[((x[:, :, 5, 5] - wanted).abs() < 1e-5).all(1)].tolist() for x, y, _ in steps]
    assert [len(found) for found in stamped] == [15, 0, 15, 0, 2, 2], "large triggers are on none"
    assert 0 not in stamped[0] and 2 not in stamped[2]
    first = result.history[1]["pairs"][0][0]
    assert stamped[4] == stamped[5] == [first, first]


def test_result_settings_and_errors(toy_attack: MakeAttack, toy_view: MakeView, toy_images: MakeImages) -> None:
    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    frozen = next(attack.model.parameters())
    frozen.requires_grad_(False)
    defense = defenses.create("moth", pairs=2, **QUICK)
    one, two = (defenses.defend(defense, attack, 0.3, device="cpu", progress=False) for _ in range(2))
    assert one.model is not None and one.model.state_dict().keys() == attack.model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))  # type: ignore[union-attr]
    assert [p.requires_grad for p in one.model.parameters()] == [p.requires_grad for p in attack.model.parameters()]
    assert [row["steps"] for row in one.history] == [4, 3, 3, 1]
    assert all(len(row["pairs"]) == 4 for row in one.history[1:])
    none = defenses.defend(defenses.create("moth", harden_iters=0), attack, 0.3, device="cpu")
    assert all(torch.equal(v, attack.model.state_dict()[k]) for k, v in none.model.state_dict().items())  # type: ignore[union-attr]
    assert MOTHConfig().for_dataset("digits").harden_iters == 150
    images = toy_images(40, 4)
    with pytest.raises(DataRequirementError, match=r"moth measures .* has none of class 2"):
        defenses.create("moth").check(toy_view(net(), clean=images.subset(images.labels != 2)))
    broken = net()
    broken.linear.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(DivergedError, match=r"moth, warm-up: the model's outputs are not finite"):
        defenses.create("moth", **QUICK).run(toy_view(broken, clean=images, progress=False))
    with pytest.raises(DivergedError, match=r"moth, hardening.* step \d.*lower lr \(now 1e\+30\)"):
        defenses.create("moth", **QUICK, lr=1e30).run(toy_view(net(), clean=images, progress=False))


def test_a_killed_run_goes_on(
    toy_view: MakeView, toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keep, "SAVE_EVERY_SECONDS", 0.0)
    images, defense = toy_images(40, 4), defenses.create("moth", **QUICK)
    expected = defense.run(toy_view(net(), clean=images, progress=False))
    real = moth._Hardening._period

    def killed(self: Any, done: int, steps: int) -> dict[str, Any]:
        if done == 3:
            raise KeyboardInterrupt
        return real(self, done, steps)

    with monkeypatch.context() as patch:
        patch.setattr(moth._Hardening, "_period", killed)
        with pytest.raises(KeyboardInterrupt):
            defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    again = defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    assert again.history == expected.history
    state = expected.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())  # type: ignore[union-attr]
    assert again.info == expected.info


@pytest.mark.slow
def test_distances_grow_on_the_digits(digits_attack: AttackResult) -> None:
    """The mean distance over pairs grows, measured alike before and after; the accuracy falls by less than 0.05."""
    result = defenses.defend("moth", digits_attack, device="cpu", progress=False)
    assert result.model is not None
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.05
    test = digits_attack.test.subset(torch.arange(200))
    x, y = whole(test)
    pairs = torch.tensor([[s, t] for s in range(10) for t in range(10) if s != t])[::5]
    means = []
    for model in (digits_attack.model, result.model):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        found = invert_pairs(frozen, test, pair_problems(x, y, pairs), PairSettings(steps=100), seed=0)
        assert found.found.all()
        means.append(float(found.size.mean()))
    assert means[1] > means[0], means
