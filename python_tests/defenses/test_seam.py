"""SEAM: labels that are always wrong, where each step ends, and going on after a kill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader, derive_seed
from bbfast.defenses.mitigation.seam import SEAMConfig, UntilAccuracy, WrongLabels, wrong_labels
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, DivergedError
from bbfast.models import build
from bbfast.training import predict_labels

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]


def fresh() -> nn.Module:
    torch.manual_seed(2)
    return build("small_cnn", 4, 12)


def test_wrong_labels_are_wrong_and_uniform() -> None:
    labels = torch.arange(30000) % 5
    drawn = wrong_labels(labels, 5, seed=3)
    assert not (drawn == labels).any() and drawn.min() == 0 and drawn.max() == 4
    table = torch.zeros(5, 5).index_put_((labels, drawn), torch.ones(1), accumulate=True) / 6000
    assert (table - 0.25 * (1 - torch.eye(5))).abs().max() < 0.03
    assert not torch.equal(drawn, wrong_labels(labels, 5, seed=4))
    assert torch.equal(wrong_labels(torch.tensor([0, 1]), 2, seed=0), torch.tensor([1, 0]))


def test_forgetting_is_the_plain_loop(toy_view: MakeView, toy_images: MakeImages) -> None:
    """Every epoch draws labels anew, and it ends with the first one after which the right labels are below chance."""
    images = toy_images(40, 4)
    view = toy_view(fresh(), clean=images, progress=False)
    settings = {"forget_share": 1.0, "forget_epochs": 6, "forget_below": 0.3, "recover_epochs": 0}
    result = defenses.create("seam", **settings, lr=0.01, amp="off", channels_last=False).run(view)
    model = fresh()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    seed, accuracies = view.derive_seed("forgetting"), []
    for epoch in range(6):
        model.train()
        for batch in BatchLoader(images, 32, seed=seed, augment=False, merge_single=True).epoch(epoch):
            y = wrong_labels(batch.y, 4, derive_seed("seam", seed, epoch, batch.step))
            loss = nn.functional.cross_entropy(model(batch.x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
        accuracies.append(float((predict_labels(model, images, device="cpu") == images.labels).double().mean()))
        if accuracies[-1] < 0.3:
            break
    assert [row["accuracy"] for row in result.history] == pytest.approx(accuracies, abs=0.051)
    for a, b in zip(result.model.parameters(), model.parameters(), strict=True):  # type: ignore[union-attr]
        assert ((a - b).abs() > 1e-3).float().mean() < 0.02


class Stub(nn.Module):
    """Predicts the class of the mean brightness of each image, which training does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((x.flatten(1).mean(1) > 0).long(), 2).float() + 0 * self.weight


@pytest.mark.parametrize(
    ("bound", "above", "epochs"), [(0.74, True, 1), (0.75, True, 4), (0.76, False, 1), (0.75, False, 4)]
)
def test_where_it_ends(toy_view: MakeView, bound: float, above: bool, epochs: int) -> None:
    """With the accuracy at exactly 0.75: a bound must be passed, not met."""
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    images[4:] = 255
    clean = ImageSet(images, torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), mean=(0.5,) * 3, std=(0.5,) * 3)
    view = toy_view(Stub(), clean=clean, classes=2, progress=False)
    share = {"forget_share": 1.0, "batch_size": 8}
    if above:
        settings = {"forget_epochs": 0, "recover_epochs": 4, "recover_above": bound}
    else:
        settings = {"forget_epochs": 4, "recover_epochs": 0, "forget_below": bound}
    result = defenses.create("seam", **share, **settings).run(view)
    assert len(result.history) == epochs
    assert result.info["recovered" if above else "forgot"] is (epochs == 1)


def test_what_did_not_forget_is_said(toy_attack: MakeAttack, caplog: pytest.LogCaptureFixture) -> None:
    attack = toy_attack()
    with caplog.at_level(logging.WARNING):
        defense = defenses.create("seam", forget_epochs=1, forget_below=1e-9, recover_epochs=1)
        result = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    assert "seam: after 1 epochs the accuracy on the images to forget is" in caplog.text
    assert result.info["forgot"] is False and result.info["forgotten_images"] == 12
    assert result.info["data_used"] == ["clean", "model"]


def test_settings_and_errors(toy_view: MakeView, toy_images: MakeImages, toy_attack: MakeAttack) -> None:
    assert SEAMConfig().forgotten(10) == 0.2 and SEAMConfig().forgotten(3) == 0.6
    assert SEAMConfig(forget_below=0.1).forgotten(10) == 0.1
    with pytest.raises(DataRequirementError, match="at least 2 clean images"):
        defenses.create("seam").check(toy_view(fresh(), clean=toy_images(1, 4)))
    with pytest.raises(DataRequirementError, match="with one class there are none"):
        defenses.create("seam").check(toy_view(fresh(), clean=toy_images(4, 1), classes=1))
    with pytest.raises(DivergedError, match=r"seam, recovery: the training loss became .*lower lr \(now 1e\+30\)"):
        defenses.defend(defenses.create("seam", lr=1e30), toy_attack(), 0.3, device="cpu", progress=False)


@pytest.mark.parametrize("where", [WrongLabels, UntilAccuracy])
def test_a_killed_run_goes_on(
    toy_attack: MakeAttack, tmp_path: Path, where: type[UntilAccuracy], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = toy_attack(model=fresh())
    attack.config["recipe"]["deterministic"] = True
    epochs = {"forget_epochs": 3, "recover_epochs": 4}
    defense = defenses.create("seam", forget_share=1.0, forget_below=1e-9, recover_above=1.0, **epochs)
    whole = defenses.defend(defense, attack, 0.2, device="cpu", progress=False)
    plain = UntilAccuracy.epoch_end

    def killed(self: UntilAccuracy, epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == 1 and type(self) is where:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UntilAccuracy, "epoch_end", killed)
        defenses.defend(defense, attack, 0.2, device="cpu", progress=False, checkpoint=tmp_path)
    again = defenses.defend(defense, attack, 0.2, device="cpu", progress=False, checkpoint=tmp_path)
    assert again.history == whole.history and len(whole.history) == 7
    one, other = whole.model.state_dict(), again.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(one[name], other[name]) for name in one)
