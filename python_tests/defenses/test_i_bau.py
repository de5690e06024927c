"""I-BAU: the implicit gradient, its two forms, and what each step sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._hypergradient import (
    double_backward_products,
    fixed_point,
    jvp_products,
    twice_differentiable,
)
from bbfast.defenses.mitigation.i_bau import IBAUConfig, ImplicitUnlearning
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DivergedError
from bbfast.models import build
from bbfast.training import Recipe, train
from bbfast.training.program import derive_seed

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
    padding=2,
    channels_last=False,
    eval_every=0,
    deterministic=True,
)


def net() -> nn.Module:
    torch.manual_seed(3)
    return build("small_cnn", 4, (12, 12)).eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("form", ["double_backward", "jvp"])
def test_the_gradient_of_a_quadratic_problem(form: str) -> None:
    """L_in = d A d / 2 - d B t, so d*(t) = A^-1 B t; L_out = c d* + e t, with gradient e + B' A^-1 c."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(3, 3, generator=g, dtype=torch.float64)
    a = half @ half.T + torch.eye(3, dtype=torch.float64)
    b, c = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 2), (3,)))
    e = torch.randn(2, generator=g, dtype=torch.float64)
    theta, delta = torch.randn(2, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)

    def inner(values: dict[str, Tensor], d: Tensor) -> Tensor:
        return d @ a @ d / 2 - d @ b @ values["t"]

    lr, errors = 0.1, []
    exact = e + b.T @ torch.linalg.solve(a, c)
    for steps in (0, 1, 5, 50, 300):
        if form == "jvp":
            product, mixed = jvp_products(inner, delta, {"t": theta})
        else:
            leaf, t = delta.clone().requires_grad_(), theta.clone().requires_grad_()
            product, mixed = double_backward_products(inner({"t": t}, leaf), leaf, [t])
        v = fixed_point(product, c, steps, lr, 0.0)
        part = mixed(v)[0]
        assert part is not None
        errors.append(float((e - lr * part - exact).norm()))
    assert errors[2] > errors[3] > errors[4] and errors[4] < 1e-9
    # K = 1: v is the outer gradient itself.
    one_step = e + lr * b.T @ c
    assert errors[1] == pytest.approx(float((one_step - exact).norm()))


def test_the_fixed_point_stops() -> None:
    calls: list[int] = []

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return 10 * v

    v = fixed_point(product, torch.ones(2), 50, 0.1, 1e-10)
    # v <- v - 0.1 * 10 v + 1 is constant from the first iterate on.
    assert torch.equal(v, torch.ones(2)) and len(calls) == 1
    assert torch.equal(fixed_point(product, torch.zeros(2), 50, 0.1, 1e-10), torch.zeros(2)) and len(calls) == 1


def reference(model: nn.Module, images: ImageSet, config: IBAUConfig, recipe: Recipe, seed: int) -> None:
    """I-BAU as it is written down, without shortcuts."""
    loader = BatchLoader(images, 16, seed=derive_seed("i_bau", seed), padding=2, merge_single=True)
    stored, parameters = list(loader.epoch(0)), list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, amsgrad=True)
    for round_ in range(config.rounds):
        delta = torch.zeros(1, *images.image_size)
        for batch in loader.epoch(round_ + 1):
            guess = model(batch.x).argmax(1)
            delta.requires_grad_()
            loss = -F.cross_entropy(model(batch.x + delta), guess) + config.reg * delta.norm() ** 2
            delta = (delta - config.pert_lr * torch.autograd.grad(loss, delta)[0]).detach()
        for step, batch in enumerate(stored):
            count = int(config.portion * len(batch))
            g = torch.Generator().manual_seed(derive_seed("carriers", seed, round_, step))
            mask = torch.zeros(len(batch), 1, 1, 1)
            mask[torch.randperm(len(batch), generator=g)[:count]] = 1
            d = delta.clone().requires_grad_()
            outer = F.cross_entropy(model(batch.x + mask * d), batch.y)
            gout, *gtheta = torch.autograd.grad(outer, [d, *parameters])
            first = stored[0]
            phi = (
                d
                - config.inner_lr
                * torch.autograd.grad(
                    -F.cross_entropy(model(first.x + d), first.y) + config.reg * d.norm() ** 2, d, create_graph=True
                )[0]
            )
            v = torch.zeros_like(d)
            for _ in range(config.hyper_steps):
                v = torch.autograd.grad(phi, d, v, retain_graph=True)[0] + gout
            parts = torch.autograd.grad(phi, parameters, v, allow_unused=True)
            for p, direct, part in zip(parameters, gtheta, parts, strict=True):
                p.grad = direct if part is None else direct + part
            optimizer.step()


@pytest.mark.parametrize("form", ["double_backward", "jvp"])
def test_it_is_the_plain_loop(toy_images: MakeImages, form: str) -> None:
    """The returned weights, with and without the shortcuts, in double so that only the order of sums differs."""
    images, one, other = toy_images(40, 4), net(), net()
    config = IBAUConfig(rounds=2, portion=0.2, pert_lr=1.0, hvp=form, reg=0.01)
    done = train(one, images, RECIPE, program=ImplicitUnlearning(config), device="cpu", progress=False)
    reference(other, images, config, RECIPE, 0)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=name)
    assert not same_state(one, net())
    assert all(row["delta_norm"] > 0 and 0 <= row["fooled"] <= 1 for row in done.history)


