"""ImageNet weights of torchvision, put into a model with another number of classes or channels."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

from torch import nn

from bbfast.errors import BBFastError

__all__ = ["WeightsError", "load_imagenet"]

_log = logging.getLogger(__name__)


class WeightsError(BBFastError):
    """Pretrained weights cannot be fetched."""


def load_imagenet(model: nn.Module, make: Callable[..., nn.Module], name: str, weights: str) -> None:
    """Copy every ImageNet tensor whose name and shape fit into ``model``; what does not fit stays as initialised.

    Args:
        model: The model to fill.
        make: torchvision's function that makes the model.
        name: Its name, for messages.
        weights: Name of the weights (``IMAGENET1K_V1``), not ``DEFAULT``, whose meaning changes with torchvision.

    Raises:
        WeightsError: if they are neither in torch's cache nor downloadable.
    """
    import torch.hub

    try:
        source: dict[str, Any] = make(weights=weights, progress=False).state_dict()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise WeightsError(
            f"the ImageNet weights {weights} of {name} cannot be loaded ({type(error).__name__}: {error}); "
            f"with a network they are downloaded to {folder}; without one, put them there or build with "
            "pretrained=False"
        ) from error
    own = model.state_dict()
    fitting = {key: value for key, value in source.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict({**own, **fitting})
    left = sorted(set(own) - set(fitting))
    _log.info("%s: %d tensors from %s; fresh: %s", name, len(fitting), weights, ", ".join(left) or "none")
