"""Detectors that inspect either the training set or a stream of incoming images."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from bbfast.defenses.card import DefenseCard
from bbfast.defenses.view import DefenderView

__all__ = ["Stage", "inspected_images", "staged"]

Stage = Literal["train", "inference"]

_SOURCE = {"train": "poisoned_train", "inference": "stream"}
_KIND = {"train": "detection", "inference": "inference"}


def staged(card: DefenseCard, stage: Stage) -> DefenseCard:
    """The card of a detector set to one stage: what it does not inspect it does not ask for, and its results are of
    that stage's kind. Attacks without a training set can then be inspected at inference time."""
    others = frozenset(_SOURCE.values()) - {_SOURCE[stage]}
    kinds = tuple(sorted(card.kinds, key=lambda kind: kind != _KIND[stage]))
    return dataclasses.replace(card, needs=card.needs - others, kinds=kinds)


def inspected_images(view: DefenderView, stage: Stage) -> Tensor:
    """The images that are scored, uint8 ``[N, C, H, W]``."""
    return view.poisoned_train.images if stage == "train" else view.stream.images
