"""BTI-DBF: the split of a model, the losses of its trainings against formulas, both variants, and going on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import defenses, models
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader
from bbfast.defenses import DefenseResult
from bbfast.defenses.mitigation._bti_programs import Identity, Inversion, Purification, Unlearning, with_triggers
from bbfast.defenses.mitigation._split import Split, first_layer, split_layer
from bbfast.defenses.mitigation.bti_dbf import BTIDBFConfig, benign_mask
from bbfast.defenses.view import DefenderView
from bbfast.errors import DivergedError, UnsupportedModelError
from bbfast.models._unet import UNet, depth_for

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
QUICK: dict[str, Any] = {
    "width": 4,
    "pretrain_epochs": 1,
    "rounds": 2,
    "mask_epochs": 2,
    "invert_epochs": 2,
    "repair_epochs": 2,
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return models.build("small_cnn", 4, 12).eval().requires_grad_(False)


def batch_of(n: int = 8) -> Batch:
    g = torch.Generator().manual_seed(4)
    return Batch(torch.randn(n, 3, 12, 12, generator=g), torch.arange(n) % 4, torch.arange(n))


def started(program: Any, images: ImageSet) -> Any:
    program.train, program.seed = images, 5
    program.epoch_start(0, 1, 8)
    return program


class TestUNet:
    @pytest.mark.parametrize("size", [(32, 32), (12, 12), (15, 22), (3, 3)])
    def test_shape_and_independence(self, size: tuple[int, int]) -> None:
        depth = depth_for(*size, 4)
        g = UNet(3, 4, depth)
        x = torch.randn(5, 3, *size)
        y = g(x)
        assert y.shape == x.shape and (depth == 0 or min(size) >> depth >= 2)
        torch.testing.assert_close(g(x[2:3]), y[2:3], rtol=1e-4, atol=1e-5)
        assert [depth_for(s, s, 4) for s in (3, 8, 12, 32, 64)] == [0, 2, 2, 4, 4]

    def test_widths(self) -> None:
        """Base 32 and 4 blocks end at 512 channels in the bottleneck."""
        with torch.device("meta"):
            g = UNet()
        shapes = [tuple(block.conv1.weight.shape[:2]) for block in [*g.down, g.bottom, *g.merge]]  # type: ignore[union-attr]
        assert shapes == [
            (32, 3),
            (64, 32),
            (128, 64),
            (256, 128),
            (512, 256),
            (256, 512),
            (128, 256),
            (64, 128),
            (32, 64),
        ]


class TestSplit:
    @pytest.mark.parametrize("name", ["small_cnn", pytest.param("vit_b_16", marks=pytest.mark.slow)])
    def test_halves(self, name: str) -> None:
        torch.manual_seed(0)
        model = models.build(name, 4, 32).eval()
        split = Split(model, split_layer(model, "m"))
        ran: list[int] = []
        models.roles(model).module("classifier").register_forward_hook(lambda *_: ran.append(1))
        x = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            expected, logits = models.features(model, x, "stage4", with_logits=True)
            ran.clear()
            assert torch.equal(split.features(x), expected) and not ran
            z, same = split.both(x)
            assert torch.equal(z, expected) and torch.equal(same, logits)
            _, doubled = split.both(x, lambda z: torch.cat([z, 2 * z[:1]]))
        assert doubled.shape == (4, 4)
        torch.testing.assert_close(doubled[:3], logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "layer", "first"),
        [
            ("preactresnet18", "layer4", "conv1"),
            ("vgg19_bn", "features.52", "features.0"),
            ("convnext_tiny", "features.7", "features.0.0"),
        ],
    )
    def test_places(self, name: str, layer: str, first: str) -> None:
        with torch.device("meta"):
            model = models.build(name, 4, 32)
        assert split_layer(model, "m") == layer
        assert first_layer(model, "m", (3, 32, 32)) == first
        assert split_layer(model, "m", layer) == layer
        assert split_layer(model, "m", "stage2") == models.roles(model).names("stage2")[0]
        with pytest.raises(UnsupportedModelError, match="it has no layer 'nowhere'"):
            split_layer(model, "m", "nowhere")

    def test_refusals(self) -> None:
        plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        with pytest.raises(UnsupportedModelError, match="its stages are not known"):
            split_layer(plain, "m")
        assert first_layer(plain, "m", (3, 2, 2)) == "0"


def test_the_mask_is_that_of_a_plain_loop(toy_images: MakeImages) -> None:
    model, images = net(), toy_images(40, 4)
    loader = BatchLoader(images, 16, seed=3, augment=False)
    found = benign_mask(Split(model, "layer4"), loader, 3, 0.05, torch.Generator().manual_seed(8))
    raw = torch.randn(1, 64, 2, 2, generator=torch.Generator().manual_seed(8)).requires_grad_()
    adam = torch.optim.Adam([raw], lr=0.05)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            z, m = model.layer4(model.layer3(model.layer2(model.layer1(model.conv1(batch.x))))), raw.tanh() / 2 + 0.5  # type: ignore[operator, union-attr]
            good, bad = (model.linear(part.mean((2, 3))) for part in (m * z, (1 - m) * z))  # type: ignore[operator]
            adam.zero_grad()
            (F.cross_entropy(good, batch.y) - F.cross_entropy(bad, batch.y)).backward()
            adam.step()
    torch.testing.assert_close(found, (raw.tanh() / 2 + 0.5).detach(), rtol=0, atol=1e-3)
    assert found.min() >= 0 and found.max() <= 1


def test_identity_loss(toy_images: MakeImages) -> None:
    model, g, batch = net(), UNet(3, 4, 2), batch_of()
    value, _ = started(Identity(Split(model, "layer4")), toy_images(8, 4)).loss(g, batch)
    made = g(batch.x)
    z, z_made = (models.features(model, x, "stage4") for x in (batch.x, made))
    soft = -(model(batch.x).softmax(1) * model(made).log_softmax(1)).sum(1).mean()
    image = (made - batch.x).square().mean()
    assert float(image.detach()) > 0.1
    torch.testing.assert_close(value, soft + (z - z_made).square().mean() + 100 * image)


@pytest.mark.parametrize(("image", "feature", "inside"), [(9.0, 9.0, True), (1e-3, 9.0, False), (9.0, 1e-9, False)])
@pytest.mark.parametrize("target", [None, 2])
def test_inversion_loss(toy_images: MakeImages, image: float, feature: float, inside: bool, target: int | None) -> None:
    model, g, purifier, batch = net(), UNet(3, 4, 2), UNet(3, 4, 1), batch_of()
    mask = torch.rand(1, 64, 2, 2)
    split = Split(model, "layer4")
    program = Inversion(split, mask, target, purifier, image_bound=image, feature_bound=feature, adam={})
    value, _ = started(program, toy_images(8, 4)).loss(g, batch)
    made = purifier(g(batch.x))
    change = models.features(model, made, "stage4") - models.features(model, batch.x, "stage4")
    if inside:
        expected = 0.01 * (mask * change).square().mean() - ((1 - mask) * change).square().mean()
    else:
        expected = (made - batch.x).square().mean()
    if target is not None:
        expected = expected - model(made).log_softmax(1)[:, target].mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_repair_losses(toy_images: MakeImages) -> None:
    model, g, purifier, batch, images = net(), UNet(3, 4, 2), UNet(3, 4, 1), batch_of(11), toy_images(8, 4)
    mixed = with_triggers(batch, g, 0.1, 5)
    changed = (mixed != batch.x).flatten(1).any(1)
    assert int(changed.sum()) == 2, "int(0.1 * 11) + 1"
    torch.testing.assert_close(mixed[changed], g(batch.x[changed]), rtol=1e-4, atol=1e-5)
    assert (with_triggers(batch, g, 1.0, 5) != batch.x).flatten(1).any(1).all()
    one = copy.deepcopy(model).train()
    value, logits = started(Unlearning("layer4", g, 0.1, {}), images).loss(one, batch)
    other = copy.deepcopy(model).train()
    z = models.features(other, batch.x, "stage4")
    z_mixed, expected = models.features(other, mixed, "stage4", with_logits=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, F.cross_entropy(expected, batch.y) + F.mse_loss(z, z_mixed), rtol=1e-4, atol=1e-5)
    for bound, weight in ((9.0, 1.0), (1e-4, 100.0)):
        program = Purification(Split(model, "layer4"), g, share=0.1, noise=0.0, image_bound=bound, adam={})
        value, _ = started(program, images).loss(purifier, batch)
        made = purifier(mixed)
        z_made, logits = models.features(model, made, "stage4", with_logits=True)
        terms = F.cross_entropy(logits, batch.y) + F.mse_loss(z_made, models.features(model, batch.x, "stage4"))
        torch.testing.assert_close(value, terms + weight * F.mse_loss(made, batch.x), rtol=1e-4, atol=1e-5)


def test_unlearning_keeps_the_models_form(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    frozen = next(attack.model.parameters())
    frozen.requires_grad_(False)
    result = defenses.defend(defenses.create("bti_dbf", **QUICK), attack, 0.3, device="cpu", progress=False)
    assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()
    assert not any(torch.equal(a, b) for a, b in zip(result.model.parameters(), attack.model.parameters(), strict=True))
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in attack.model.parameters()]
    assert result.verdict["backdoored"] is None and len(result.verdict["targets"]) == 1
    assert result.info["layer"] == "layer4" and result.info["generator"] == [4, 2]
    phases = ["identity", *(f"{what}-{turn}" for turn in range(2) for what in ("inversion", "unlearning"))]
    assert list(dict.fromkeys(row["phase"] for row in result.history)) == phases
    none = defenses.defend(defenses.create("bti_dbf", rounds=0), attack, 0.3, device="cpu")
    assert all(torch.equal(v, attack.model.state_dict()[k]) for k, v in none.model.state_dict().items())  # type: ignore[union-attr]


def test_the_purifier_stays_with_the_result(toy_attack: MakeAttack, tmp_path: Path) -> None:
    attack = toy_attack()
    defense = defenses.create("bti_dbf", variant="purifier", **QUICK)
    result = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    model = result.model
    assert model is not None and result.info["purifier"] == "conv1.purifier"
    came = attack.model.state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in came.items())
    x = torch.randn(4, 3, 12, 12)
    purified = model.conv1.purifier(x)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(x), attack.model(purified), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), attack.model(x), rtol=1e-3)
    again = DefenseResult.load(result.save(tmp_path / "p")).model
    assert again is not None and torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(ValueError, match="'conv1' has a purifier already"):
        models.add(model, "purifier", layer="conv1", channels=3, width=4, depth=1)


@pytest.mark.parametrize("name", ["vgg19_bn", "vit_b_16"])
def test_a_purifier_in_front_of_other_networks(name: str) -> None:
    """Inside containers a further child would become a link of the chain."""
    with torch.device("meta"):
        model = models.build(name, 4, 32).eval()
        keys = model.state_dict().keys()
        layer = "0" if name == "vit_b_16" else first_layer(model, "m", (3, 32, 32))
        models.add(model, "purifier", layer=layer, channels=3, width=2, depth=1)
        added = model.state_dict().keys() - keys
    assert added and all(key.startswith(f"{layer}.purifier.") for key in added)
    if name == "vgg19_bn":
        assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 4)


@pytest.mark.parametrize(("variant", "program"), [("unlearning", Unlearning), ("purifier", Purification)])
def test_a_killed_run_goes_on(
    toy_attack: MakeAttack, killed_goes_on: Callable[..., None], variant: str, program: Any
) -> None:
    killed_goes_on(defenses.create("bti_dbf", variant=variant, **QUICK), toy_attack(), program)


def test_settings_and_errors(toy_view: MakeView, toy_images: MakeImages, toy_attack: MakeAttack) -> None:
    view = toy_view(net(), clean=toy_images(40, 4), progress=False)
    recipe = BTIDBFConfig().recipe(view, 2500, 7, 0.5)
    assert (recipe.batch_size, recipe.epochs, recipe.lr, recipe.optimizer) == (128, 7, 0.5, "adam")
    assert BTIDBFConfig(amp="off").recipe(view, 72, 1, 0.1).precision == "fp32"
    with pytest.raises(UnsupportedModelError, match=r"bti_dbf cannot work on .* it has no layer"):
        defenses.create("bti_dbf", layer="layer9").check(view)
    broken = net()
    with torch.no_grad():
        broken.linear.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    view = toy_view(broken, clean=toy_images(20, 4), progress=False)
    with pytest.raises(DivergedError, match=r"test, .*: the training loss became nan.*lower generator_lr \(now 0\.0"):
        defenses.create("bti_dbf", **QUICK).run(view)
    with pytest.raises(DivergedError, match=r"the mask's loss is not finite in epoch 0; lower mask_lr \(now 0\.01\)"):
        defenses.create("bti_dbf", **{**QUICK, "pretrain_epochs": 0}).run(view)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["unlearning", "purifier"])
def test_on_the_digits(digits_attack: AttackResult, variant: str) -> None:
    """The detected target is the true one, and the backdoor is gone."""
    result = defenses.defend(defenses.create("bti_dbf", variant=variant), digits_attack, device="cpu", progress=False)
    assert result.metrics["target_found"] == 1.0
    assert result.metrics["asr"] <= 0.15
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.05
