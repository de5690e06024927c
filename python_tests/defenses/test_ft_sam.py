"""FT-SAM: the ascent, the two passes of a step, and the reference's defects that must not come back."""

from __future__ import annotations

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
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._flat import FlatParameters
from bbfast.defenses.mitigation._sam import SharpnessAware, ascend, frozen_statistics, remove_gap
from bbfast.defenses.mitigation.ft_sam import FTSAMConfig
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError, DivergedError
from bbfast.models import build
from bbfast.training import Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, precision="fp32", padding=2, deterministic=True, eval_every=0)


def net() -> nn.Module:
    torch.manual_seed(3)
    return build("small_cnn", 4, (12, 12))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


def plain_loop(
    model: nn.Module, images: ImageSet, recipe: Recipe, rho: float, alpha: float, cosine: int | None
) -> None:
    """FT-SAM parameter by parameter with torch's optimiser, as a user would write it."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    loader = BatchLoader(images, recipe.batch_size, padding=recipe.padding, merge_single=True)
    parameters, step = list(model.parameters()), 0
    model.train()
    for epoch in range(recipe.epochs):
        for batch in loader.epoch(epoch):
            share = epoch / recipe.epochs if cosine is None else step / cosine
            optimizer.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * share)) / 2
            k, s = 4, recipe.label_smoothing * 3 / 4
            target = torch.full((len(batch), k), s / (k - 1)).scatter_(1, batch.y[:, None], 1 - s)

            def loss(x: Tensor = batch.x, target: Tensor = target) -> Tensor:
                return F.kl_div(F.log_softmax(model(x), 1), target, reduction="none").sum(1).mean()

            g = torch.autograd.grad(loss(), parameters)
            pairs = list(zip(parameters, g, strict=True))
            norm = math.sqrt(sum(float((p.detach().abs() * q).double().square().sum()) for p, q in pairs))
            kept = {key: value.clone() for key, value in model.state_dict().items()}
            with torch.no_grad():
                for p, q in pairs:
                    p += rho * p**2 * q / (norm + 1e-12)
            optimizer.zero_grad()
            loss().backward()
            model.load_state_dict(kept)
            if alpha:
                new = [p.grad for p in parameters]
                size = math.sqrt(sum(float(q.square().sum()) for q in new))
                inner = sum(float((p * q).sum()) for p, q in zip(g, new, strict=True))
                for old, q in zip(g, new, strict=True):
                    q -= alpha * (old - inner / size**2 * q)
            optimizer.step()
            step += 1
    model.eval()


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_ascent_on_a_quadratic(adaptive: bool) -> None:
    """l(w) = w A w / 2: the gradient is A w, and e follows in closed form."""
    torch.manual_seed(0)
    half = torch.randn(7, 7, dtype=torch.float64)
    a, w = half @ half.T, torch.randn(7, dtype=torch.float64)
    g = a @ w
    moved = w.clone()
    ascend(moved, g, 0.7, adaptive)
    scale = w.abs() if adaptive else torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(moved - w, 0.7 * scale**2 * g / (scale * g).norm())
    still = w.clone()
    ascend(still, torch.zeros(7, dtype=torch.float64), 0.7, adaptive)
    assert torch.equal(still, w), "no gradient, no step and no NaN"


def test_the_gap_is_the_part_across(toy_images: MakeImages) -> None:
    g = torch.tensor([3.0, 0.0, 0.0])
    remove_gap(g, torch.tensor([2.0, 5.0, -1.0]), 0.5)
    torch.testing.assert_close(g, torch.tensor([3.0, -2.5, 0.5]))


@pytest.mark.parametrize(("rho", "alpha", "cosine", "smoothing"), [(2.0, 0, None, 0.1), (1.0, 0.3, 7, 0.0)])
def test_it_is_the_plain_loop(
    toy_images: MakeImages, rho: float, alpha: float, cosine: int | None, smoothing: float
) -> None:
    """The flat form against a loop over the parameters, smoothing, decomposition and per-step cosine included."""
    images = toy_images(40, 4)
    recipe = RECIPE.replace(label_smoothing=smoothing * 4 / 3, channels_last=False)
    one, other = net(), net()
    program = SharpnessAware(rho, alpha=alpha, cosine_steps=cosine)
    train(one, images, recipe, program=program, device="cpu", progress=False)
    program.release()
    plain_loop(other, images, recipe, rho, alpha, cosine)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=name)
    assert not same_state(one, net())


@pytest.mark.parametrize("layout", [True, False])
def test_without_ascent_it_is_fine_tuning_bit_for_bit(toy_images: MakeImages, layout: bool) -> None:
    images, recipe = toy_images(40, 4), RECIPE.replace(channels_last=layout)
    one, other = net(), net()
    program = SharpnessAware(0.0)
    train(one, images, recipe, program=program, device="cpu", progress=False)
    train(other, images, recipe, device="cpu", progress=False)
    program.release()
    assert same_state(one, other)


def test_the_statistics_are_of_one_pass(toy_images: MakeImages) -> None:
    """Regression: with momentum 0 in the second pass the reference keeps counting num_batches_tracked."""
    images, recipe = toy_images(16, 4), RECIPE.replace(epochs=1, augment=False)
    one, other = net(), net()
    train(one, images, recipe, program=SharpnessAware(2.0), device="cpu", progress=False)
    x = next(iter(BatchLoader(images, 16, augment=False).epoch(0))).x
    other.train()(x)
    own, expected = dict(one.named_buffers()), dict(other.named_buffers())
    assert any("num_batches" in name for name in own)
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_statistics_end_with_the_block() -> None:
    model = net().train()
    before = [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(8, 3, 12, 12)
    with frozen_statistics(model):
        inside = model(x)
    assert int(model.layer1[0].bn1.num_batches_tracked) == 0  # type: ignore[index, union-attr]
    assert [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == before
    assert torch.equal(inside, model(x)), "by the batch's own statistics"
    with pytest.raises(RuntimeError, match="boom"), frozen_statistics(model):
        raise RuntimeError("boom")
    assert [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == before


def test_bf16_sees_the_moved_weights(toy_images: MakeImages) -> None:
    """Autocast caches the casts of the weights: the second pass must not run on those of the first."""
    losses: list[Tensor] = []

    class Watched(SharpnessAware):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            value, logits = super().loss(model, batch)
            losses.append(value.detach() - self._before)
            return value, logits

    recipe = RECIPE.replace(epochs=1, batch_size=40, precision="bf16", augment=False)
    train(net(), toy_images(40, 4), recipe, program=Watched(4.0), device="cpu", progress=False)
    assert float(losses[0]) > 0.05, "the loss at w + e is above the one at w"


def test_flat_parameters() -> None:
    model = net().to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    strides = [p.stride() for p in parameters]
    flat = FlatParameters(parameters)
    assert [p.stride() for p in parameters] == strides
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flat.values.numel() == sum(p.numel() for p in parameters)
    flat.values.mul_(2)
    assert torch.equal(parameters[0].detach(), 2 * next(iter(before.values())))
    out = flat.gather([None, *(torch.ones_like(p) for p in parameters[1:])], torch.full_like(flat.values, 7))
    assert float(out.sum()) == flat.values.numel() - parameters[0].numel()
    flat.release()
    flat.values.zero_()
    assert torch.equal(parameters[0].detach(), 2 * next(iter(before.values())))
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    with pytest.raises(ValueError, match="one dtype and device"):
        FlatParameters([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))])


def test_the_rate_falls_once(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    """Regression: stepped per batch, the reference's rate is 0 after 100 steps and rises again."""
    model = toy_attack().model
    view = toy_view(model, clean=toy_images(64, 4), progress=False)
    rates = [row["lr"] for row in defenses.create("ft_sam", epochs=30, batch_size=16).run(view).history]
    assert rates == sorted(rates, reverse=True) and rates[0] == 0.01
    view = toy_view(model, clean=toy_images(64, 4), progress=False)
    again = defenses.create("ft_sam", preset="reference", epochs=30, batch_size=16).run(view).history
    # Four steps an epoch: the last step of epoch e is number 4 e + 3.
    assert [row["lr"] for row in again] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * (4 * e + 3) / 100)) / 2 for e in range(30)]
    )
    assert again[29]["lr"] > again[24]["lr"]


