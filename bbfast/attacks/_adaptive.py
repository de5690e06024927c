"""What the two adaptive attacks share: cover samples of any class, and the peer's recipe (Qi et al., ICLR 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bbfast.attacks._cover import CoverConfig, draw_cover
from bbfast.attacks.base import Attack
from bbfast.attacks.poisoning import LabelRule
from bbfast.training.recipe import Recipe

__all__ = ["LABEL_MODES", "PAPER", "AdaptiveAttack", "AdaptiveConfig"]

PAPER = "Revisiting the Assumption of Latent Separability for Backdoor Defenses"
LABEL_MODES = ("all2one", "all2all", "one2one")
"""Not clean_label: a cover sample of the target class would be a poisoned one."""


class AdaptiveConfig(CoverConfig):
    """Settings that the adaptive attacks share.

    Args:
        recipe: What the ``paper`` preset of :func:`bbfast.attack` becomes: ``protocol`` leaves it as it is for every
            attack, ``peer`` takes the authors' (SGD .1, weight decay 1e-4, 100 epochs, a tenth at 50 and 75).
    """

    recipe: Literal["protocol", "peer"] = "protocol"


class AdaptiveAttack(Attack):
    """Poisoned samples of any class, and cover samples of any class among the rest."""

    cover_per_poison: ClassVar[float]
    config: AdaptiveConfig

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        poison = self._select_poison(labels, rule, seed)
        free = torch.ones_like(labels, dtype=torch.bool)
        free[poison] = False
        rest = free.nonzero().flatten()
        args = (self.name, self.config, len(labels), len(poison), self.cover_per_poison, rest, seed)
        return poison, draw_cover(*args)

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        if self.config.recipe == "protocol":
            return {}
        settings: dict[str, Any] = {"epochs": 100, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4}
        return {**settings, "schedule": "multistep", "milestones": (50, 75), "gamma": 0.1}
