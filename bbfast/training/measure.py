"""C-Acc, ASR and R-Acc while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.training.device import Numerics
from bbfast.training.prediction import outputs

__all__ = ["measure"]

_BATCH = 512


def measure(
    model: nn.Module, test: ImageSet | None, backdoor_test: ImageSet | None, device: torch.device, numerics: Numerics
) -> dict[str, float]:
    """Accuracies of a model that is on ``device`` already; empty or missing sets are left out.

    Args:
        model: The model; its mode is as before afterwards.
        test: Clean test images, for ``c_acc``.
        backdoor_test: Triggered test images, for ``asr`` and, if the original labels are known, ``r_acc``.
        device: Where the model is.
        numerics: Number format.
    """
    row = {}
    if test is not None and len(test):
        row["c_acc"] = _share(_labels(model, test, device, numerics), test.labels)
    if backdoor_test is not None and len(backdoor_test):
        predicted = _labels(model, backdoor_test, device, numerics)
        row["asr"] = _share(predicted, backdoor_test.labels)
        if isinstance(backdoor_test, BackdoorSet):
            row["r_acc"] = _share(predicted, backdoor_test.original_labels)
    return row


def _labels(model: nn.Module, images: ImageSet, device: torch.device, numerics: Numerics) -> Tensor:
    return torch.cat([part.argmax(1) for part in outputs(model, images, _BATCH, device, numerics)])


def _share(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels.to(predicted.device)).double().mean().cpu())
