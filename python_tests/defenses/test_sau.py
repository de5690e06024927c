"""SAU: shared adversarial examples and what is unlearned of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._perturb import project_, start
from bbfast.defenses.mitigation.sau import SAUConfig, SharedUnlearning, attack_losses, divergence, unlearning_loss
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DivergedError
from bbfast.models import build
from bbfast.training import Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
RECIPE = Recipe(
    epochs=2,
    batch_size=16,
    lr=1e-3,
    optimizer="adam",
    amsgrad=True,
    weight_decay=0.0,
    schedule="constant",
    precision="fp32",
    augment=False,
    channels_last=False,
    eval_every=0,
    deterministic=True,
)


def net(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return build("small_cnn", 4, (12, 12)).eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


def test_the_divergence() -> None:
    p, q = (torch.rand(5, 4, generator=torch.Generator().manual_seed(s)).softmax(1) for s in (0, 1))
    expected = []
    for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True):
        m = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        one = sum(x * math.log(x / z) for x, z in zip(a, m, strict=True))
        expected.append((one + sum(y * math.log(y / z) for y, z in zip(b, m, strict=True))) / 2)
    torch.testing.assert_close(divergence(p, q), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(divergence(p, p), torch.zeros(5)), "the same models share everything"
    sure = torch.eye(4)
    torch.testing.assert_close(divergence(sure, sure.roll(1, 0)), torch.full((4,), math.log(2)), rtol=1e-4, atol=1e-5)


def one_hot(*classes: int) -> Tensor:
    return 5.0 * F.one_hot(torch.tensor(classes), 4).float() + torch.tensor([0.1, 0.0, 0.3, 0.2])


def test_the_attack_counts_what_is_not_done_yet() -> None:
    """Samples: none fooled; model fooled alone; both, to different classes; both, to the same: shared."""
    labels = torch.tensor([0, 0, 0, 0])
    z, z0 = one_hot(0, 1, 1, 2), one_hot(0, 0, 2, 2)
    adversarial, share, shared = attack_losses((z, z0), (labels, labels), labels)
    assert shared.tolist() == [False, False, False, True]
    ce, ce0 = F.cross_entropy(z, labels, reduction="none"), F.cross_entropy(z0, labels, reduction="none")
    torch.testing.assert_close(adversarial, -(ce[0] + ce0[0] + ce0[1]) / 8)
    torch.testing.assert_close(share, divergence(z.softmax(1), z0.softmax(1))[:3].sum() / 4)


def test_the_unlearning_loss() -> None:
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    wanted, chosen = torch.tensor([1, 2, 0]), torch.tensor([True, False, True])
    p = z.softmax(1).double()
    expected = 0.0
    for i in (0, 2):
        own = float(p[i, wanted[i]])
        expected -= math.log(1e-6 + min(1 - own, 0.999)) + math.log(1 + 1e-6 - max(own, 0.001))
    assert float(unlearning_loss(z, wanted, chosen)) == pytest.approx(expected / 6, rel=1e-4)
    sure = torch.tensor([[100.0, 0.0], [-100.0, 0.0]], requires_grad=True)
    value = unlearning_loss(sure, torch.tensor([0, 0]), torch.tensor([True, True]))
    value.backward()
    assert value.isfinite() and sure.grad is not None and sure.grad.isfinite().all()
    assert float(unlearning_loss(z, wanted, torch.zeros(3, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("norm_type", ["linf", "l2", "l1", "none"])
@pytest.mark.parametrize("init", ["max", "zero", "random", "min"])
def test_perturbations_stay_in_their_ball(norm_type: str, init: str) -> None:
    delta = start(torch.empty(3, 2, 4, 4), init, norm_type, 0.2, seed=1)
    assert torch.equal(delta, start(torch.empty(3, 2, 4, 4), init, norm_type, 0.2, seed=1))
    delta = project_(delta + torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), norm_type, 0.2)
    p = {"linf": math.inf, "l2": 2, "l1": 1}.get(norm_type)
    assert p is None or bool((delta.flatten(1).norm(p=p, dim=1) <= 0.2 + 1e-6).all())
    small = torch.full((1, 1, 2, 2), 1e-3)
    assert torch.equal(project_(small.clone(), norm_type, 0.2), small), "what is inside stays"
    assert project_(torch.zeros(1, 1, 2, 2), norm_type, 0.2).isfinite().all()


def reference(model: nn.Module, frozen: nn.Module, images: ImageSet, config: SAUConfig, seen: list[Tensor]) -> None:
    """SAU as it is written down: everything anew in every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE.lr, amsgrad=True)
    std = torch.tensor(images.std).view(1, -1, 1, 1)
    for epoch in range(config.rounds):
        for batch in BatchLoader(images, 16, augment=False, merge_single=True).epoch(epoch):
            x, y, n = batch.x, batch.y, len(batch)
            delta = torch.full_like(x, config.bound)
            for _ in range(config.adv_steps):
                delta.requires_grad_()
                z, z0 = model(x + delta / std), frozen(x + delta / std)
                old, old0 = model(x).argmax(1), frozen(x).argmax(1)
                a, a0 = z.argmax(1) != old, z0.argmax(1) != old0
                shared = a & a0 & (z.argmax(1) == z0.argmax(1))
                if shared.all():
                    break
                adv = -(
                    F.cross_entropy(z[~a], y[~a], reduction="sum") + F.cross_entropy(z0[~a0], y[~a0], reduction="sum")
                )
                p, q = z.softmax(1).clamp(min=1e-8), z0.softmax(1).clamp(min=1e-8)
                m = ((p + q) / 2).log()
                js = 0.5 * ((p * (p.log() - m)).sum(1) + (q * (q.log() - m)).sum(1))
                loss = config.beta_adv * adv / (2 * n) + config.beta_share * js[~shared].sum() / n
                g = torch.autograd.grad(loss, delta)[0]
                delta = (delta - config.adv_lr * g.sign()).clamp(-config.bound, config.bound).detach()
            delta = delta.detach()
            seen.append(delta)
            bad = x + delta / std
            s = frozen(bad).argmax(1)
            chosen = (s != y) & (s != frozen(x).argmax(1))
            loss = F.cross_entropy(model(x), y)
            loss = loss + config.lambdas[2] * unlearning_loss(model(bad), s, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_it_is_the_plain_loop(toy_images: MakeImages) -> None:
    """The cached predictions and the joined pass change nothing; the frozen model keeps its bits."""
    images, one, other, frozen = toy_images(40, 4), net(), net(), net(4)
    before, config, seen = copy.deepcopy(frozen), SAUConfig(rounds=2, adv_steps=3), list[Tensor]()
    done = train(one, images, RECIPE, program=SharedUnlearning(frozen, config), device="cpu", progress=False)
    reference(other, frozen, images, config, seen)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4, msg=name)
    assert same_state(frozen, before) and not same_state(one, net())
    assert all(float(delta.abs().max()) <= 0.2 + 1e-6 for delta in seen)
    assert {"shared", "unlearned"} <= set(done.history[0])


