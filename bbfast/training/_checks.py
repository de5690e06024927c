"""What is checked before a run does any work."""

from __future__ import annotations

import torch
from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.training.device import Numerics
from bbfast.training.prediction import outputs
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["check_arguments", "check_fit"]


def check_arguments(
    model: object, train: object, recipe: object, program: object, seed: object, **tests: object
) -> None:
    """Types of the arguments of ``train``; raises TypeError or ValueError naming the argument."""
    _check_type("model", model, nn.Module, "a torch.nn.Module")
    _check_type("train", train, ImageSet, "an ImageSet (the training part of a DataPair is its .train)")
    _check_type("recipe", recipe, Recipe, "a Recipe (Recipe.preset('quick', dataset=...) gives one)")
    for name, value in tests.items():
        if value is not None:
            _check_type(name, value, ImageSet, "an ImageSet or None")
    if program is not None:
        _check_type("program", program, Program, "a Program or None")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    assert isinstance(train, ImageSet)
    if not len(train):
        raise ValueError("train must hold at least one image, got an empty set")


def check_fit(model: nn.Module, device: torch.device, numerics: Numerics, **sets: ImageSet | None) -> None:
    """Whether the model takes the images and has an output for every label.

    Runs the model once on one image of the training set.

    Raises:
        ValueError: naming the set, what was expected and what came.
    """
    train = sets["train"]
    assert train is not None
    sample = train[:1]
    try:
        logits = next(outputs(model, sample, 1, device, numerics))
    except (RuntimeError, ValueError, TypeError) as error:
        if "deterministic" in str(error):
            raise
        shape = [1, *train.image_size]
        raise ValueError(f"the model cannot process images of shape {shape}: {str(error).splitlines()[0]}") from error
    if logits.dim() != 2 or logits.shape[0] != 1:
        raise ValueError(f"the model must give one row of logits an image, [1, K], got shape {list(logits.shape)}")
    for name, images in sets.items():
        if images is None or not len(images):
            continue
        if images.image_size != train.image_size:
            raise ValueError(
                f"{name} must have images of size {train.image_size} as train has, got {images.image_size}"
            )
        largest = int(images.labels.max())
        if largest >= logits.shape[1]:
            raise ValueError(
                f"{name}.labels must be below {logits.shape[1]}, the number of the model's outputs, got {largest}; "
                f"build the model with num_classes={largest + 1} or more"
            )


def _check_type(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
