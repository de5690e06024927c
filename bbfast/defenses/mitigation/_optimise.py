"""Trainings on the hold-out whose steps a program defines: the recipe's frame and the shared call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import naming
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.view import DefenderView

if TYPE_CHECKING:
    from bbfast.training import Program, Recipe

__all__ = ["float32_recipe", "optimise"]


def float32_recipe(view: DefenderView, **settings: Any) -> Recipe:
    """A recipe in float32 with a constant rate, without crops and flips unless ``settings`` say so.

    Methods that differentiate by the image follow signs and second derivatives, which bf16 would drown in rounding.
    """
    from bbfast.training import Recipe

    trained = view.recipe
    fixed = {"schedule": "constant", "augment": False, "precision": "fp32", "eval_every": 0, "cuda_graphs": False}
    return Recipe(**{**fixed, "deterministic": trained is not None and trained.deterministic, **settings})


def optimise(
    model: nn.Module,
    images: ImageSet,
    view: DefenderView,
    recipe: Recipe,
    program: Program,
    *,
    tag: str,
    remedy: str,
    free: bool = True,
) -> list[dict[str, Any]]:
    """Train ``model`` in place by ``program``; with 0 epochs not one bit of it changes.

    Args:
        model: On the view's device; in eval mode afterwards, its ``requires_grad`` as before.
        images: Images to train on.
        view: For the seed, the device and the checkpoint folder.
        recipe: How to train.
        program: What a step does.
        tag: Name of this training: of its seed, its checkpoint and its progress bar.
        remedy: What to do when the loss stops being finite, with the settings in force.
        free: Train every parameter; False trains those whose ``requires_grad`` is set.

    Returns:
        One dict an epoch.

    Raises:
        DivergedError: if the loss stops being finite.
    """
    from bbfast.training import train

    if recipe.epochs == 0:
        return []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with trainable(model), naming(view.method, tag, remedy):
        if not free:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        done = train(
            model,
            images,
            recipe,
            seed=view.derive_seed(tag),
            device=view.device,
            program=program,
            checkpoint=view.checkpoint / tag if view.checkpoint is not None else None,
            progress=view.progress,
            description=f"{view.method}: {tag}",
        )
    return list(done.history)
