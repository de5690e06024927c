"""A fresh model trained on what a detector left of the training set."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bbfast.defenses._diverged import naming
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError

__all__ = ["demand_recipe", "retrain"]


def demand_recipe(view: DefenderView, method: str, remedy: str = "") -> None:
    """For ``check``: refuse a run that would train without knowing how.

    Raises:
        DataRequirementError: if the view has no recipe.
    """
    if view.recipe is None:
        raise DataRequirementError(f"{method} trains models, but this run has no recipe; give recipe={remedy}")


def retrain(
    view: DefenderView, keep: Tensor, method: str, stage: str = "retrain"
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train a fresh model on the samples that are kept, with the view's recipe and seed.

    Args:
        view: Grants ``poisoned_train`` and ``fresh_model`` and has a recipe (:func:`demand_recipe`).
        keep: bool ``[N]``, in the order of the training set.
        method: Who trains, for messages.
        stage: Name of the training: its checkpoint's folder.

    Returns:
        The model and one dict an epoch.

    Raises:
        DataRequirementError: if nothing is kept.
        DivergedError: if the loss stops being finite.
    """
    from bbfast.training import train

    assert view.recipe is not None, "retrain is for views that demand_recipe let through"
    if not bool(keep.any()):
        raise DataRequirementError(f"{method} flagged all {len(keep)} training samples, nothing is left to train on")
    with naming(method, stage, f"give a recipe= with a lower lr (now {view.recipe.lr:g})"):
        done = train(
            view.fresh_model(),
            view.poisoned_train.subset(keep.cpu()),
            view.recipe,
            seed=view.seed,
            device=view.device,
            checkpoint=None if view.checkpoint is None else view.checkpoint / stage,
            progress=view.progress,
            description=f"{method} {stage}",
        )
    return done.model, done.history
