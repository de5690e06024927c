"""The runner: what it refuses before work, what it measures, and that it changes nothing else."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import DataPair, ImageSet, Recipe, attack, defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses import Defense, DefenseCard, DefenseConfig, DefenseResult
from bbfast.defenses._judge import top_precision
from bbfast.defenses._measure import peak_memory
from bbfast.defenses.base import ALIASES
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError, UnknownNameError, UnsupportedModelError
from bbfast.evaluation import evaluate
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]


def defense_with(run: Callable[[DefenderView], DefenseResult], *needs: str, kind: str = "mitigation") -> Defense:
    class Probe(Defense):
        name = "probe"
        card = DefenseCard("Probe", "none", None, "", (kind,), frozenset(needs), "For tests.")

        def run(self, view: DefenderView) -> DefenseResult:
            return run(view)

    return Probe()


def give_back(view: DefenderView) -> DefenseResult:
    return DefenseResult("mitigation", model=view.model)


def test_a_defense_that_does_nothing_scores_a_half(toy_attack: MakeAttack) -> None:
    result = defenses.defend(defense_with(give_back, "model"), toy_attack(), device="cpu")
    metrics = result.metrics
    assert metrics["der"] == 0.5 and metrics["rir"] == 0.5
    for name in ("c_acc", "asr", "r_acc"):
        assert metrics[name] == metrics[f"{name}_before"]
    assert metrics["seconds"] == result.seconds > 0 and metrics["peak_memory_bytes"] >= 0
    assert result.info["data_used"] == ["model"]
    assert result.config["defense"] == "probe" and result.config["seed"] == 0


@pytest.mark.parametrize(("name", "snapshot"), [("wanet", True), ("lira", True), ("badnets", False)])
def test_a_training_set_that_changed_every_epoch_is_called_a_snapshot(name: str, snapshot: bool) -> None:
    g = torch.Generator().manual_seed(0)
    sets = [
        ImageSet(torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=g), torch.arange(n) % 4)
        for n in (40, 20)
    ]
    attacked = attack(name, DataPair(*sets, name="toy"), "small_cnn", Recipe(epochs=1, batch_size=20), device="cpu")

    def look(view: DefenderView) -> DefenseResult:
        return DefenseResult("detection", scores=view.poisoned_train.labels.float())

    def look_away(view: DefenderView) -> DefenseResult:
        return DefenseResult("mitigation", model=view.model)

    seen = defenses.defend(defense_with(look, "poisoned_train", kind="detection"), attacked, device="cpu")
    assert seen.info.get("static_snapshot", False) is snapshot
    unseen = defenses.defend(defense_with(look_away, "model"), attacked, device="cpu")
    assert "static_snapshot" not in unseen.info


def test_the_baseline_is_of_the_same_images(toy_attack: MakeAttack) -> None:
    """With a reserve taken out, the attack's stored metrics are of other images and must not be used."""
    attack = toy_attack()
    attack.metrics = {"c_acc": 0.123, "asr": 0.456, "r_acc": 0.789}
    whole = defenses.defend(defense_with(give_back, "model"), attack, device="cpu").metrics
    assert (whole["c_acc_before"], whole["asr_before"], whole["r_acc_before"]) == (0.123, 0.456, 0.789)
    part = defenses.defend(defense_with(give_back, "model", "reserve"), attack, device="cpu").metrics
    assert part["der"] == 0.5 and part["c_acc_before"] == part["c_acc"] != 0.123


def test_a_defense_does_not_write_its_own_report(toy_attack: MakeAttack) -> None:
    def boast(view: DefenderView) -> DefenseResult:
        result = give_back(view)
        result.metrics = {"asr": 0.0, "der": 1.0, "mine": 3.0}
        return result

    attack = toy_attack()
    honest = defenses.defend(defense_with(give_back, "model"), attack, device="cpu").metrics
    metrics = defenses.defend(defense_with(boast, "model"), attack, device="cpu").metrics
    assert (metrics["asr"], metrics["der"], metrics["mine"]) == (honest["asr"], honest["der"], 3.0)


