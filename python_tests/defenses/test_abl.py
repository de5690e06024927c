"""Anti-Backdoor Learning: the losses by formula, the settings of the presets, and what is isolated on real data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast import defenses, metrics
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.training._abl_programs import Ascent, AscentLimit, AscentStopped, isolation_loss, sample_losses
from bbfast.defenses.training.abl import _Phases
from bbfast.defenses.view import DataFacts, DefenderView, Grants
from bbfast.errors import ArtifactError, BBFastError, ConfigError, DataRequirementError
from bbfast.models import build
from bbfast.training import EpochInfo, Recipe, predict, train

CPU = torch.device("cpu")
TINY = {"batch_size": 50, "tuning_epochs": 2, "lr_tuning": 0.05, "finetune_epochs": 1, "unlearn_epochs": 1}


def view_with(data: ImageSet, classes: int = 4, seed: int = 0, **options: Any) -> DefenderView:
    spec = build("small_cnn", classes, data.image_size[1:]).bbfast_spec
    facts = DataFacts("toy", classes, data.image_size, data.mean, data.std, padding=2)
    recipe = Recipe(precision="fp32", deterministic=True)
    grants = Grants(poisoned_train=data, model_spec=spec)
    return DefenderView("abl", {"poisoned_train", "fresh_model"}, facts, grants, recipe=recipe, seed=seed, **options)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


# -- losses -----------------------------------------------------------------------------------------------------------


def test_isolation_losses_by_formula() -> None:
    low, high = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 1.4])
    assert float(isolation_loss(low, "flooding", flood=0.5)) == pytest.approx(0.8)  # |0.2 - 0.5| + 0.5
    assert float(isolation_loss(high, "flooding", flood=0.5)) == pytest.approx(0.8)
    assert float(isolation_loss(low, "lga", gamma=0.5)) == pytest.approx(-0.2)
    assert float(isolation_loss(high, "lga", gamma=0.5)) == pytest.approx(0.8)
    assert float(isolation_loss(high, "lga", gamma=0.5, per_sample=True)) == pytest.approx((1.4 - 0.2) / 2)


@pytest.mark.parametrize(("kind", "per_sample"), [("flooding", False), ("lga", False), ("lga", True)])
def test_gradient_turns_below_the_level(kind: str, per_sample: bool) -> None:
    """Below the level the loss is pushed up, above it down: samples learned fast stay where they are."""
    for value, sign in ((0.1, -1.0), (0.9, 1.0)):
        each = torch.full((4,), value, requires_grad=True)
        isolation_loss(each, kind, per_sample=per_sample).backward()
        assert each.grad is not None
        torch.testing.assert_close(each.grad, torch.full((4,), sign / 4))


def test_sample_losses(toy_images: Callable[..., ImageSet]) -> None:
    data, model = toy_images(30, 4), build("small_cnn", 4, 12).train()
    expected = F.cross_entropy(predict(model, data, device="cpu").double(), data.labels, reduction="none")
    torch.testing.assert_close(sample_losses(model, data, CPU), expected)
    assert model.training


def test_ascent_raises_the_loss(toy_images: Callable[..., ImageSet]) -> None:
    data, model = toy_images(40, 4), build("small_cnn", 4, 12)
    train(model, data, Recipe(epochs=4, batch_size=20, lr=0.05, augment=False, precision="fp32"), device="cpu")
    before = float(sample_losses(model, data, CPU).mean())
    recipe = Recipe(epochs=8, batch_size=20, lr=0.02, augment=False, precision="fp32", schedule="constant")
    done = train(model, data, recipe, program=Ascent(), device="cpu")
    assert float(sample_losses(model, data, CPU).mean()) > before
    assert all(row["loss"] < 0 for row in done.history)


def test_ascent_limit_stops_at_either_bound(toy_images: Callable[..., ImageSet]) -> None:
    data, model = toy_images(40, 4), build("small_cnn", 4, 12).eval()
    info = EpochInfo(2, 20, model, {"loss": -1.0})
    wrong = data.with_labels(predict(model, data, device="cpu").argmin(dim=1))
    right = data.with_labels(predict(model, data, device="cpu").argmax(dim=1))
    loss = float(sample_losses(model, right, CPU).mean())
    AscentLimit(right, loss + 0.1, 4, CPU).on_epoch_end(info)
    for images, largest in ((wrong, 1e3), (right, loss - 0.01)):
        with pytest.raises(AscentStopped) as stopped:
            AscentLimit(images, largest, 4, CPU).on_epoch_end(info)
        assert stopped.value.epochs == 3
        assert stopped.value.rows[-1]["loss"] == -1.0


# -- settings ---------------------------------------------------------------------------------------------------------


def test_presets_and_data_sets() -> None:
    config = defenses.create("abl").config
    assert (config.tuning_epochs, config.finetune_epochs, config.unlearn_epochs) == (20, 60, 20)
    assert (config.lr_tuning, config.lr_finetune, config.lr_unlearn) == (0.01, ((0, 0.01), (40, 0.001)), 1e-4)
    assert (config.batch_size, config.weight_decay, config.isolation_ratio) == (256, 1e-4, 0.01)
    reference = defenses.create("abl", preset="reference").config
    assert reference.model_dump(exclude={"preset"}) == config.model_dump(exclude={"preset"})
    official = defenses.create("abl", preset="official").config
    assert (official.tuning_epochs, official.finetune_epochs, official.unlearn_epochs) == (10, 60, 5)
    assert (official.lr_tuning, official.lr_unlearn, official.batch_size) == (0.1, 5e-4, 128)
    tiny = config.for_dataset("tiny_imagenet")
    assert (tiny.tuning_epochs, tiny.finetune_epochs, tiny.unlearn_epochs) == (40, 120, 4)
    assert official.for_dataset("tiny_imagenet").tuning_epochs == 10
    assert defenses.create("abl", unlearn_epochs=7).config.for_dataset("tiny_imagenet").unlearn_epochs == 7


def test_recipes_of_the_phases(toy_images: Callable[..., ImageSet]) -> None:
    """Regression: the reference ignores its settings lr_finetuning_init and lr_unlearning_init."""
    view = view_with(toy_images(20, 4))
    phases = _Phases(view, defenses.create("abl", preset="official", lr_unlearn=0.003).config)
    first, second, third = phases.isolation(), phases.finetune(), phases.unlearn()
    assert (first.lr, first.nesterov, first.augment, first.schedule) == (0.1, True, False, "constant")
    assert (second.lr, second.nesterov, second.augment, second.schedule) == (0.1, False, True, "multistep")
    assert (second.milestones, second.gamma) == ((40, 60), pytest.approx(0.1))
    assert (third.lr, third.epochs, third.augment, third.padding) == (0.003, 5, True, 2)
    assert all(recipe.deterministic and recipe.weight_decay == 1e-4 for recipe in (first, second, third))
    constant = _Phases(view, defenses.create("abl", lr_finetune=((0, 0.2),)).config).finetune()
    assert (constant.schedule, constant.lr) == ("constant", 0.2)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"isolation_ratio": 0}, "isolation_ratio"),
        ({"loss": "flood"}, "loss"),
        ({"lr_finetune": ()}, "rise from 0"),
        ({"lr_finetune": ((5, 0.1),)}, "rise from 0"),
        ({"lr_finetune": ((0, 0.1), (0, 0.01))}, "rise from 0"),
        ({"lr_finetune": ((0, 0.1), (5, -0.1))}, "above 0"),
        ({"lr_finetune": ((0, 0.1), (5, 0.01), (9, 0.005))}, "common factor"),
        ({"lr_finetune": ((0, 0.1), (5, 0.2))}, "common factor"),
        ({"epochs": 3}, "unknown setting"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("abl", **config)


def test_too_few_samples(toy_images: Callable[..., ImageSet]) -> None:
    with pytest.raises(DataRequirementError, match="of 199 training samples gives 1"):
        defenses.create("abl").check(view_with(toy_images(199, 4)))
    defenses.create("abl").check(view_with(toy_images(200, 4)))


# -- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_trace", [False, True])
def test_result(toy_images: Callable[..., ImageSet], loss_trace: bool) -> None:
    data = toy_images(250, 4)
    result = defenses.create("abl", isolation_ratio=0.05, loss_trace=loss_trace, **TINY).run(view_with(data))
    scores, flags = rows(result)
    assert result.kind == "training"
    assert int(flags.sum()) == int(0.05 * 250)
    assert scores[flags].min() >= scores[~flags].max()
    assert result.threshold == float(scores[flags].min())
    assert (scores <= 0).all()
    assert result.model is not None
    assert [row["phase"] for row in result.history] == ["isolation", "isolation", "finetune", "unlearn"]


def test_scores_are_losses_of_the_isolation_model(toy_images: Callable[..., ImageSet]) -> None:
    data = toy_images(200, 4)
    settings = {**TINY, "finetune_epochs": 0, "unlearn_epochs": 0}
    result = defenses.create("abl", **settings).run(view_with(data))
    assert result.model is not None
    torch.testing.assert_close(rows(result)[0], -sample_losses(result.model, data, CPU).float())


def test_loss_trace_averages_the_last_epochs(toy_images: Callable[..., ImageSet]) -> None:
    data, each = toy_images(200, 4), []
    for epochs in (1, 2):
        settings = {**TINY, "tuning_epochs": epochs, "finetune_epochs": 0, "unlearn_epochs": 0}
        each.append(rows(defenses.create("abl", **settings).run(view_with(data)))[0])
    settings = {**TINY, "finetune_epochs": 0, "unlearn_epochs": 0}
    traced = rows(defenses.create("abl", loss_trace=True, **settings).run(view_with(data)))[0]
    torch.testing.assert_close(traced, (each[0] + each[1]) / 2)


def test_storage_order_does_not_matter(toy_images: Callable[..., ImageSet]) -> None:
    data, order = toy_images(200, 4), torch.randperm(200, generator=torch.Generator().manual_seed(0))
    abl = defenses.create("abl", **TINY)
    one, other = (
        abl.run(view_with(data)),
        abl.run(view_with(ImageSet(data.images[order], data.labels[order], data.mean, data.std))),
    )
    assert torch.equal(rows(one)[0][order], rows(other)[0])
    assert torch.equal(rows(one)[1][order], rows(other)[1])
    assert one.model is not None
    assert other.model is not None
    for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_interrupted_run_goes_on(
    toy_images: Callable[..., ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, abl = toy_images(200, 4), defenses.create("abl", loss_trace=True, **TINY)
    whole = abl.run(view_with(data))

    def stop(self: Ascent, epoch: int, steps: int, batch_size: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ascent, "epoch_start", stop)
        abl.run(view_with(data, checkpoint=tmp_path))
    again = abl.run(view_with(data, checkpoint=tmp_path))
    assert torch.equal(rows(again)[0], rows(whole)[0])
    assert again.model is not None
    assert whole.model is not None
    for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_ascent_stop(toy_images: Callable[..., ImageSet]) -> None:
    settings = {**TINY, "isolation_ratio": 0.1, "unlearn_epochs": 30, "lr_unlearn": 0.02}
    result = defenses.create("abl", ascent_stop=3.0, **settings).run(view_with(toy_images(200, 4)))
    epochs = result.info["unlearn_epochs"]
    assert 0 < epochs < 30
    last = result.history[-1]
    assert last["isolated_acc"] < 1 / 4 or last["isolated_loss"] > 3.0
    assert result.model is not None
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


def test_ascent_that_diverges_is_named(toy_images: Callable[..., ImageSet]) -> None:
    settings = {**TINY, "isolation_ratio": 0.1, "unlearn_epochs": 200, "lr_unlearn": 100.0}
    with pytest.raises(BBFastError, match=r"abl, .* 20 isolated samples: .* epoch .*; end it in time with ascent_stop"):
        defenses.create("abl", **settings).run(view_with(toy_images(200, 4)))


def test_a_full_disk_is_not_called_divergence(
    toy_images: Callable[..., ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbfast.training.checkpoint import Checkpoints

    whole = Checkpoints.write

    def full(self: Checkpoints, checkpoint: Any) -> None:
        if "unlearn" in str(self._path):
            raise ArtifactError("no space left")
        whole(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "write", full)
    with pytest.raises(ArtifactError, match="no space left"):
        defenses.create("abl", isolation_ratio=0.1, **TINY).run(view_with(toy_images(200, 4), checkpoint=tmp_path))


# -- on a real backdoor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["flooding", pytest.param("lga", marks=pytest.mark.slow)])
def test_what_is_isolated_is_poison(digits_attack: AttackResult, loss: str) -> None:
    """Nothing but the isolation: unlearning 14 samples is beyond the method."""
    abl = defenses.create("abl", loss=loss, finetune_epochs=0, unlearn_epochs=0)
    result = defenses.defend(abl, digits_attack, seed=0, device="cpu", progress=False)
    scores, flags = rows(result)
    assert int(flags.sum()) == int(0.01 * len(digits_attack.train))
    assert result.metrics["precision"] >= 0.95
    assert result.metrics["precision_top_01"] == result.metrics["precision"]
    assert result.metrics["precision_top_05"] > 0.8
    assert result.metrics["auroc"] > 0.9
    assert metrics.detection(-scores, digits_attack.poisoned)["auroc"] < 0.1
    if loss == "flooding":
        last = [row["loss"] for row in result.history][-1]
        assert last == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_whole_schedule_on_digits(digits_attack: AttackResult) -> None:
    result = defenses.defend("abl", digits_attack, seed=0, device="cpu", progress=False)
    assert result.metrics["precision"] >= 0.95
    assert result.metrics["c_acc"] >= 0.9
    assert not math.isnan(result.metrics["der"])
