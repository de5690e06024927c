"""A flagged set of any origin feeds a mitigation: retraining without it, or unlearning it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses import DefenseResult, filter_and_retrain, unlearn
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.training import Recipe

MakeAttack = Callable[..., AttackResult]
CPU: dict[str, Any] = {"device": "cpu", "progress": False}


def same_weights(one: DefenseResult, other: DefenseResult) -> bool:
    assert one.model is not None
    assert other.model is not None
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_retraining_without_the_poison_removes_the_backdoor(digits_attack: AttackResult, tmp_path: Path) -> None:
    result = filter_and_retrain(digits_attack, digits_attack.poisoned, **CPU)
    assert result.metrics["asr"] < 0.1 < 0.9 < result.metrics["asr_before"]
    assert result.metrics["c_acc"] > 0.9
    assert (result.metrics["tpr"], result.metrics["fpr"]) == (1.0, 0.0)
    assert result.config["defense"] == "filter_and_retrain"
    assert result.config["flags"]["count"] == int(digits_attack.poisoned.sum())
    result.save(tmp_path / "r")
    again = DefenseResult.load(tmp_path / "r")
    assert again.metrics["der"] == result.metrics["der"]
    assert again.config["flags"] == result.config["flags"]


def test_it_is_what_ac_does(toy_attack: MakeAttack) -> None:
    """One way to retrain: the detector's own and the composed one end with the same bits."""
    attack = toy_attack()
    whole = defenses.defend(defenses.create("ac", analysis="smaller"), attack, **CPU)
    found = defenses.defend(defenses.create("ac", analysis="smaller", retrain=False), attack, **CPU)
    result = filter_and_retrain(attack, found, **CPU)
    assert same_weights(result, whole)
    assert result.config["flags"]["detector"] == "ac"
    assert {key: result.metrics[key] for key in ("tpr", "fpr", "auroc")} == {
        key: found.metrics[key] for key in ("tpr", "fpr", "auroc")
    }


def test_a_recipe_and_a_seed_of_ones_own(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    recipe = Recipe(epochs=1, batch_size=50, precision="fp32")
    result = filter_and_retrain(attack, attack.poisoned, recipe, seed=3, **CPU)
    assert len(result.history) == 1
    assert not same_weights(result, filter_and_retrain(attack, attack.poisoned, recipe, seed=4, **CPU))
    del attack.config["recipe"]
    with pytest.raises(DataRequirementError, match="no recipe; give recipe="):
        filter_and_retrain(attack, attack.poisoned, **CPU)


@pytest.mark.parametrize("compose", [filter_and_retrain, unlearn])
def test_flags_that_do_not_fit(toy_attack: MakeAttack, compose: Callable[..., DefenseResult]) -> None:
    attack = toy_attack()
    for flags, text in (
        (attack.poisoned.int(), "got torch.int32"),
        (attack.poisoned[None], "got torch.bool"),
        (DefenseResult(kind="model"), "got NoneType"),
        (None, "got NoneType"),
    ):
        with pytest.raises(TypeError, match=text):
            compose(attack, flags, **CPU)
    with pytest.raises(ValueError, match="must be of the 200 training samples, got 199"):
        compose(attack, attack.poisoned[1:], **CPU)
    stream = DefenseResult(kind="inference", flags=attack.poisoned, metrics={"population": "stream"})
    with pytest.raises(ValueError, match="200 of a result of kind 'inference'"):
        compose(attack, stream, **CPU)


def test_all_or_nothing(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    none, every = torch.zeros(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)
    with pytest.raises(DataRequirementError, match="flagged all 200 training samples"):
        filter_and_retrain(attack, every, **CPU)
    assert filter_and_retrain(attack, none, **CPU).info["removed"] == 0
    untouched = unlearn(attack, none, **CPU)
    assert untouched.info["unlearn_epochs"] == 0
    assert untouched.model is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(untouched.model.state_dict().values(), attack.model.state_dict().values(), strict=True)
    )
    none[3] = True
    with pytest.raises(DataRequirementError, match="only 1 sample"):
        unlearn(attack, none, **CPU)


def test_unlearning_forgets_and_leaves_the_attack_alone(digits_attack: AttackResult) -> None:
    before = {key: value.clone() for key, value in digits_attack.model.state_dict().items()}
    result = unlearn(digits_attack, digits_attack.poisoned, lr_unlearn=5e-3, ascent_stop=3.0, **CPU)
    assert result.metrics["asr"] < 0.5 * result.metrics["asr_before"]
    assert 0 < result.info["unlearn_epochs"] < 20
    assert all(torch.equal(before[key], value) for key, value in digits_attack.model.state_dict().items())


def test_unlearning_does_not_depend_on_storage_order(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    moved = dataclasses.replace(
        attack,
        train=attack.train.subset(order),
        poisoned=attack.poisoned[order],
        original_labels=attack.original_labels[order],
        role=attack.role[order],
    )
    one = unlearn(attack, attack.poisoned, unlearn_epochs=2, **CPU)
    assert same_weights(one, unlearn(moved, moved.poisoned, unlearn_epochs=2, **CPU))


@pytest.mark.parametrize("settings", [{"unlearn_epochs": -1}, {"lr": 0.1}, {"ascent_stop": 0}])
def test_bad_settings(toy_attack: MakeAttack, settings: dict[str, Any]) -> None:
    attack = toy_attack()
    with pytest.raises(ConfigError, match="unlearn"):
        unlearn(attack, attack.poisoned, **settings, **CPU)