def test_model_metrics_agree_with_evaluate(toy_attack: MakeAttack) -> None:
    attack = toy_attack()

    def shift(view: DefenderView) -> DefenseResult:
        with torch.no_grad():
            for parameter in view.model.parameters():
                parameter.add_(0.05)
        return give_back(view)

    result = defenses.defend(defense_with(shift, "model"), attack, device="cpu")
    before = evaluate(attack.model, attack.test, attack.backdoor_test, device="cpu")
    expected = evaluate(result.model, attack.test, attack.backdoor_test, before, device="cpu")  # type: ignore[arg-type]
    assert all(result.metrics[name] == expected[name] for name in ("c_acc", "asr", "r_acc", "der", "rir"))


def test_training_samples_are_judged(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    truth = attack.poisoned.clone()

    def clairvoyant(view: DefenderView) -> DefenseResult:
        return DefenseResult("detection", scores=truth.float(), flags=truth)

    metrics = defenses.defend(
        defense_with(clairvoyant, "poisoned_train", kind="detection"), attack, device="cpu"
    ).metrics
    assert metrics["tpr"] == 1 and metrics["fpr"] == 0 and metrics["auroc"] == 1 and metrics["f1"] == 1
    assert metrics["population"] == "train" and metrics["samples"] == len(attack.train)

    def unsure(view: DefenderView) -> DefenseResult:
        scores = truth.float()
        scores[0] = math.nan
        return DefenseResult("detection", scores=scores)

    metrics = defenses.defend(defense_with(unsure, "poisoned_train", kind="detection"), attack, device="cpu").metrics
    assert metrics["unscored"] == 1 and math.isnan(metrics["tpr"])

    def short(view: DefenderView) -> DefenseResult:
        return DefenseResult("detection", flags=truth[:-1])

    with pytest.raises(ValueError, match=r"scored 199 samples.*200 training samples"):
        defenses.defend(defense_with(short, "poisoned_train"), attack, device="cpu")


def test_precision_of_the_most_suspicious(toy_attack: MakeAttack) -> None:
    """By the runner, which knows the truth, for whatever scores the training set: ABL's 1 % and 5 %."""
    truth = torch.zeros(200, dtype=torch.bool)
    truth[[3, 50, 51, 52]] = True
    scores = torch.arange(200, 0, -1.0)
    assert top_precision(scores, truth, 1) == 0.0
    assert top_precision(scores, truth, 5) == 0.1
    # Eight tie for five places, three of them poisoned: 5 / 8 of each counts.
    tied = torch.full((200,), -5.0)
    tied[[0, 1, 2, 4, 5]] = 9.0
    tied[[3, 50, 51, 6, 7, 8, 9, 10]] = 2.0
    assert top_precision(tied, truth, 5) == pytest.approx(3 * 5 / 8 / 10)
    # What was not scored is not isolated.
    tied[[50, 51]] = torch.nan
    assert top_precision(tied, truth, 5) == pytest.approx(5 / 6 / 10)
    assert math.isnan(top_precision(scores[:99], truth[:99], 1))

    attack = toy_attack()

    def run(view: DefenderView) -> DefenseResult:
        return DefenseResult("detection", scores=attack.poisoned.float(), metrics={"precision_top_01": 0.0})

    metrics = defenses.defend(defense_with(run, "poisoned_train", kind="detection"), attack, device="cpu").metrics
    assert metrics["precision_top_01"] == metrics["precision_top_05"] == 1.0


def test_cross_samples_are_no_poison(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    attack.role = attack.role.clone()
    clean = torch.nonzero(attack.role == 0).flatten()[:5]
    attack.role[clean] = 2
    attack.clean_images = torch.cat([attack.clean_images, attack.train.images[clean]])[: int((attack.role != 0).sum())]
    flags = attack.role == 1

    def run(view: DefenderView) -> DefenseResult:
        return DefenseResult("detection", flags=flags)

    assert defenses.defend(defense_with(run, "poisoned_train"), attack, device="cpu").metrics["fpr"] == 0


def test_the_stream_is_judged_whole_and_where_the_attack_works(toy_attack: MakeAttack) -> None:
    class Corner(nn.Module):
        """Says 1 to a white corner, else 0: wrong on clean images of classes 2 and 3."""

        def forward(self, x: Tensor) -> Tensor:
            white = (x[:, :, -3:, -3:] > 1.3).flatten(1).all(dim=1)
            return nn.functional.one_hot(white.long(), 4).float()

    attack = toy_attack(model=Corner())

    def corner(view: DefenderView) -> DefenseResult:
        white = (view.stream.images[:, :, -3:, -3:] == 255).flatten(1).all(dim=1)
        flags = white.clone()
        flags[torch.nonzero(~white).flatten()[::2]] = True
        return DefenseResult("inference", scores=white.float(), flags=flags)

    metrics = defenses.defend(defense_with(corner, "stream", "reserve", kind="inference"), attack, device="cpu").metrics
    eligible = 3 * 14
    assert metrics["samples"] == 2 * eligible and metrics["tpr"] == 1 and metrics["fpr"] == 0.5
    assert metrics["auroc"] == 1 and metrics["population"] == "stream"
    # Of the clean copies only class 0 is predicted right; every triggered copy is predicted as the target.
    assert metrics["effective_samples"] == eligible + 14 and metrics["effective_tpr"] == 1


def test_the_verdict_is_judged(toy_attack: MakeAttack) -> None:
    def verdict(view: DefenderView) -> DefenseResult:
        return DefenseResult("model", verdict={"backdoored": True, "targets": [1], "anomaly": {1: 9.0}})

    metrics = defenses.defend(defense_with(verdict, "model", kind="model"), toy_attack(), device="cpu").metrics
    assert metrics["backdoored"] == 1.0 and metrics["target_found"] == 1.0


def untouched(view: DefenderView) -> DefenseResult:
    raise AssertionError("work began")


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, math.nan, True, "half"])
def test_bad_fractions(toy_attack: MakeAttack, fraction: Any) -> None:
    with pytest.raises(ValueError, match=r"clean_fraction must lie in \(0, 1\], got"):
        defenses.defend(defense_with(untouched, "clean"), toy_attack(), fraction, device="cpu")


