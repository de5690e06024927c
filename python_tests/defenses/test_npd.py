"""NPD: the layer inside the frozen model, how it is trained, and that it stays with the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import defenses, models
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses import DefenseResult
from bbfast.defenses.mitigation.npd import NPDConfig, Polarizing, Warmup, away_from, place
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DivergedError, UnsupportedModelError
from bbfast.training import Recipe, train

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
LAYER = "layer4.0.conv1"
RECIPE = Recipe(
    epochs=2,
    batch_size=16,
    lr=0.01,
    schedule="constant",
    precision="fp32",
    augment=False,
    channels_last=False,
    eval_every=0,
    deterministic=True,
)


def polarized() -> nn.Module:
    torch.manual_seed(3)
    model = models.build("small_cnn", 4, (12, 12)).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    models.add(model, "polarizer", layer=LAYER, channels=40)
    return model


@pytest.mark.parametrize(
    ("architecture", "layer", "adapted"),
    [
        ("preactresnet18", "layer4.1.conv1", False),
        ("small_cnn", LAYER, False),
        ("vgg19_bn", "features.49", True),
        ("convnext_tiny", "features.7.2", True),
        ("vit_b_16", "1.encoder.layers.encoder_layer_11", True),
    ],
)
def test_where_it_goes(architecture: str, layer: str, adapted: bool) -> None:
    with torch.device("meta"):
        model = models.build(architecture, 4, (32, 32))
    assert place(model, "last_block_conv1") == (layer, adapted)
    with pytest.raises(UnsupportedModelError, match="it has no layer 'layer9'"):
        place(model, "layer9")


def test_leaving_a_class() -> None:
    p = torch.tensor([[0.0, 1.0], [0.3, 0.7]])
    expected = [-math.log(1.0001 - 1.0), -math.log(1.0001 - 0.3)]
    torch.testing.assert_close(away_from(p, torch.tensor([1, 0])), torch.tensor(expected), rtol=1e-2, atol=1e-4)


def reference(model: nn.Module, images: ImageSet, config: NPDConfig, norms: list[float]) -> None:
    """The main phase as it is written down."""
    layer = model.get_submodule(f"{LAYER}.polarizer")
    optimizer = torch.optim.SGD(layer.parameters(), RECIPE.lr, momentum=0.9, weight_decay=RECIPE.weight_decay)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))
    for epoch in range(2):
        for batch in BatchLoader(images, 16, augment=False, merge_single=True).epoch(epoch):
            pixels, y = batch.x * std + mean, batch.y
            others = model(batch.x).detach().clone()
            others[torch.arange(len(batch)), y] = -math.inf
            t = others.argmax(1)
            delta = torch.zeros_like(pixels)
            for _ in range(config.inner_steps):
                delta.requires_grad_()
                z = model(((pixels + delta).clamp(0, 1) - mean) / std)
                if (z.argmax(1) == t).float().mean() > config.stop_rate:
                    break
                g = torch.autograd.grad(F.cross_entropy(z, t), delta)[0]
                delta = (delta - config.adv_lr * g.sign()).detach()
                for i in range(len(delta)):
                    delta[i] *= min(1.0, config.trigger_norm / max(float(delta[i].norm()), 1e-12))
            delta = delta.detach()
            norms += delta.flatten(1).norm(dim=1).tolist()
            z = model(batch.x)
            bad = model(((pixels + delta).clamp(0, 1) - mean) / std)
            p, order = bad.softmax(1), bad.argsort(1, descending=True)
            leave = torch.where(order[:, 0] == y, order[:, 1], order[:, 0])
            rows = torch.arange(len(y))
            a, b, c, d = config.lambdas
            loss = a * F.cross_entropy(z, y) + b * F.cross_entropy(bad, z.argmax(1))
            loss = loss - c * (1.0001 - p[rows, leave] + 1e-12).log().mean() - d * (1.0001 - p[rows, t]).log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_it_is_the_plain_loop(toy_images: MakeImages) -> None:
    images, one, other, norms = toy_images(40, 4), polarized(), polarized(), list[float]()
    config = NPDConfig(trigger_norm=1.0, inner_steps=3, stop_rate=1.0, lambdas=(1.0, 0.4, 0.3, 0.2))
    train(one, images, RECIPE, program=Polarizing(LAYER, config), device="cpu", progress=False)
    reference(other, images, config, norms)
    assert max(norms) <= 1 + 1e-5 and min(norms) > 0.9
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=name)
        assert torch.equal(a, polarized().state_dict()[name]) != name.endswith(("mix.weight", "bn.weight", "bn.bias"))


@pytest.mark.parametrize("settings", [{}, {"preset": "linf"}, {"sign": False, "adv_lr": 50.0}, {"stop_rate": 0.01}])
def test_perturbed_images_are_images(toy_images: MakeImages, settings: dict[str, object]) -> None:
    images, model, config = toy_images(16, 4), polarized(), NPDConfig(**settings)
    program = Polarizing(LAYER, config)
    program.start(model, images, RECIPE, 0, torch.device("cpu"))
    batch = next(iter(BatchLoader(images, 16, augment=False).epoch(0)))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))
    moved = program.search(model, batch, (batch.y + 1) % 4) * std + mean
    delta = moved - (batch.x * std + mean)
    assert moved.min() >= -1e-5 and moved.max() <= 1 + 1e-5
    size = delta.abs().max() if config.norm_type == "linf" else delta.flatten(1).norm(dim=1).max()
    assert 0 <= float(size) <= config.trigger_norm + 1e-4
    if "stop_rate" not in settings:
        assert float(size) > 0.1


def test_only_the_layer_is_trained_and_stays_with_the_result(toy_attack: MakeAttack, tmp_path: Path) -> None:
    """Regression: the reference stores the backdoored model, and loading that alone is no defense."""
    attack = toy_attack()
    attack.model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    defense = defenses.create("npd", warmup_epochs=1, epochs=2, lr=0.5)
    result = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    model = result.model
    assert model is not None and result.info["layer"] == LAYER and not result.info["adapted"]
    own, came = model.state_dict(), attack.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in came.items())
    weight = own[f"{LAYER}.polarizer.mix.weight"]
    assert not torch.equal(weight, torch.eye(len(weight)))
    assert int(own[f"{LAYER}.polarizer.bn.num_batches_tracked"]) == 4, "in the warm-up only: 60 images in 4 batches"
    assert [p.requires_grad for n, p in model.named_parameters() if "polarizer" not in n] == [
        p.requires_grad for p in attack.model.parameters()
    ]
    again = DefenseResult.load(result.save(tmp_path / "npd")).model
    x = torch.randn(4, 3, 12, 12)
    assert again is not None and torch.equal(again(x), model(x))
    assert not torch.allclose(again(x), attack.model(x), rtol=1e-3)
    with pytest.raises(ConfigError, match="has a polarizer already"):
        attack.model = model
        defenses.defend(defense, attack, 0.3, device="cpu", progress=False)


def test_without_training_it_is_the_model(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    defense = defenses.create("npd", warmup_epochs=0, epochs=0)
    result = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    x = torch.randn(8, 3, 12, 12)
    torch.testing.assert_close(result.model(x), attack.model(x), rtol=1e-4, atol=1e-5)  # type: ignore[misc]
    assert "poisoned_train" not in result.info["data_used"]


def test_modes_of_the_phases(toy_images: MakeImages) -> None:
    model, seen = polarized(), list[tuple[bool, bool]]()
    model.get_submodule(LAYER).register_forward_hook(
        lambda module, *_: seen.append((module.polarizer.training, model.layer1.training))  # type: ignore[union-attr, operator]
    )
    for program in (Warmup(LAYER), Polarizing(LAYER, NPDConfig(inner_steps=0))):
        seen.clear()
        train(model, toy_images(16, 4), RECIPE.replace(epochs=1), program=program, device="cpu", progress=False)
        assert seen[-1] == (program.warm, False)


def test_settings_and_errors(toy_images: MakeImages, toy_view: MakeView, toy_attack: MakeAttack) -> None:
    config = NPDConfig()
    assert (config.trigger_norm, config.lambdas, config.warmup_epochs, config.epochs) == (3, (1, 0.4, 0.4, 0.4), 5, 50)
    assert config.for_dataset("gtsrb").trigger_norm == 5 and config.for_dataset("cifar100").epochs == 100
    tiny = config.for_dataset("tiny_imagenet")
    assert (tiny.trigger_norm, tiny.lambdas, tiny.warmup_epochs, tiny.sign) == (6, (1, 1, 0.1, 0.1), 0, False)
    view = toy_view(toy_attack().model, clean=toy_images(40, 4), progress=False)
    assert config.recipe(view, 2500, 1, 0.1).batch_size == 128
    with pytest.raises(ConfigError, match="lambdas"):
        defenses.create("npd", lambdas=(0, 0, 0, 0))
    with pytest.raises(DivergedError, match=r"loss became .*lower adv_lr"):
        defenses.create("npd", lr=1e30, epochs=3).run(view)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    with pytest.raises(UnsupportedModelError, match="last convolution is not known"):
        defenses.create("npd").check(toy_view(plain, clean=toy_images(40, 4)))


def test_a_killed_run_goes_on(toy_attack: MakeAttack, killed_goes_on: Callable[..., None]) -> None:
    killed_goes_on(defenses.create("npd", warmup_epochs=1, epochs=3), toy_attack(), Polarizing)
