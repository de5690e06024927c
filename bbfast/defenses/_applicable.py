"""What keeps a defense from being run on an attack's result, found before any work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import normalize
from bbfast.defenses.base import Defense
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.models import roles

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult

__all__ = ["check_model", "check_outputs", "training_set", "warn_of_absent_classes"]

_log = logging.getLogger(__name__)


def check_model(method: str, needs: frozenset[str], model: nn.Module | None) -> None:
    """Refuse a model without what the card of ``method`` names.

    Raises:
        DataRequirementError: if there is none, but it is needed.
        UnsupportedModelError: if it lacks BatchNorm layers or the plan to build it anew.
    """
    if not needs & {"model", "batch_norm", "fresh_model"}:
        return
    if not isinstance(model, nn.Module):
        raise DataRequirementError(
            f"defense {method!r} needs the attacked model, which the attack result does not hold"
        )
    if "batch_norm" in needs and not any(isinstance(m, nn.BatchNorm2d) and m.affine for m in model.modules()):
        reason = "it has no BatchNorm2d layer with weights"
        hint = "choose a model with BatchNorm, such as preactresnet18 or vgg19_bn"
        raise UnsupportedModelError(method, _name(model), reason, hint)
    if "fresh_model" in needs and getattr(model, "bbfast_spec", None) is None:
        reason = "it must be trained anew, but carries no plan to build it"
        raise UnsupportedModelError(method, _name(model), reason, "build it with bbfast.models.build")


def check_outputs(method: str, needs: frozenset[str], model: nn.Module, num_classes: int, image: ImageSet) -> None:
    """Refuse a model of another number of classes than the data.

    Args:
        method: Name, for messages.
        needs: Its card's; without a model there is nothing to check.
        model: The attacked model. One that :func:`bbfast.models.build` made is asked for its last layer, another is run
            on ``image``, in eval mode.
        num_classes: Classes of the data.
        image: One image.

    Raises:
        UnsupportedModelError: with both numbers; or if the model cannot process the image.
    """
    if not needs & {"model", "fresh_model"}:
        return
    last = _last_layer(model)
    found = _run_once(method, model, image) if last is None else last.out_features
    if found != num_classes:
        reason = f"it has {found} outputs, but the data have {num_classes} classes"
        raise UnsupportedModelError(method, _name(model), reason, "the attack's model and data do not belong together")


def _last_layer(model: nn.Module) -> nn.Linear | None:
    """The classifier, where the model's registration says which layer it is."""
    if getattr(model, "bbfast_spec", None) is None:
        return None  # the last linear layer in the order of registration need not come last
    try:
        last = roles(model).modules("classifier")[-1]
    except UnsupportedModelError:  # its layers were changed
        return None
    return last if isinstance(last, nn.Linear) else None


def _run_once(method: str, model: nn.Module, image: ImageSet) -> int:
    """Number of logits of an image."""
    from bbfast.training.prediction import evaluating

    weight = next(model.parameters(), None)
    device = image.images.device if weight is None else weight.device
    with torch.no_grad(), evaluating(model):
        try:
            logits = model(normalize(image.images.to(device), image.mean, image.std))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = f"it cannot process images of shape {[1, *image.image_size]}: {str(error).splitlines()[0]}"
            raise UnsupportedModelError(method, _name(model), reason) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__qualname__
        raise UnsupportedModelError(method, _name(model), f"it must give logits [1, K] of one image, got {shape}")
    return logits.shape[1]


def training_set(defense: Defense, attack: AttackResult) -> ImageSet:
    """The training set that a method asks for: the poisoned one, or the clean one that its hold-out is drawn from.

    Raises:
        DataRequirementError: if the result has none, or only a clean one where the poisoned one is needed.
    """
    train, needs = attack.train, defense.card.needs
    what = "the poisoned training set" if "poisoned_train" in needs else "a clean hold-out, drawn from the training set"
    if train is None or not len(train):
        raise DataRequirementError(
            f"defense {defense.name!r} is not applicable: it needs {what}, and this attack's result has no training set"
        )
    imported = attack.config.get("imported")
    if "poisoned_train" in needs and imported and not imported["poisoned_train"]:
        raise DataRequirementError(
            f"defense {defense.name!r} is not applicable: it needs {what}, and this imported result has a clean one "
            "only"
        )
    return train


def warn_of_absent_classes(method: str, labels: Tensor, num_classes: int) -> None:
    """Say before the work which classes a hold-out has no image of; methods that need all of them refuse it."""
    absent = torch.nonzero(torch.bincount(labels.cpu(), minlength=num_classes) == 0).flatten().tolist()
    if absent:
        _log.warning(
            "%s: the clean hold-out of %d images has none of class %s; accuracy there may be lost unseen: raise "
            "clean_fraction or draw by class (stratified=True)",
            method,
            len(labels),
            ", ".join(map(str, absent)),
        )


def _name(model: nn.Module) -> str:
    spec = getattr(model, "bbfast_spec", None)
    return str(getattr(spec, "name", type(model).__name__))