def test_both_forms_agree_on_a_network(toy_images: MakeImages) -> None:
    grads: list[dict[str, Tensor]] = []

    class Caught(ImplicitUnlearning):
        def after_backward(self, model: nn.Module) -> None:
            super().after_backward(model)
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    for form in ("double_backward", "jvp"):
        config = IBAUConfig(rounds=1, portion=0.2, pert_lr=1.0, hvp=form)
        recipe = RECIPE.replace(epochs=1, batch_size=40)
        train(net(), toy_images(40, 4), recipe, program=Caught(config), device="cpu", progress=False)
    scale = max(float(g.abs().max()) for g in grads[0].values())
    for name, a in grads[0].items():
        assert float((a - grads[1][name]).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("settings", [{"portion": 0.0}, {"portion": 0.01}, {"hyper_steps": 0, "portion": 0.0}])
def test_without_carriers_it_is_fine_tuning_in_eval_mode(toy_images: MakeImages, settings: dict[str, Any]) -> None:
    """portion 0.01 of 16 images is none: a clean step, as in the reference."""
    images, one, other = toy_images(40, 4), net(), net()
    train(one, images, RECIPE, program=ImplicitUnlearning(IBAUConfig(**settings)), device="cpu", progress=False)
    optimizer = torch.optim.Adam(other.parameters(), lr=RECIPE.lr, amsgrad=True)
    stored = list(BatchLoader(images, 16, seed=derive_seed("i_bau", 0), padding=2, merge_single=True).epoch(0))
    for _ in range(2):
        for batch in stored:
            optimizer.zero_grad()
            F.cross_entropy(other(batch.x), batch.y).backward()
            optimizer.step()
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_the_statistics_stay(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    model = toy_attack().model
    view = toy_view(model, clean=toy_images(40, 4), progress=False)
    result = defenses.create("i_bau", rounds=1, portion=0.2).run(view)
    assert result.model is not None and not result.model.training
    for name, value in result.model.named_buffers():
        assert torch.equal(value, dict(model.named_buffers())[name]), name
    assert result.info["perturbed_samples_a_batch"] == 3
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_pixel_space_is_a_change_of_units(toy_images: MakeImages) -> None:
    images, norms = toy_images(40, 4), []
    for pixel in (False, True):
        config = IBAUConfig(rounds=1, pixel_space=pixel, reg=0.0, pert_lr=1e-3)
        history = train(
            net(), images, RECIPE.replace(epochs=1), program=ImplicitUnlearning(config), device="cpu", progress=False
        ).history
        norms.append(history[0]["delta_norm"])
    # The gradient by a pixel is the one by a normalised value over std (0.2 to 0.3 here).
    assert 1 / 0.3 - 0.1 <= norms[1] / norms[0] <= 1 / 0.2 + 0.1


def test_settings() -> None:
    config = IBAUConfig()
    assert (config.rounds, config.hyper_steps, config.pert_lr, config.inner_lr) == (5, 5, 10, 0.1)
    assert (config.reg, config.portion, config.lr, config.tol) == (1e-3, 0.01, 1e-4, 1e-10)
    assert IBAUConfig(preset="paper").lr == 1e-3
    with pytest.raises(ConfigError, match="portion"):
        defenses.create("i_bau", portion=1.5)
    assert defenses.create("i-bau").name == "i_bau"


def test_a_perturbation_that_explodes_is_named(
    toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack
) -> None:
    view = toy_view(toy_attack().model, clean=toy_images(40, 4), progress=False)
    with pytest.raises(DivergedError, match=r"the training loss became .* lower pert_lr \(now 1e\+30\)"):
        defenses.create("i_bau", pert_lr=1e30, portion=0.2).run(view)


def test_a_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None]) -> None:
    killed_goes_on(defenses.create("i_bau", rounds=3, portion=0.2), toy_attack(), ImplicitUnlearning)


@pytest.mark.parametrize(
    "architecture",
    ["preactresnet18", *(pytest.param(a, marks=pytest.mark.slow) for a in ("vgg19_bn", "convnext_tiny", "vit_b_16"))],
)
@pytest.mark.parametrize("form", ["double_backward", "jvp"])
def test_every_network_can_be_differentiated_twice(architecture: str, form: str) -> None:
    """ViT's fused attention has no second derivative; the block switches it off."""
    torch.manual_seed(0)
    model = build(architecture, 4, (32, 32)).eval()
    x, y, delta = torch.randn(1, 3, 32, 32), torch.tensor([1]), torch.zeros(1, 3, 32, 32)
    parameters = dict(model.named_parameters())

    def inner(values: dict[str, Tensor], d: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x + d,)), y)

    with twice_differentiable(model):
        if form == "jvp":
            product, mixed = jvp_products(inner, delta, parameters)
        else:
            leaf = delta.requires_grad_()
            product, mixed = double_backward_products(inner(parameters, leaf), leaf, list(parameters.values()))
        v = product(torch.randn(1, 3, 32, 32))
        assert v.isfinite().all() and float(v.abs().max()) > 0
        assert any(part is not None and float(part.abs().max()) > 0 for part in mixed(v))
