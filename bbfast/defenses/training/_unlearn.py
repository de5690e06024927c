"""Unlearning: gradient ascent on samples that should not have been learned."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import naming
from bbfast.defenses.training._abl_programs import Ascent, AscentLimit, AscentStopped
from bbfast.defenses.view import DefenderView
from bbfast.training import Recipe, train

__all__ = ["Unlearned", "ascend", "sgd_recipe"]


@dataclasses.dataclass(frozen=True)
class Unlearned:
    """What :func:`ascend` did: one dict an epoch, and how many epochs there were."""

    rows: list[dict[str, Any]]
    epochs: int


def sgd_recipe(view: DefenderView, batch_size: int, weight_decay: float) -> Recipe:
    """SGD with momentum 0.9 at a constant rate, with the data set's crops and flips; the rest is of the view's recipe.

    Crops and flips are the methods' own, as their papers have them: fine-tuning follows the attacked model's training
    there (:mod:`bbfast.defenses.mitigation._finetune`), this does not.
    """
    return (view.recipe or Recipe()).replace(
        batch_size=batch_size,
        optimizer="sgd",
        momentum=0.9,
        nesterov=False,
        weight_decay=weight_decay,
        schedule="constant",
        label_smoothing=0.0,
        flooding=0.0,
        clip_grad_norm=None,
        drop_last=False,
        augment=True,
        padding=view.padding,
        flip=view.flip,
        eval_every=0,
    )


def ascend(
    view: DefenderView,
    model: nn.Module,
    forgotten: ImageSet,
    recipe: Recipe,
    ascent_stop: float | None,
    method: str,
    what: str = "flagged",
) -> Unlearned:
    """Gradient ascent on the cross-entropy of ``forgotten``; ``model`` is changed in place.

    Args:
        view: Has seed, device, checkpoint folder and number of classes.
        model: What should forget.
        forgotten: At least two samples with the labels to forget.
        recipe: How to train.
        ascent_stop: Ends it after the first epoch in which the mean loss on ``forgotten`` is above this or their
            accuracy below chance; None never does.
        method: Who unlearns, for messages.
        what: What ``forgotten`` is, for messages.

    Raises:
        DivergedError: if the loss stops being finite, which unbounded ascent can bring about.
    """
    limits = [] if ascent_stop is None else [AscentLimit(forgotten, ascent_stop, view.num_classes, view.device)]
    remedy = f"end it in time with ascent_stop=10, or lower lr_unlearn (now {recipe.lr:g}) or unlearn_epochs"
    try:
        with naming(method, f"gradient ascent on {len(forgotten)} {what} samples", remedy):
            done = train(
                model,
                forgotten,
                recipe,
                seed=view.seed,
                device=view.device,
                callbacks=limits,
                program=Ascent(),
                checkpoint=None if view.checkpoint is None else view.checkpoint / "unlearn",
                progress=view.progress,
                description=f"{method} unlearn",
            )
    except AscentStopped as stop:
        return Unlearned(stop.rows, stop.epochs)
    return Unlearned(done.history, recipe.epochs)
