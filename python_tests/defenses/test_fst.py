"""FST: the fresh classifier, its norm, and the push away from the old one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation.fst import FSTConfig, Shift, classifier_of, redraw
from bbfast.defenses.view import DefenderView
from bbfast.errors import DivergedError, UnsupportedModelError
from bbfast.models import build
from bbfast.training import Program, Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    lr=0.02,
    weight_decay=0.0,
    precision="fp32",
    augment=False,
    channels_last=False,
    eval_every=0,
    deterministic=True,
)


def fresh(classes: int = 4) -> nn.Module:
    torch.manual_seed(2)
    return build("small_cnn", classes, 12)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_it_is_the_plain_loop(toy_images: MakeImages, alpha: float) -> None:
    """With alpha 0 that is fine-tuning from a fresh classifier, its norm held."""
    images, one, other = toy_images(40, 4), fresh(), fresh()
    old = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    train(one, images, RECIPE, program=Shift("linear", old, alpha), device="cpu", progress=False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.02, momentum=0.9)
    other.train()
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for batch in BatchLoader(images, 16, augment=False, merge_single=True).epoch(epoch):
            loss = nn.functional.cross_entropy(other(batch.x), batch.y)
            if alpha:
                loss = loss + alpha * torch.trace(other.linear.weight @ old.T)  # type: ignore[union-attr, operator]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                other.linear.weight *= old.norm() / other.linear.weight.norm()  # type: ignore[operator, union-attr]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_the_norm_is_held_after_every_step(toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms, plain = fresh(), list[Tensor](), Shift.after_step
    old = model.linear.weight.detach().clone()  # type: ignore[union-attr, operator]

    def noted(self: Shift, net: nn.Module) -> None:
        plain(self, net)
        norms.append(net.linear.weight.detach().norm())  # type: ignore[union-attr, operator]

    monkeypatch.setattr(Shift, "after_step", noted)
    history = train(model, toy_images(40, 4), RECIPE, program=Shift("linear", old, 5.0), device="cpu").history
    assert len(norms) == 9
    torch.testing.assert_close(torch.stack(norms), old.norm().expand(9), rtol=1e-5, atol=0)
    assert history[-1]["cosine_to_old"] < history[0]["cosine_to_old"] < 1


def test_redraw() -> None:
    layer = nn.Linear(400, 30)
    bias = layer.bias.detach().clone()
    redraw(layer, torch.Generator().manual_seed(0), bias=False)
    assert torch.equal(layer.bias, bias) and layer.weight.abs().max() <= 0.05
    assert float(layer.weight.detach().std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    redraw(layer, torch.Generator().manual_seed(7))
    assert not torch.equal(layer.bias, bias) and layer.bias.abs().max() <= 0.05


def test_result_and_seed(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    defense = defenses.create("fst", epochs=3)
    one, two, other = (defenses.defend(defense, attack, 0.3, s, "cpu", progress=False) for s in (0, 0, 1))
    states = [r.model.state_dict() for r in (one, two, other)]  # type: ignore[union-attr]
    assert states[0].keys() == attack.model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["linear.weight"], states[2]["linear.weight"])
    norms = [s["linear.weight"].norm() for s in (states[0], attack.model.state_dict())]
    torch.testing.assert_close(norms[0], norms[1])
    assert one.info["classifier"] == "linear" and abs(one.info["cosine_to_old"]) < 0.9
    none = defenses.defend(defenses.create("fst", epochs=0), attack, 0.3, device="cpu")
    assert torch.equal(none.model.linear.weight, attack.model.linear.weight)  # type: ignore[union-attr, arg-type]


def test_settings_and_errors(toy_view: MakeView, toy_images: MakeImages, toy_attack: MakeAttack) -> None:
    view = toy_view(clean=toy_images(40, 4))
    recipe = FSTConfig().recipe(view, 2500)
    assert (recipe.batch_size, recipe.lr, recipe.augment, recipe.epochs) == (256, 0.01, False, 100)
    paper = FSTConfig(preset="paper")
    assert (paper.alpha, paper.epochs, paper.recipe(view, 1000).batch_size) == (0.2, 10, 128)
    assert FSTConfig().for_dataset("tiny_imagenet").alpha == FSTConfig().for_dataset("cifar100").lr == 0.001
    bare = nn.Sequential(nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="fst cannot work on Sequential: it has no final Linear layer"):
        defenses.create("fst").check(toy_view(bare, clean=toy_images(8, 4)))
    with torch.device("meta"):
        vgg = build("vgg19_bn", 4, 32)
    assert classifier_of(vgg)[0] == "classifier.6"
    with pytest.raises(DivergedError, match=r"fst, tuning: the training loss became .*lower alpha \(now 0\.2\)"):
        defenses.defend(defenses.create("fst", lr=1e30, epochs=3), toy_attack(), 0.3, device="cpu", progress=False)


def test_a_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None]) -> None:
    killed_goes_on(defenses.create("fst", epochs=4), toy_attack(), Shift)
    assert issubclass(Shift, Program) and Shift.graph_safe