def test_refusals_before_work(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    with pytest.raises(UnknownNameError, match="did you mean"):
        defenses.defend("ftt", attack, device="cpu")
    with pytest.raises(ValueError, match="seed"):
        defenses.defend(defense_with(untouched), attack, seed=-1, device="cpu")
    with pytest.raises(TypeError, match="attack_result"):
        defenses.defend(defense_with(untouched), {"model": attack.model}, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="defense"):
        defenses.defend(3, attack, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(DataRequirementError, match="2 images for 4 classes"):
        defenses.defend(defense_with(untouched, "clean"), attack, 0.01, device="cpu")
    with pytest.raises(DataRequirementError, match="10 test images of each class"):
        defenses.defend(defense_with(untouched, "reserve"), toy_attack(n_test=32), device="cpu")
    for need in ("poisoned_train", "clean"):
        bare = dataclasses.replace(attack, train=attack.train[:0])
        with pytest.raises(DataRequirementError, match="not applicable"):
            defenses.defend(defense_with(untouched, need), bare, device="cpu")
    layer_norm = nn.Sequential(nn.Flatten(), nn.LayerNorm(432), nn.Linear(432, 4))
    calls: list[int] = []
    layer_norm.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UnsupportedModelError, match="BatchNorm2d"):
        defenses.defend(defense_with(untouched, "model", "batch_norm"), toy_attack(model=layer_norm), device="cpu")
    with pytest.raises(UnsupportedModelError, match="build"):
        defenses.defend(defense_with(untouched, "fresh_model"), toy_attack(model=layer_norm), device="cpu")
    assert not calls


def test_a_defense_must_return_a_result(toy_attack: MakeAttack) -> None:
    with pytest.raises(TypeError, match="must return a DefenseResult, got NoneType"):
        defenses.defend(defense_with(lambda view: None), toy_attack(), device="cpu")  # type: ignore[arg-type,return-value]


def test_random_state_and_attack_are_left_alone(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    model = copy.deepcopy(attack.model.state_dict())
    images = attack.train.images.clone()
    drawn: list[Tensor] = []

    def draw(view: DefenderView) -> DefenseResult:
        drawn.append(torch.rand(3))
        return give_back(view)

    state = torch.get_rng_state()
    for _ in range(2):
        defenses.defend(defense_with(draw, "model", "clean"), attack, 0.2, device="cpu")
        torch.rand(5)
    torch.set_rng_state(state)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(images, attack.train.images)
    assert all(torch.equal(value, attack.model.state_dict()[key]) for key, value in model.items())


def test_the_random_state_survives(toy_attack: MakeAttack) -> None:
    state = torch.get_rng_state()
    defenses.defend(defense_with(give_back, "model", "clean"), toy_attack(), 0.2, device="cpu")
    attack = toy_attack()
    torch.set_rng_state(state)
    defenses.defend(defense_with(give_back, "model", "clean"), attack, 0.2, device="cpu")
    assert torch.equal(state, torch.get_rng_state())


def test_checkpoint_progress_and_recipe_reach_the_view(toy_attack: MakeAttack, tmp_path: Path) -> None:
    from bbfast.training import Recipe

    seen: dict[str, Any] = {}

    def look(view: DefenderView) -> DefenseResult:
        seen.update(checkpoint=view.checkpoint, progress=view.progress, recipe=view.recipe, seed=view.seed)
        return DefenseResult("training")

    recipe = Recipe(epochs=7)
    defenses.defend(
        defense_with(look), toy_attack(), seed=4, device="cpu", checkpoint=tmp_path / "c", progress=False, recipe=recipe
    )
    assert seen == {"checkpoint": tmp_path / "c", "progress": False, "recipe": recipe, "seed": 4}
    defenses.defend(defense_with(look), toy_attack(), device="cpu")
    assert seen["recipe"].epochs == 2 and seen["checkpoint"] is None


def test_an_attack_can_be_given_as_a_folder(toy_attack: MakeAttack, tmp_path: Path) -> None:
    attack = toy_attack()
    folder = attack.save(tmp_path / "attack")
    defense = defense_with(give_back, "model")
    assert (
        defenses.defend(defense, folder, device="cpu").metrics["c_acc"]
        == evaluate(attack.model, attack.test, device="cpu")["c_acc"]
    )


def test_clean_fraction_none_is_the_methods_own(toy_attack: MakeAttack) -> None:
    sizes: list[int] = []

    def look(view: DefenderView) -> DefenseResult:
        sizes.append(len(view.clean))
        return DefenseResult("mitigation")

    probe = defense_with(look, "clean")
    type(probe).card = dataclasses.replace(probe.card, clean_fraction=0.5)
    result = defenses.defend(probe, toy_attack(), None, device="cpu")
    assert sizes == [100] and result.config["clean_fraction"] == 0.5
    assert result.config["clean"]["size"] == 100


def test_registry() -> None:
    names = defenses.available()
    assert {"ft", "fp", "nc"} <= set(names) and names == sorted(names)
    assert {"ft", "fp", "nc"} <= set(defenses.available("mitigation")) and "nc" in defenses.available("model")
    with pytest.raises(ValueError, match="kind must be one of"):
        defenses.available("magic")
    for alias, target in ALIASES.items():
        if target in names:
            assert type(defenses.create(alias)).name == target
        else:
            with pytest.raises(UnknownNameError) as caught:
                defenses.create(alias)
            assert alias not in str(caught.value).split(";", 1)[1]
    with pytest.raises(ConfigError, match=r"epoch.*did you mean epochs"):
        defenses.create("ft", epoch=3)
    with pytest.raises(ConfigError, match=r"epochs.*-1"):
        defenses.create("ft", epochs=-1)


@pytest.mark.parametrize("name", defenses.available())
def test_every_card_is_complete(name: str) -> None:
    info = defenses.info(name)
    assert info["title"] and info["paper"] and info["summary"].endswith(".")
    assert info["kinds"] and info["defaults"]["preset"] == "bbfast"
    defense = defenses.create(name)
    again = defenses.create(name, **defense.config.model_dump())
    assert again.config == defense.config
    for preset in info["presets"]:
        assert defenses.create(name, preset=preset).config.preset == preset
    for dataset in info["dataset_defaults"]:
        defense.for_dataset(dataset)


def test_presets_and_data_sets() -> None:
    class Config(DefenseConfig):
        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "paper": {"epochs": 1}}
        dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"tiny_imagenet": {"epochs": 200, "lr": 0.5}}
        epochs: int = 100
        lr: float = Field(0.01, gt=0)

    assert Config().for_dataset("cifar10").epochs == 100
    row = Config().for_dataset("tiny_imagenet")
    assert (row.epochs, row.lr) == (200, 0.5)
    assert Config(epochs=3).for_dataset("tiny_imagenet").epochs == 3
    paper = Config(preset="paper").for_dataset("tiny_imagenet")
    assert (paper.epochs, paper.lr) == (1, 0.5)
    assert Config(preset="paper", epochs=9).epochs == 9
    with pytest.raises(ValueError, match="expected one of"):
        Config(preset="nope")


