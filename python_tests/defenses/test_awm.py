"""AWM: the rounds against a loop written out, the range of the clipping, and the folding of the masks."""

from __future__ import annotations

import copy
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
from bbfast.data.normalize import denormalize
from bbfast.defenses.mitigation import _keep, awm
from bbfast.defenses.mitigation._masks import random_batches
from bbfast.defenses.mitigation.awm import AWMConfig, masked_layers
from bbfast.defenses.view import DefenderView
from bbfast.errors import DivergedError, UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
QUICK: dict[str, Any] = {"outer_rounds": 3, "inner": 2, "batch_size": 16}


def net() -> nn.Module:
    torch.manual_seed(1)
    model = build("small_cnn", 4, 12).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def by_hand(model: nn.Module, images: ImageSet, seed: int, config: AWMConfig) -> list[Tensor]:
    """The same rounds on one image kind at a time, the masked weights written into a network of its own."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    convs = [m for m in reference.modules() if isinstance(m, nn.Conv2d)]
    weights = [m.weight.clone() for m in convs]
    masks = [torch.ones_like(w, requires_grad=True) for w in weights]
    for conv in convs:
        del conv._parameters["weight"]
    adam = torch.optim.Adam(masks, lr=config.mask_lr)

    def logits(x: Tensor) -> Tensor:
        for conv, w, m in zip(convs, weights, masks, strict=True):
            conv.weight = w * m  # type: ignore[assignment]
        out: Tensor = reference(x)
        return out

    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))
    steps = config.inner * -(-len(images) // config.batch_size)
    for turn in range(config.outer_rounds):
        delta = torch.zeros(1, *images.image_size, requires_grad=True)
        sgd = torch.optim.SGD([delta], lr=config.pert_lr)
        for batch in random_batches(images, config.batch_size, steps, seed=seed, block=2 * turn, padding=2):
            sgd.zero_grad()
            (-F.cross_entropy(logits(batch.x + delta), logits(batch.x).argmax(1))).backward()
            sgd.step()
        size = float(delta.detach().abs().sum())
        delta = delta.detach() * min(1.0, config.trigger_norm / size)
        for batch in random_batches(images, config.batch_size, steps, seed=seed, block=2 * turn + 1, padding=2):
            pixels = ((batch.x + delta) * std + mean).clamp(0, 1)
            adam.zero_grad()
            loss = config.alpha * F.cross_entropy(logits(batch.x), batch.y)
            loss = loss + (1 - config.alpha) * F.cross_entropy(logits((pixels - mean) / std), batch.y)
            (loss + config.gamma * sum(m.abs().sum() for m in masks)).backward()
            adam.step()
            with torch.no_grad():
                for m in masks:
                    m.clamp_(0, 1)
    return [(w * m).detach() for w, m in zip(weights, masks, strict=True)]


def test_the_folded_weights_are_those_of_a_loop(toy_view: MakeView, toy_images: MakeImages) -> None:
    images, model = toy_images(40, 4), net()
    view = toy_view(model, clean=images, progress=False)
    # Adam turns rounding noise of vanishing gradients into whole steps: a large gamma gives every mask a gradient.
    config = AWMConfig(**QUICK, gamma=1e-3, trigger_norm=50.0)
    result = defenses.create("awm", **QUICK, gamma=1e-3, trigger_norm=50.0).run(view)
    expected = by_hand(model, images, view.derive_seed("masks"), config)
    assert result.model is not None
    found = [m.weight for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).abs() > 1e-4).float().mean() < 0.01
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)
    assert len(result.history) == 3
    assert all(row["perturbation_l1"] <= 50.01 for row in result.history)


def test_masks_keep_their_range_and_are_folded(toy_attack: MakeAttack) -> None:
    attack = toy_attack(model=net())
    defense = defenses.create("awm", **QUICK, mask_lr=0.5)
    result = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    assert result.model is not None and not result.model.training
    state = attack.model.state_dict()
    names = masked_layers(attack.model)
    assert result.model.state_dict().keys() == state.keys()
    for key, value in result.model.state_dict().items():
        if key not in names:
            assert torch.equal(value, state[key]), key
            continue
        ratio = value / state[key]
        assert ratio.min() >= -1e-6 and ratio.max() <= 1 + 1e-5
    assert result.info["masked_out"] > 0 and 0 < result.info["mean_mask"] < 1
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in attack.model.parameters()]


def test_the_folded_model_is_the_masked_one(toy_view: MakeView, toy_images: MakeImages) -> None:
    model, images = net().requires_grad_(False), toy_images(20, 4)
    search = awm._Search(model, masked_layers(model), images, AWMConfig(mask_lr=0.3))
    search.mask(random_batches(images, 8, 3, seed=0, block=0), torch.zeros(1, 3, 12, 12))
    x = torch.randn(4, 3, 12, 12)
    masked = search._logits(x, search._masked(detached=True))
    folded = copy.deepcopy(model)
    for name, mask in zip(masked_layers(model), search.masks, strict=True):
        folded.get_parameter(name).mul_(mask.detach())
    torch.testing.assert_close(folded(x), masked, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x), masked, atol=1e-2)


def test_perturbed_images_are_clipped_to_pixels(
    toy_view: MakeView, toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Toolbox trap: a clip to 0..1 of normalised images cuts off everything darker than the mean."""
    images = toy_images(20, 4)
    model = net().requires_grad_(False)
    search = awm._Search(model, masked_layers(model), images, AWMConfig())
    seen: list[Tensor] = []
    real = awm._Search._logits
    monkeypatch.setattr(awm._Search, "_logits", lambda self, x, w: (seen.append(x), real(self, x, w))[1])
    (batch,) = random_batches(images, 8, 1, seed=0, block=0)
    search.mask(iter([batch]), 2 * torch.randn(1, 3, 12, 12))
    plain, moved = (denormalize(part, images.mean, images.std) for part in seen[0].chunk(2))
    torch.testing.assert_close(plain, denormalize(batch.x, images.mean, images.std))
    assert moved.min() > -1e-5 and moved.max() < 1 + 1e-5 and (moved < 0.3).float().mean() > 0.1


