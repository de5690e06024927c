"""FT: what fine-tuning does and leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.mitigation._finetune import batch_size_for, trainable
from bbfast.defenses.mitigation.ft import FTConfig
from bbfast.defenses.view import DefenderView

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)


def test_no_epoch_changes_no_bit(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    result = defenses.defend(defenses.create("ft", epochs=0), attack, 0.2, device="cpu")
    assert result.model is not None and same_state(result.model, attack.model)
    assert result.metrics["der"] == 0.5 and result.history == []


def test_it_trains_everything_on_the_holdout(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    frozen = next(attack.model.parameters())
    frozen.requires_grad_(False)
    result = defenses.defend(defenses.create("ft", epochs=12, lr=0.05), attack, 0.5, device="cpu", progress=False)
    assert result.model is not None and not result.model.training
    changed = [not torch.equal(a, b) for a, b in zip(result.model.parameters(), attack.model.parameters(), strict=True)]
    assert all(changed), "every parameter is trained, frozen ones too"
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in attack.model.parameters()]
    means = {k: v for k, v in result.model.state_dict().items() if "running_mean" in k}
    assert means and not any(torch.equal(v, attack.model.state_dict()[k]) for k, v in means.items())
    assert len(result.history) == 12 and result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.info["data_used"] == ["clean", "model"]


def test_same_seed_same_bits(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    runs = [
        defenses.defend(defenses.create("ft", epochs=2), attack, 0.3, seed=seed, device="cpu", progress=False)
        for seed in (0, 0, 1)
    ]
    assert same_state(runs[0].model, runs[1].model)  # type: ignore[arg-type]
    assert not same_state(runs[0].model, runs[2].model)  # type: ignore[arg-type]


def test_a_last_batch_of_one_image(
    toy_view: MakeView, toy_images: Callable[..., ImageSet], toy_attack: MakeAttack
) -> None:
    """33 images in batches of 16 leave one over, on which BatchNorm cannot train."""
    view = toy_view(toy_attack().model, clean=toy_images(33, 4), progress=False)
    result = defenses.create("ft", epochs=1, batch_size=16).run(view)
    assert all(p.isfinite().all() for p in result.model.parameters())  # type: ignore[union-attr]


def test_the_recipe(toy_view: MakeView, toy_images: Callable[..., ImageSet]) -> None:
    view = toy_view(clean=toy_images(40, 4))
    recipe = FTConfig().recipe(view, 2500, 200, 0.01)
    assert (recipe.batch_size, recipe.schedule, recipe.t_max, recipe.momentum) == (256, "cosine", None, 0.9)
    assert (recipe.augment, recipe.padding, recipe.flip, recipe.weight_decay) == (True, 2, False, 5e-4)
    assert FTConfig(preset="reference").recipe(view, 71, 200, 0.01).t_max == 100
    assert FTConfig(preset="reference").recipe(view, 71, 200, 0.01).batch_size == 256
    assert FTConfig(amp="off").recipe(view, 71, 1, 0.01).precision == "fp32"
    tiny = FTConfig().for_dataset("tiny_imagenet")
    assert (tiny.epochs, tiny.scheduler) == (200, "plateau")


@pytest.mark.parametrize(
    ("size", "batch"), [(2500, 256), (1960, 256), (5000, 256), (72, 16), (250, 32), (0, 16), (600, 64)]
)
def test_batches_keep_the_papers_number_of_steps(size: int, batch: int) -> None:
    assert batch_size_for(size) == batch
    if size >= 128:
        assert 6 <= size / batch <= 20


def test_trainable_puts_flags_back() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="boom"), trainable(net):
        assert net.bias.requires_grad
        raise RuntimeError("boom")
    assert net.weight.requires_grad and not net.bias.requires_grad


def test_a_killed_run_goes_on(toy_attack: MakeAttack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bbfast.training.program import Program

    attack = toy_attack()
    attack.config["recipe"]["deterministic"] = True
    defense = defenses.create("ft", epochs=4)
    whole = defenses.defend(defense, attack, 0.3, device="cpu", progress=False)
    ended: list[int] = []

    def killed(self: Program, epoch: int, model: nn.Module) -> dict[str, float]:
        ended.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Program, "epoch_end", killed)
        with pytest.raises(KeyboardInterrupt):
            defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    assert ended == [0, 1, 2]
    again = defenses.defend(defense, attack, 0.3, device="cpu", progress=False, checkpoint=tmp_path / "work")
    assert same_state(whole.model, again.model)  # type: ignore[arg-type]


def test_it_repairs_and_survives_the_disk(digits_attack: AttackResult, tmp_path: Path) -> None:
    """On the digits fine-tuning weakens the backdoor and keeps the accuracy; bounds from five seeds with margin."""
    result = defenses.defend(defenses.create("ft", epochs=40), digits_attack, device="cpu", progress=False)
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.08
    assert result.metrics["der"] >= 0.5 - 0.04
    again = DefenseResult.load(result.save(tmp_path / "ft"))
    assert same_state(again.model, result.model)  # type: ignore[arg-type]
    assert again.config == result.config and again.metrics == result.metrics