def test_the_recorded_config_is_the_resolved_one(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    attack.config["data"]["name"] = "tiny_imagenet"
    result = defenses.defend(defenses.create("ft", epochs=0), attack, 0.2, device="cpu")
    assert result.config["defense_config"]["scheduler"] == "plateau"
    assert result.config["defense_config"]["epochs"] == 0


def small_settings(name: str) -> dict[str, Any]:
    defaults = defenses.info(name)["defaults"]
    small = {key: 1 for key in defaults if key.endswith(("epochs", "iters", "rounds"))}
    # Where the method does not fit its batches to the hold-out itself.
    return small | ({"batch_size": 8} if defaults.get("batch_size") is not None else {})


SMALL = ("small_cnn", "preactresnet18")
LARGE = ("vgg19_bn", "convnext_tiny", "vit_b_16")
LONG = ("awm", "bti_dbf", "d_br", "feature_re", "moth", "sau")
"""Methods that take seconds on PreAct-ResNet18 even so."""
CASES = [
    pytest.param(name, architecture, marks=[pytest.mark.slow] if architecture in LARGE or long else [])
    for name in defenses.available("mitigation")
    for architecture in (*SMALL, *LARGE)
    for long in [name in LONG and architecture != "small_cnn"]
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_every_repair_works_on_every_model_or_refuses(toy_attack: MakeAttack, name: str, architecture: str) -> None:
    """The same keys (more only by an addition) and finite weights, or UnsupportedModelError before any forward pass."""
    torch.manual_seed(0)
    attack = toy_attack(model=build(architecture, 4, (32, 32)), n=40, n_test=24, size=(3, 32, 32))
    attack.metrics = {"c_acc": 0.25, "asr": 0.25, "r_acc": 0.25}
    forwards: list[int] = []

    def count(module: nn.Module, args: Any) -> None:
        forwards.append(1)

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        result = defenses.defend(
            defenses.create(name, **small_settings(name)), attack, 0.5, device="cpu", progress=False
        )
    except UnsupportedModelError as error:
        assert not forwards and defenses.refusal(name, attack.model, 4) == str(error)
        return
    finally:
        hook.remove()
    assert forwards and defenses.refusal(name, architecture) is None
    if result.model is not None and "model" in result.info["data_used"]:
        added = result.model.state_dict().keys() - attack.model.state_dict().keys()
        assert attack.model.state_dict().keys() <= result.model.state_dict().keys()
        assert not added or result.model.bbfast_spec.additions, "what is added is in the plan"  # type: ignore[union-attr]
        assert all(value.isfinite().all() for value in result.model.state_dict().values())


def test_taken_names_and_bad_cards_are_refused() -> None:
    with pytest.raises(ValueError, match="taken"):
        defenses.register_defense("ft")(type("Other", (defenses.find("nc"),), {}))
    with pytest.raises(TypeError, match="card"):
        defenses.register_defense("no_card_here")(type("Other", (Defense,), {}))
    with pytest.raises(ValueError, match="needs"):
        DefenseCard("t", "p", None, "", ("mitigation",), frozenset({"truth"}), "s.")
    with pytest.raises(ValueError, match="kinds"):
        DefenseCard("t", "p", None, "", (), frozenset(), "s.")
    assert "no_card_here" not in defenses.available()


def test_peak_memory_sees_an_allocation() -> None:
    with peak_memory(torch.device("cpu")) as memory:
        block = torch.ones(256 << 20, dtype=torch.uint8)
        assert int(block[-1]) == 1
        del block
    assert memory.bytes > 128 << 20
