"""A training whose loss stops being finite: who, in which phase, at which step, what to change, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.defenses.mitigation import nc
from bbfast.errors import DivergedError

MakeAttack = Callable[..., AttackResult]
ABSURD = 1e30
SSL = {"ssl_epochs": 1, "ssl_batch": 50}

CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("ft", "fine-tuning", "lr", {"epochs": 2}),
    ("fp", "fine-tuning", "lr", {"epochs": 2}),
    ("ft_sam", "fine-tuning", "lr", {"epochs": 2}),
    ("nad", "teacher", "teacher_lr", {"teacher_epochs": 2, "epochs": 2}),
    ("nad", "student", "lr", {"teacher_epochs": 0, "epochs": 2}),
    ("mcr", "endpoint", "ft_lr", {"ft_epochs": 2, "curve_epochs": 2}),
    ("mcr", "curve", "lr", {"ft_epochs": 0, "curve_epochs": 2}),
    ("nc", "unlearning", "unlearn_lr", {"inversion_epochs": 1, "unlearn_epochs": 2}),
    ("rnp", "gradient ascent", "unlearn_lr", {"unlearn_epochs": 2, "clip_norm": None}),
    ("seam", "forgetting", "lr", {}),
    ("fst", "tuning", "lr", {"epochs": 2}),
    ("sft", "fine-tuning", "lr_first", {"epochs": 2}),
    ("i_bau", "unlearning", "lr", {"rounds": 2}),
    ("sau", "unlearning", "lr", {"rounds": 2}),
    ("npd", "warmup", "warmup_lr", {"warmup_epochs": 2}),
    ("pdb", "training", "lr", {"epochs": 2}),
    ("abl", "isolation", "lr_tuning", {"tuning_epochs": 2, "isolation_ratio": 0.02}),
    ("abl", "finetune", "lr_finetune", {"tuning_epochs": 1, "finetune_epochs": 2, "isolation_ratio": 0.02}),
    ("abl", "gradient ascent", "lr_unlearn", {"tuning_epochs": 1, "finetune_epochs": 0, "isolation_ratio": 0.02}),
    ("nab", "detection", "detect_lr", {"detect_epochs": 2}),
    ("nab", "training", "lr", {"detect_epochs": 1, **SSL}),
    ("d_br", "sensitivity", "sd_lr", {"train_epochs": 2}),
    ("d_st", "contrast", "ssl_lr", {"train_epochs": 1, "sep_epochs": 1, "warmup_epochs": 0, **SSL}),
    ("d_st", "classifier", "cls_lr", {"train_epochs": 1, "sep_epochs": 1, "cls_epochs": 2, "cls_batch": 20, **SSL}),
    ("dbd", "contrast", "ssl_lr", {**SSL, "semi_batch": 20}),
    ("dbd", "semi-supervised", "lr", {**SSL, "semi_batch": 20, "semi_epochs": 2, "semi_iters": 3}),
]


@pytest.mark.parametrize(("name", "phase", "setting", "small"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_the_error_names_method_phase_step_and_setting(
    toy_attack: MakeAttack, monkeypatch: pytest.MonkeyPatch, name: str, phase: str, setting: str, small: dict[str, Any]
) -> None:
    rate: Any = ((0, ABSURD),) if setting == "lr_finetune" else ABSURD
    # A backdoor is always found, so that there is something to unlearn.
    monkeypatch.setattr(nc, "find_targets", lambda triggers, *_: (triggers.norm * 0, [1]))
    attack = toy_attack()
    with pytest.raises(DivergedError) as caught:
        defenses.defend(defenses.create(name, **{**small, setting: rate}), attack, 0.2, device="cpu", progress=False)
    text = str(caught.value)
    assert text.startswith(f"{name}, {phase}") and " epoch" in text
    advice = text.partition("; ")[2]
    assert setting in advice and "1e+30" in advice and "clip_grad_norm" not in text
    kept = caught.value.last_good
    assert kept is not None and all(bool(value.isfinite().all()) for value in kept.values())
    if name in {"ft", "sft", "i_bau"}:
        # The first epoch failed: what is kept is the model as it was given.
        assert all(torch.equal(value, kept[key]) for key, value in attack.model.state_dict().items())


def test_a_detectors_retraining_advises_a_recipe(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    attack.config["recipe"]["lr"] = ABSURD
    with pytest.raises(DivergedError, match=r"^filter_and_retrain, retrain: .* epoch 0 .*recipe=.*lr \(now 1e\+30\)"):
        defenses.filter_and_retrain(attack, attack.poisoned, device="cpu", progress=False)
