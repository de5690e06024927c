"""Which defenses take which models: asked of the methods themselves, before there is a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses._applicable import check_model
from bbfast.defenses.base import Defense, create
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.prediction import evaluating

__all__ = ["refusal"]

_SAMPLES, _EACH = 2000, 20
"""Stand-in samples: so many, and at least so many of each class. Enough for every method."""


def refusal(
    defense: str | Defense, model: str | nn.Module, num_classes: int = 10, image_size: Sequence[int] = (3, 32, 32)
) -> str | None:
    """Why a defense does not work on a model; None if it does.

    The model is built without memory for its weights and goes through the checks that precede every run, with stand-in
    data of sufficient size: nothing is computed.

    Args:
        defense: Name or alias, or a defense with settings.
        model: Name of a model, or one that was built.
        num_classes: Number of classes K.
        image_size: ``(C, H, W)``.

    Returns:
        One sentence, as :class:`bbfast.errors.UnsupportedModelError` would say it, or None.

    Raises:
        UnknownNameError: if there is no such defense or model.
    """
    from bbfast.models import build
    from bbfast.training import Recipe

    method = create(defense) if isinstance(defense, str) else defense
    channels, height, width = image_size
    if isinstance(model, str):
        with torch.device("meta"):
            model = build(model, num_classes, (channels, height, width))
    labels = torch.arange(num_classes).repeat_interleave(max(_EACH, _SAMPLES // num_classes))
    images = torch.zeros(1, channels, height, width, dtype=torch.uint8).expand(len(labels), -1, -1, -1)
    facts = DataFacts("stand-in", num_classes, (channels, height, width), (0.5,) * channels, (0.25,) * channels)
    grants = _grants(model, images, labels)
    view = DefenderView(method.name, method.card.needs, facts, grants, recipe=Recipe())
    try:
        check_model(method.name, method.card.needs, model)
        with evaluating(model):
            method.check(view)
    except UnsupportedModelError as error:
        return str(error)
    except DataRequirementError:
        pass  # of the stand-in data; what the real ones lack is the run's to say
    return None


def _grants(model: nn.Module, images: Tensor, labels: Tensor) -> Grants:
    some = ImageSet(images, labels)
    return Grants(
        model=model,
        model_spec=None if getattr(model, "bbfast_spec", None) is None else _Built(model),
        clean=some,
        reserve=some,
        poisoned_train=some,
        stream=Stream(images),
    )


class _Built:
    """Stands for a model's plan where checks look at a new one of its kind: it has the same layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def build(self, weights: bool = True) -> nn.Module:
        return self._model
