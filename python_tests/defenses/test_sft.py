"""SFT: the course of the learning rate, and that each step is taken at its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation.sft import SFTConfig, Triangles, triangle
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DivergedError
from bbfast.models import build
from bbfast.training import Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]


def test_closed_form() -> None:
    """The distance to the nearest multiple of 20, in tenths."""
    for i in range(200):
        r = abs((i + 10) % 20 - 10) / 10
        assert triangle(i, 0.03, 2.5) == pytest.approx(0.03 + 2.47 * r), i
    trace = torch.tensor([triangle(i, 0.03, 2.5) for i in range(100)])
    assert torch.equal(torch.nonzero(trace >= 2.5 - 1e-6).flatten() % 20, torch.full((5,), 10))
    assert torch.equal(torch.nonzero(trace <= 0.03 + 1e-6).flatten() % 20, torch.zeros(5, dtype=torch.long))
    uneven = [triangle(i, 1.0, 3.0, up=2, down=4) for i in range(8)]
    assert uneven == [1.0, 2.0, 3.0, 2.5, 2.0, 1.5, 1.0, 2.0]


def test_every_step_has_its_rate_and_the_phase_its_peak(toy_images: MakeImages) -> None:
    """Regression: the toolbox sets the rate after the step, so step i has that of i - 1."""
    images = toy_images(40, 4)
    config = SFTConfig(epochs=9, first_phase=5, lr_base=0.001, lr_first=0.05, lr_second=0.01)
    recipe = Recipe(
        epochs=9,
        batch_size=16,
        lr=0.001,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        precision="fp32",
        augment=False,
        channels_last=False,
        eval_every=0,
        deterministic=True,
    )
    torch.manual_seed(0)
    one = build("small_cnn", 4, 12)
    torch.manual_seed(0)
    other = build("small_cnn", 4, 12)
    history = train(one, images, recipe, program=Triangles(config), device="cpu", progress=False).history
    rates, step = [], 0
    other.train()
    for epoch in range(9):
        for batch in BatchLoader(images, 16, augment=False, merge_single=True).epoch(epoch):
            rates.append(0.001 + (0.049 if epoch < 5 else 0.009) * min(step % 20, 20 - step % 20) / 10)
            loss = nn.functional.cross_entropy(other(batch.x), batch.y)
            gradients = torch.autograd.grad(loss, list(other.parameters()))
            with torch.no_grad():
                for p, g in zip(other.parameters(), gradients, strict=True):
                    p -= rates[-1] * g
            step += 1
    assert [row["lr"] for row in history] == pytest.approx(rates[2::3]) and max(rates) == pytest.approx(0.05)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_settings(toy_view: MakeView, toy_images: MakeImages) -> None:
    view = toy_view(clean=toy_images(40, 4))
    recipe = SFTConfig().recipe(view, 2500)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay, recipe.epochs) == (128, 0.0, 0.0, 100)
    assert (recipe.lr, recipe.schedule, recipe.optimizer, recipe.padding) == (0.03, "constant", "sgd", 2)
    assert SFTConfig().recipe(view, 72).batch_size == 16
    assert SFTConfig(preset="paper").recipe(view, 72).batch_size == 128
    assert SFTConfig(preset="low_rate").lr_first == 0.25
    with pytest.raises(ConfigError, match="lr_first and lr_second must be at least lr_base"):
        defenses.create("sft", lr_second=0.01)


def test_divergence_names_the_peak(toy_attack: MakeAttack) -> None:
    defense = defenses.create("sft", epochs=30, lr_first=1e30)
    with pytest.raises(DivergedError, match=r"sft, fine-tuning: the training .*lower lr_first \(now 1e\+30"):
        defenses.defend(defense, toy_attack(), 0.3, device="cpu", progress=False)


def test_no_epoch_changes_no_bit(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    result = defenses.defend(defenses.create("sft", epochs=0), attack, 0.2, device="cpu")
    state = attack.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in result.model.state_dict().items())  # type: ignore[union-attr]


def test_a_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None]) -> None:
    killed_goes_on(defenses.create("sft", epochs=4, first_phase=2, lr_first=0.1), toy_attack(), Triangles)
