"""SEAM: selective amnesia."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._optimise import float32_recipe, optimise
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.training import predict_labels
from bbfast.training.program import Batch, Program, derive_seed

if TYPE_CHECKING:
    from bbfast.training import EpochInfo, Recipe

__all__ = ["SEAM", "SEAMConfig", "UntilAccuracy", "WrongLabels", "wrong_labels"]


class SEAMConfig(DefenseConfig):
    """Settings of SEAM.

    Args:
        forget_share: Part of the hold-out that is forgotten; the authors use a tenth as many images as to recover.
        forget_epochs: Passes of the forgetting at most (100 on the digits).
        forget_below: Accuracy on them, in 0..1, below which they count as forgotten; None is ``min(2 / K, 0.6)``.
        recover_epochs: Passes of the recovery at most (200 on the digits).
        recover_above: Accuracy on the hold-out, in 0..1, above which the recovery ends.
        lr: Adam's learning rate in both steps.
        batch_size: Samples a step, in both steps (16 on the digits).
        amp: Precision of the network: ``auto`` is bfloat16 where the device gains, ``off`` is float32.
        channels_last: Memory layout; ``auto`` where the device gains.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "paper": {"batch_size": 32}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: steps. A tenth of 72 images is one batch an epoch instead of 16, the hold-out five instead of 157.
        "digits": {"forget_epochs": 100, "recover_epochs": 200, "batch_size": 16},
    }

    forget_share: float = Field(0.1, gt=0, le=1)
    forget_epochs: int = Field(10, ge=0)
    forget_below: float | None = Field(None, gt=0, le=1)
    recover_epochs: int = Field(100, ge=0)
    recover_above: float = Field(0.97, gt=0, le=1)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(32, ge=2)
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    stratified: bool = False

    def recipe(self, view: DefenderView, epochs: int) -> Recipe:
        """Adam at a constant rate on images as they are stored."""
        return float32_recipe(
            view,
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="adam",
            weight_decay=0.0,
            precision="fp32" if self.amp == "off" else self.amp,
            channels_last=self.channels_last,
        )

    def forgotten(self, num_classes: int) -> float:
        """Accuracy below which images count as forgotten."""
        return min(2 / num_classes, 0.6) if self.forget_below is None else self.forget_below


def wrong_labels(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """For each label one of the others, all equally likely: int64 ``[B]``; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


class UntilAccuracy(Program):
    """Plain training in which every batch is left out once the accuracy on the training set has passed a bound.

    The accuracy is taken after every epoch, in eval mode, of the labels as given. The epochs that are left then are
    not run: :class:`_Reached` carries the early end out of the engine.

    Args:
        bound: The accuracy, in 0..1.
        above: Whether it must rise above the bound, or fall below it.
    """

    def __init__(self, bound: float, above: bool) -> None:
        self._bound, self._above = bound, above

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "bound": self._bound, "above": self._above}
