"""MCR: the curve is what its formula says, only its inner points move, and the repaired model lies on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks import AttackResult
from bbfast.data import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._curve import Curve, CurveProgram, coefficients, factor, reestimate_batch_norm
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError
from bbfast.models import build
from bbfast.training import Recipe, train


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = build("small_cnn", 4, (12, 12))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return net.eval()


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("bends", [3, 4, 6])
def test_coefficients(kind: Any, bends: int) -> None:
    for t in (0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0):
        weight = coefficients(bends, t, kind)
        assert float(weight.sum()) == pytest.approx(1, abs=1e-12) and bool((weight >= 0).all())
    assert coefficients(bends, 0, kind)[0] == 1 and coefficients(bends, 1, kind)[-1] == 1
    if bends == 3 and kind == "bezier":
        torch.testing.assert_close(coefficients(3, 0.1, kind), torch.tensor([0.81, 0.18, 0.01]).double())
    if bends == 3 and kind == "polychain":
        torch.testing.assert_close(coefficients(3, 0.1, kind), torch.tensor([0.8, 0.2, 0.0]).double())


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_ends_are_the_two_networks(kind: Any) -> None:
    near, far, x = network(0), network(1), torch.randn(5, 3, 12, 12)
    far.load_state_dict({k: v for k, v in near.state_dict().items() if "running" in k}, strict=False)
    curve = Curve(near, far, 5, kind).eval()
    torch.testing.assert_close(curve(x, 0.0), near(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(curve(x, 1.0), far(x), rtol=0, atol=1e-5)
    repaired = copy.deepcopy(near)
    curve.put(repaired, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(repaired.parameters(), far.parameters(), strict=True))


def test_a_step_is_that_of_the_formula_and_gradients_do_not_pile_up() -> None:
    """Regression: the reference never clears its network's gradients."""
    near, far = network(0), network(1)
    g = torch.Generator().manual_seed(0)
    images = ImageSet(torch.randint(0, 256, (8, 3, 12, 12), generator=g, dtype=torch.uint8), torch.arange(8) % 4)
    recipe = Recipe(epochs=3, batch_size=8, lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.0)
    recipe = recipe.replace(augment=False, eval_every=0, precision="fp32", channels_last=False)
    drawn: list[float] = []

    class Watching(CurveProgram):
        def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
            state = torch.get_rng_state()
            drawn.append(float(torch.rand(())))
            torch.set_rng_state(state)
            return super().loss(model, batch)

    curve = Curve(near, far)
    ends = curve.near.clone(), curve.far.clone()
    start = curve.inner.detach().clone()
    torch.testing.assert_close(start[0], (ends[0] + ends[1]) / 2)
    train(curve, images, recipe, device="cpu", progress=False, program=Watching(3))
    assert torch.equal(curve.near, ends[0]) and torch.equal(curve.far, ends[1])
    assert all(torch.equal(a, b) for a, b in zip(curve.network.parameters(), near.parameters(), strict=True))

    theta, net = start[0].clone(), copy.deepcopy(near).train()
    loader = BatchLoader(images, 8, seed=0, augment=False)
    for epoch, t in enumerate(drawn):
        point = ((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * theta + t**2 * ends[1]).detach()
        nn.utils.vector_to_parameters(point, net.parameters())
        net.zero_grad()
        batch = next(iter(loader.epoch(epoch)))
        F.cross_entropy(net(batch.x), batch.y).backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])  # type: ignore[union-attr]
        theta = theta - 0.1 * factor(epoch, 3) * 2 * t * (1 - t) * gradient
    assert len(set(drawn)) == 3
    torch.testing.assert_close(curve.inner[0].detach(), theta, rtol=1e-4, atol=1e-6)


def test_rate() -> None:
    assert [factor(e, 100) for e in (0, 50, 90, 99)] == pytest.approx([1, 1, 0.01, 0.01])
    assert factor(70, 100) == pytest.approx(0.505)


def test_batch_norm_statistics_forget_what_they_were() -> None:
    """Regression: the reference's move on from the old ones."""
    net = network(0)
    g = torch.Generator().manual_seed(0)
    images = ImageSet(torch.randint(0, 256, (60, 3, 12, 12), generator=g, dtype=torch.uint8), torch.arange(60) % 4)
    loader = BatchLoader(images, 20, augment=False, shuffle=False)
    first = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    layers = reestimate_batch_norm(net, loader)
    hook.remove()
    assert layers == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) and not net.training
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert first.momentum == 0.1
    assert reestimate_batch_norm(nn.Linear(2, 2), loader) == 0


def test_result_lies_on_the_curve(toy_attack: Callable[..., AttackResult]) -> None:
    attack = toy_attack()
    settings = {"ft_epochs": 3, "curve_epochs": 2, "ft_lr": 0.05}
    near = torch.cat([p.detach().flatten() for p in attack.model.parameters()])

    def repaired(**more: Any) -> Any:
        return defenses.defend(defenses.create("mcr", **settings, **more), attack, 0.3, device="cpu", progress=False)

    found = repaired()
    assert [row["phase"] for row in found.history] == ["endpoint"] * 3 + ["curve"] * 2
    assert 0 < found.info["moved"] < found.info["ends_apart"]
    weights = torch.cat([p.detach().flatten() for p in found.model.parameters()])
    assert float((weights - near).norm()) == pytest.approx(found.info["moved"], rel=1e-4)
    again = repaired()
    pairs = zip(found.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    still = repaired(t=0.0)
    assert torch.equal(torch.cat([p.detach().flatten() for p in still.model.parameters()]), near)


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny"])
def test_other_models(name: str, toy_attack: Callable[..., AttackResult]) -> None:
    torch.manual_seed(0)
    attack = toy_attack(build(name, 4, (32, 32)), n=60, n_test=24, size=(3, 32, 32))
    method = defenses.create("mcr", ft_epochs=1, curve_epochs=1)
    result = defenses.defend(method, attack, 0.2, device="cpu", progress=False)
    assert result.info["batch_norm_layers"] == sum(isinstance(m, nn.BatchNorm2d) for m in attack.model.modules())
    assert 0 <= result.metrics["c_acc"] <= 1


def test_a_killed_curve_goes_on(toy_attack: Callable[..., AttackResult], tmp_path: Any) -> None:
    attack = toy_attack()
    method = defenses.create("mcr", ft_epochs=1, curve_epochs=4)
    whole = defenses.defend(method, attack, 0.3, device="cpu", progress=False)
    stopped: list[int] = []
    plain = CurveProgram.epoch_start

    def stop(self: CurveProgram, epoch: int, steps: int, batch_size: int) -> None:
        stopped.append(epoch)
        if epoch == 2 and len(stopped) == 3:
            raise KeyboardInterrupt
        plain(self, epoch, steps, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurveProgram, "epoch_start", stop)
        for _ in range(2):
            try:
                got = defenses.defend(method, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path)
            except KeyboardInterrupt:
                continue
    # It goes on from the last checkpoint; those take at most a twentieth of the time.
    assert stopped[:3] == [0, 1, 2] and stopped[3] > 0 and stopped[-1] == 3
    pairs = zip(whole.model.state_dict().values(), got.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bad_settings(toy_view: Callable[..., DefenderView]) -> None:
    for bad in ({"num_bends": 2}, {"t": 1.5}, {"curve": "line"}, {"lr": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            defenses.create("mcr", **bad)
