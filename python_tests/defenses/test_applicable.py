"""What keeps a defense from running is said before any work: the model's outputs, and classes without clean images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses import Defense, DefenseCard, DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
NEED_EVERY_CLASS: dict[str, dict[str, Any]] = {
    "feature_re": {},
    "moth": {},
    # These hold back a part of every class to select by.
    "fp": {},
    "anp": {},
    "rnp": {"selection": "val"},
    # Draw the hold-out by class.
    "ft_sam": {},
    "npd": {},
    "pdb": {},
}
DO_WITHOUT = ("ft", "nad", "nc", "mcr", "bnp", "rnp", "awm", "seam", "sft", "fst", "i_bau", "sau", "bti_dbf")


class Probe(Defense):
    """Gives the model back."""

    name = "probe"
    card = DefenseCard("Probe", "none", None, "", ("mitigation",), frozenset({"model"}), "For tests.")

    def run(self, view: DefenderView) -> DefenseResult:
        return DefenseResult("mitigation", model=view.model)


@pytest.mark.parametrize("outputs", [3, 7])
@pytest.mark.parametrize("name", ["ft", "nc", "clp", "fp", "abl", "d_br", "ac", "strip", "mm_bd"])
def test_a_model_of_another_class_count_is_refused_before_work(
    toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch, name: str, outputs: int
) -> None:
    attack = toy_attack(model=build("small_cnn", outputs, (12, 12)))
    defense = defenses.create(name)
    monkeypatch.setattr(type(defense), "run", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(UnsupportedModelError, match=f"{name} .*small_cnn: it has {outputs} outputs, .* have 4 classes"):
        defenses.defend(defense, attack, 0.2, device="cpu", progress=False)


def test_a_model_of_ones_own_is_asked_by_one_image(toy_attack: MakeAttack) -> None:
    def own(outputs: int) -> nn.Module:
        """With a BatchNorm that a pass in train mode would change, and an auxiliary layer registered last."""
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(600, outputs))
        net[0].auxiliary = nn.Linear(2, 9)  # type: ignore[union-attr]
        return net

    probe = Probe()
    attack = toy_attack(model=own(4))
    before = copy.deepcopy(attack.model.state_dict())
    defenses.defend(probe, attack, device="cpu")
    assert all(torch.equal(value, before[key]) for key, value in attack.model.state_dict().items())
    for outputs in (3, 7):
        with pytest.raises(UnsupportedModelError, match=f"Sequential: it has {outputs} outputs, .* have 4 classes"):
            defenses.defend(probe, toy_attack(model=own(outputs)), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"cannot process images of shape \[1, 3, 12, 12\]"):
        defenses.defend(probe, toy_attack(model=nn.Sequential(nn.Flatten(), nn.Linear(5, 4))), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"logits \[1, K\] of one image, got \[1, 3, 12, 12\]"):
        defenses.defend(probe, toy_attack(model=nn.Identity()), device="cpu")
    relabelled = toy_attack()
    relabelled.model.linear = nn.Linear(relabelled.model.linear.in_features, 5)  # type: ignore[union-attr, arg-type]
    with pytest.raises(UnsupportedModelError, match="it has 5 outputs"):
        defenses.defend(probe, relabelled, device="cpu")


def without_class(attack: AttackResult, gone: int) -> AttackResult:
    """The attack on a training set in which a class has become another."""
    labels = attack.original_labels.clone()
    labels[labels == gone] = (gone + 1) % 4
    return dataclasses.replace(attack, original_labels=labels)


@pytest.mark.parametrize("name", DO_WITHOUT)
def test_a_class_that_the_holdout_lacks_is_told_before_the_work(
    toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    told: list[str] = []

    def work(self: Defense, view: DefenderView) -> DefenseResult:
        told.extend(record.getMessage() for record in caplog.records)
        return DefenseResult("mitigation", model=view.model)

    defense = defenses.create(name)
    monkeypatch.setattr(type(defense), "run", work)
    result = defenses.defend(defense, without_class(toy_attack(), 2), 0.2, device="cpu", progress=False)
    assert any(f"{name}: the clean hold-out of 40 images has none of class 2;" in text for text in told), told
    assert result.config["clean"]["per_class"][2] == 0


@pytest.mark.parametrize("name", NEED_EVERY_CLASS)
def test_methods_that_need_every_class_refuse_a_holdout_without_one(
    toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    defense = defenses.create(name, **NEED_EVERY_CLASS[name])
    monkeypatch.setattr(type(defense), "run", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(DataRequirementError, match="class 2"):
        defenses.defend(defense, without_class(toy_attack(), 2), 0.2, device="cpu", progress=False)


def test_every_method_with_a_holdout_is_of_one_of_the_two_kinds() -> None:
    listed = {*NEED_EVERY_CLASS, *DO_WITHOUT, "mbns"}  # the last is bnp
    assert listed == {name for name in defenses.available() if "clean" in defenses.create(name).card.needs}