def test_without_unlearning_it_is_fine_tuning_in_eval_mode(toy_images: MakeImages) -> None:
    images, one, other = toy_images(40, 4), net(), net()
    config = SAUConfig(lambdas=(1.0, 0.0, 0.0), adv_steps=1)
    train(one, images, RECIPE, program=SharedUnlearning(net(), config), device="cpu", progress=False)
    optimizer = torch.optim.Adam(other.parameters(), lr=RECIPE.lr, amsgrad=True)
    for epoch in range(2):
        for batch in BatchLoader(images, 16, augment=False, merge_single=True).epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(other(batch.x), batch.y).backward()
            optimizer.step()
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_statistics_and_outer_steps(toy_images: MakeImages) -> None:
    images = toy_images(40, 4)
    state = {}
    for mode, steps in ((False, 1), (True, 1), (False, 3)):
        model = net()
        config = SAUConfig(train_mode=mode, outer_steps=steps, adv_steps=1)
        train(model, images, RECIPE, program=SharedUnlearning(net(), config), device="cpu", progress=False)
        state[mode, steps] = model.state_dict()
    start_mean = net().state_dict()["layer1.0.bn1.running_mean"]
    assert torch.equal(state[False, 1]["layer1.0.bn1.running_mean"], start_mean)
    assert not torch.equal(state[True, 1]["layer1.0.bn1.running_mean"], start_mean)
    moved = [float((state[False, k]["conv1.weight"] - net().state_dict()["conv1.weight"]).norm()) for k in (1, 3)]
    assert moved[1] > 1.5 * moved[0]


def test_settings_and_errors(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    config = SAUConfig()
    assert (config.rounds, config.adv_steps, config.adv_lr, config.bound, config.init) == (100, 5, 0.2, 0.2, "max")
    assert (config.beta_adv, config.beta_share, config.lambdas, config.lr) == (0.01, 1.0, (1, 0, 1), 1e-4)
    assert config.for_dataset("tiny_imagenet").rounds == 20
    for bad in ((-1.0, 0.0, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(ConfigError, match="lambdas"):
            defenses.create("sau", lambdas=bad)
    view = toy_view(toy_attack().model, clean=toy_images(40, 4), progress=False)
    with pytest.raises(DivergedError, match=r"loss became .*lower lr .* or the third of lambdas"):
        defenses.create("sau", lr=1e30, rounds=3).run(view)


def test_a_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None]) -> None:
    killed_goes_on(defenses.create("sau", rounds=3, adv_steps=2), toy_attack(), SharedUnlearning)