def test_settings(toy_images: MakeImages, toy_view: MakeView) -> None:
    config = FTSAMConfig()
    assert (config.rho, config.adaptive, config.smoothing, config.epochs, config.stratified) == (
        2,
        True,
        0.1,
        100,
        True,
    )
    gtsrb, tiny = config.for_dataset("gtsrb"), config.for_dataset("tiny_imagenet")
    assert (gtsrb.rho, gtsrb.smoothing, gtsrb.epochs) == (8, 0, 50)
    assert (tiny.rho, tiny.smoothing, tiny.epochs, tiny.scheduler) == (8, 0, 100, "cosine")
    view = toy_view(clean=toy_images(40, 4))
    assert config.recipe(view, 40, 1, 0.1).label_smoothing == pytest.approx(0.4 / 3)
    with pytest.raises(ConfigError, match="iteration"):
        defenses.create("ft_sam", step_scheduler="iteration", scheduler="plateau")
    with pytest.raises(ConfigError, match="fp16"):
        defenses.create("ft_sam", amp="fp16")
    with pytest.raises(ConfigError, match=r"smoothing must be at most 0\.75 with 4 classes, got 0\.8"):
        defenses.create("ft_sam", smoothing=0.8).check(view)


def test_a_loss_that_explodes_is_named(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    view = toy_view(toy_attack().model, clean=toy_images(64, 4), progress=False)
    with pytest.raises(DivergedError, match=r"test, fine-tuning: .* in epoch .*lower lr .* or rho \(now 2\)"):
        defenses.create("ft_sam", lr=1e30, epochs=3).run(view)


def test_a_stratified_holdout(toy_attack: MakeAttack) -> None:
    result = defenses.defend(defenses.create("ft_sam", epochs=1), toy_attack(), 0.11, device="cpu", progress=False)
    assert result.config["clean"] == {"size": 20, "per_class": [5, 5, 5, 5]}
    assert set(result.history[0]) >= {"loss", "loss_before", "lr"}
    short = toy_attack()
    short.original_labels[short.original_labels == 3] = 2
    short.train.labels[short.train.labels == 3] = 2
    with pytest.raises(DataRequirementError, match="class 3 has"):
        defenses.defend("ft_sam", short, 0.5, device="cpu", progress=False)


def test_a_killed_run_goes_on(toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    defense = defenses.create("ft_sam", epochs=4)
    whole = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    plain = SharpnessAware.epoch_end

    def killed(self: SharpnessAware, epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SharpnessAware, "epoch_end", killed)
        defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    again = defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    assert same_state(whole.model, again.model)  # type: ignore[arg-type]
    assert [row["loss_before"] for row in whole.history] == [row["loss_before"] for row in again.history]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_can_be_captured_in_a_graph(toy_images: MakeImages) -> None:
    images, nets = toy_images(64, 4), [net(), net()]
    for model, graphs in zip(nets, (False, True), strict=True):
        program = SharpnessAware(2.0)
        train(model, images, RECIPE.replace(cuda_graphs=graphs), program=program, device="cuda", progress=False)
        program.release()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_it_repairs_the_digits(digits_attack: AttackResult) -> None:
    result = defenses.defend("ft_sam", digits_attack, device="cpu", progress=False)
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.05
    assert result.metrics["asr"] <= 0.15
    assert len({p.untyped_storage().data_ptr() for p in result.model.parameters()}) > 1  # type: ignore[union-attr]