def test_a_killed_run_goes_on(
    toy_view: MakeView, toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keep, "SAVE_EVERY_SECONDS", 0.0)
    images = toy_images(40, 4)
    defense = defenses.create("awm", **QUICK)
    whole = defense.run(toy_view(net(), clean=images, progress=False))
    real, turns = awm._Search.perturb, []

    def killed(self: Any, batches: Any) -> Tensor:
        turns.append(len(turns))
        if len(turns) == 3:
            raise KeyboardInterrupt
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(awm._Search, "perturb", killed)
        with pytest.raises(KeyboardInterrupt):
            defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    again = defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    assert again.history == whole.history
    state = whole.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())  # type: ignore[union-attr]


def test_divergence_names_the_settings(toy_view: MakeView, toy_images: MakeImages) -> None:
    broken = net()
    with torch.no_grad():
        broken.linear.bias.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(DivergedError, match=r"awm: the loss is not finite in round 0 \(mask_lr=0\.01"):
        defenses.create("awm", **QUICK).run(toy_view(broken, clean=toy_images(20, 4), progress=False))


def test_what_is_masked() -> None:
    assert len(masked_layers(build("preactresnet18", 4, 32))) == 20
    assert all("features" in name for name in masked_layers(build("convnext_tiny", 4, 32)))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    assert masked_layers(plain) == ["1.weight"]
    with pytest.raises(UnsupportedModelError, match="awm cannot work on Sequential: it has no convolution"):
        masked_layers(nn.Sequential(nn.Flatten()))
    transformer = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(), nn.Linear(36, 4))
    assert masked_layers(transformer) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny"])
def test_models(toy_attack: MakeAttack, name: str) -> None:
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, 32), n=20, n_test=8, size=(3, 32, 32))
    defense = defenses.create("awm", outer_rounds=1, inner=1, batch_size=4)
    result = defenses.defend(defense, attack, 0.2, device="cpu", progress=False)
    assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()


def test_no_round_changes_nothing(toy_attack: MakeAttack) -> None:
    attack = toy_attack(model=net())
    result = defenses.defend(defenses.create("awm", outer_rounds=0), attack, 0.3, device="cpu", progress=False)
    state = attack.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in result.model.state_dict().items())  # type: ignore[union-attr]
    assert AWMConfig().for_dataset("digits").batch_size == 16 and AWMConfig().batch_size == 128


@pytest.mark.slow
def test_on_the_digits(digits_attack: AttackResult) -> None:
    """72 clean images weaken BadNets and keep the accuracy."""
    result = defenses.defend("awm", digits_attack, device="cpu", progress=False)
    assert result.metrics["asr"] <= 0.4
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.05
