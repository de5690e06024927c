"""RNP: forgetting, recovering by masks, and what is pruned in the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader, derive_seed
from bbfast.defenses.mitigation import _keep
from bbfast.defenses.mitigation._norms import Norms
from bbfast.defenses.mitigation.rnp import RNPConfig
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError, DivergedError, UnsupportedModelError
from bbfast.models import build
from bbfast.training import Recipe
from bbfast.training.runtime import forked_rng, seed_generators

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"unlearn_epochs": 2, "recover_epochs": 3, "batch_size": 16, "amp": "off"}
PLAIN = Recipe(augment=False, deterministic=True, precision="fp32")


def net() -> nn.Module:
    torch.manual_seed(1)
    return build("small_cnn", 4, 12).eval()


def test_the_whole_is_that_of_a_loop(toy_view: MakeView, toy_images: MakeImages) -> None:
    """Ascent with torch's SGD and clipping after the backward pass, masks with torch's SGD, pruning of the original."""
    images, model = toy_images(40, 4), net()
    view = toy_view(model, clean=images, progress=False, recipe=PLAIN)
    result = defenses.create("rnp", **QUICK, clip_norm=0.05, clean_threshold=0.0, threshold=0.99).run(view)

    unlearned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = BatchLoader(images, 16, seed=view.derive_seed("unlearning"), augment=False)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            (-F.cross_entropy(unlearned(batch.x), batch.y)).backward()
            norm = nn.utils.clip_grad_norm_(unlearned.parameters(), 0.05)
            assert norm > 0.05, "the test says nothing if nothing is clipped"
            optimizer.step()
    net_, norms = copy.deepcopy(unlearned).requires_grad_(False), Norms.find(unlearned, "rnp")
    masks = torch.ones(len(norms), requires_grad=True)
    optimizer = torch.optim.SGD([masks], lr=0.2, momentum=0.9)
    loader = BatchLoader(images, 16, seed=view.derive_seed("recovery"), augment=False)
    with forked_rng(CPU):
        for epoch in range(3):
            seed_generators(derive_seed("masks", view.derive_seed("recovery"), epoch), CPU)
            for batch in loader.epoch(epoch):
                optimizer.zero_grad()
                (0.2 * F.cross_entropy(norms.call(batch.x, norms.weights() * masks, model=net_), batch.y)).backward()
                optimizer.step()
                masks.data.clamp_(0, 1)
    found = torch.tensor([m for part in result.info["masks"].values() for m in part])
    torch.testing.assert_close(found, masks.detach(), rtol=1e-3, atol=1e-4)
    kept, before = Norms.find(result.model, "rnp"), Norms.find(model, "rnp")  # type: ignore[arg-type]
    assert torch.equal(kept.weights(), before.weights().masked_fill(found <= 0.99, 0)) and (found <= 0.99).any()


def test_only_norm_weights_change(toy_attack: MakeAttack) -> None:
    attack = toy_attack(model=net())
    result = defenses.defend(
        defenses.create("rnp", **QUICK, threshold=0.99, clean_threshold=0.0), attack, 0.3, device="cpu", progress=False
    )
    assert result.model is not None and not result.model.training
    names = Norms.find(attack.model, "rnp").names
    state = attack.model.state_dict()
    changed = [key for key, value in result.model.state_dict().items() if not torch.equal(value, state[key])]
    assert changed and all(key.removesuffix(".weight") in names for key in changed)
    masks = [m for part in result.info["masks"].values() for m in part]
    assert min(masks) >= 0 and max(masks) <= 1
    assert result.info["pruned"] == sum(m <= 0.99 for m in masks) and result.info["data_used"] == ["clean", "model"]
    assert [row["phase"] for row in result.history] == ["unlearn"] * 2 + ["recover"] * 3


def test_clipping_acts(toy_view: MakeView, toy_images: MakeImages) -> None:
    """Reference trap (a): gradients clipped before the backward pass are those of the step before."""
    images = toy_images(40, 4)
    moved = {}
    for clip in (1e-4, None):
        defense = defenses.create("rnp", **QUICK, clip_norm=clip, weight_decay=0.0)
        view = toy_view(net(), clean=images, progress=False, recipe=PLAIN)
        unlearned = net()
        defense._unlearn(view, unlearned, images)
        pairs = zip(unlearned.parameters(), net().parameters(), strict=True)
        moved[clip] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert moved[1e-4] < 1e-4 < moved[None]


def test_the_ascent_ends_when_the_labels_are_forgotten(toy_view: MakeView, toy_images: MakeImages) -> None:
    images = toy_images(40, 4)
    view = toy_view(net(), clean=images, progress=False, recipe=PLAIN)
    options = {**QUICK, "unlearn_epochs": 30}
    result = defenses.create("rnp", **options, unlearn_lr=0.1, clean_threshold=0.6).run(view)
    epochs = [row for row in result.history if row["phase"] == "unlearn"]
    assert len(epochs) == result.info["unlearn_epochs"] < 30
    assert epochs[-1]["train_acc"] == result.info["unlearn_acc"] <= 0.6
    assert all(row["train_acc"] > 0.6 for row in epochs[:-1])


def test_too_few_steps_to_forget_are_warned_of(
    toy_view: MakeView, toy_images: MakeImages, caplog: pytest.LogCaptureFixture
) -> None:
    view = toy_view(net(), clean=toy_images(40, 4), progress=False)
    result = defenses.create("rnp", **QUICK, unlearn_lr=1e-6, clean_threshold=0.0).run(view)
    assert result.info["unlearn_epochs"] == 2 and result.info["unlearn_acc"] > 0
    assert "after 2 epochs of ascent the training accuracy is" in caplog.text


def test_selection_by_held_back_accuracy(toy_attack: MakeAttack) -> None:
    defense = defenses.create("rnp", **QUICK, selection="val")
    result = defenses.defend(defense, toy_attack(model=net()), 0.5, device="cpu", progress=False)
    assert result.selection["data"] == "held-back part of the clean hold-out" and result.selection["samples"] > 15
    assert result.info["threshold"] == result.selection["threshold"]


def test_a_killed_run_goes_on(
    toy_view: MakeView, toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_keep, "SAVE_EVERY_SECONDS", 0.0)
    images = toy_images(40, 4)
    defense = defenses.create("rnp", **QUICK, clean_threshold=0.0)

    def view(**options: Any) -> DefenderView:
        return toy_view(net(), clean=images, progress=False, recipe=PLAIN, **options)

    whole = defense.run(view())
    real, epochs = BatchLoader.epoch, []

    def killed(self: BatchLoader, epoch: int) -> Iterator[Batch]:
        epochs.append(epoch)
        if epochs.count(1) == 2:  # the second epoch of the masks
            raise KeyboardInterrupt
        return real(self, epoch)

    monkeypatch.setattr(BatchLoader, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        defense.run(view(checkpoint=tmp_path))
    epochs.clear()
    again = defense.run(view(checkpoint=tmp_path))
    assert epochs[-2:] == [1, 2] and epochs.count(1) == 1, (
        "the ascent is there already, and the first epoch of the masks"
    )
    assert again.info["masks"] == whole.info["masks"] and again.info["pruned_channels"] == whole.info["pruned_channels"]


def test_divergence_names_the_setting(toy_view: MakeView, toy_images: MakeImages) -> None:
    view = toy_view(net(), clean=toy_images(40, 4), progress=False)
    defense = defenses.create(
        "rnp", **{**QUICK, "unlearn_epochs": 20}, unlearn_lr=1e9, clip_norm=None, clean_threshold=0.0
    )
    with pytest.raises(DivergedError, match=r"rnp, gradient ascent on 40 clean images: .*lower unlearn_lr"):
        defense.run(view)


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny"])
def test_models(toy_attack: MakeAttack, name: str) -> None:
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, 32), n=40, n_test=8, size=(3, 32, 32))
    options: dict[str, Any] = {"unlearn_epochs": 1, "recover_epochs": 1, "unlearn_lr": 1e-4}
    if name == "convnext_tiny":
        with pytest.raises(UnsupportedModelError, match="rnp cannot work on convnext_tiny: it has no BatchNorm2d"):
            defenses.defend("rnp", attack, 0.2, device="cpu")
        options["norm"] = "layernorm"
    result = defenses.defend(defenses.create("rnp", **options), attack, 0.2, device="cpu", progress=False)
    assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()


def test_settings_and_bad_input(toy_view: MakeView) -> None:
    assert defenses.find("rnp").card.clean_fraction == 0.01
    reference = RNPConfig(preset="reference")
    assert (reference.batch_size, reference.clip_norm, reference.threshold) == (256, None, 0.7)
    assert RNPConfig(preset="official").batch_size == 128 and RNPConfig().clip_norm == 20.0
    assert RNPConfig().for_dataset("digits").selection == "val" and RNPConfig().selection == "fixed"
    with pytest.raises(ConfigError, match="val_fraction=0 leaves nothing"):
        defenses.create("rnp", selection="val", val_fraction=0)
    with pytest.raises(ConfigError, match="milestones"):
        defenses.create("rnp", milestones=(20, 10))
    lonely = ImageSet(torch.zeros(5, 3, 12, 12, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2]))
    with pytest.raises(DataRequirementError, match="class 2: 1"):
        defenses.create("rnp", selection="val").check(toy_view(net(), clean=lonely, classes=3))
    defenses.create("rnp").check(toy_view(net(), clean=lonely, classes=3))


def test_on_the_digits(digits_attack: AttackResult) -> None:
    """BadNets is removed with a hold-out of 72 images, and nothing but that hold-out decides."""
    result = defenses.defend("rnp", digits_attack, 0.05, device="cpu", progress=False)
    assert result.metrics["asr"] <= 0.15
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.1
