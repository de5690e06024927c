"""C-Acc, ASR, R-Acc from predictions; DER and RIR from them before and after a defense.

Source: Wu et al., BackdoorBench, NeurIPS 2022 and IJCV 2025 (arXiv 2401.15002), section on metrics. The reference has
two more helpers that compute DER and RIR from raw predictions with a plus before the accuracy term and with backdoor
predictions in it; they contradict the paper and are not reproduced.
"""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bbfast.metrics._arrays import classes, fractions, same_length

__all__ = ["accuracy_per_class", "asr", "c_acc", "der", "r_acc", "rir"]

Values: TypeAlias = "ArrayLike | Tensor"


def c_acc(predictions: Values, labels: Values) -> float:
    """Clean accuracy: how often clean test images are given their own label.

    Args:
        predictions: Predicted classes, integers ``[N]``.
        labels: True classes, integers ``[N]``.

    Returns:
        A fraction in 0..1; NaN if N = 0.

    Raises:
        TypeError: if either is not integer.
        ValueError: if lengths differ, there is not one dimension, or a class is negative.
    """
    return _agreement(predictions, labels, "labels")


def asr(predictions: Values, target_labels: Values) -> float:
    """Attack success rate: how often images with the trigger are given the label that the attacker wants.

    For an all-to-one attack the images must not include any whose true label is the target. Arguments, result and
    errors are those of :func:`c_acc`, with ``target_labels`` integers ``[N]``.
    """
    return _agreement(predictions, target_labels, "target_labels")


def r_acc(predictions: Values, original_labels: Values) -> float:
    """Robust accuracy: how often images with the trigger are still given their true label.

    From the same predictions as :func:`asr`, so ASR + R-Acc <= 1 wherever target and true label differ. Arguments,
    result and errors are those of :func:`c_acc`, with ``original_labels`` integers ``[N]``.
    """
    return _agreement(predictions, original_labels, "original_labels")


def accuracy_per_class(predictions: Values, labels: Values, num_classes: int) -> NDArray[np.float64]:
    """How often the samples of each class are predicted as ``labels`` says.

    With target or original labels it gives the per-class ASR or R-Acc.

    Args:
        predictions: Predicted classes, integers ``[N]``.
        labels: Integers ``[N]`` in ``0..num_classes-1``.
        num_classes: K >= 1.

    Returns:
        float64 ``[K]``; NaN for a class without samples.

    Raises:
        TypeError: if predictions or labels are not integer.
        ValueError: if lengths differ or a label is not a class.
    """
    predicted, wanted = _pair(predictions, labels, "labels")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if wanted.size and wanted.max() >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {wanted.max()}")
    count = np.bincount(wanted, minlength=num_classes)
    right = np.bincount(wanted[predicted == wanted], minlength=num_classes)
    return np.divide(right, count, out=np.full(num_classes, np.nan), where=count > 0)


@overload
def der(c_acc_before: float, asr_before: float, c_acc_after: float, asr_after: float) -> float: ...
@overload
def der(c_acc_before: Values, asr_before: Values, c_acc_after: Values, asr_after: Values) -> Any: ...
def der(c_acc_before: Any, asr_before: Any, c_acc_after: Any, asr_after: Any) -> Any:
    """Defense effectiveness rating: the fall of ASR, less the fall of C-Acc.

    ``(max(0, asr_before - asr_after) - max(0, c_acc_before - c_acc_after) + 1) / 2``: 0.5 if the defense changes
    nothing, 1 if ASR falls from 1 to 0 at no cost, 0 if all accuracy is lost for nothing. A rise of C-Acc earns
    nothing, a rise of ASR costs nothing. A destroyed model can look fair, so show C-Acc beside it.

    Args:
        c_acc_before: C-Acc without the defense, measured on the same test sets as after it.
        asr_before: ASR without the defense.
        c_acc_after: C-Acc with it.
        asr_after: ASR with it. Each a fraction, or an array or tensor of fractions; shapes broadcast.

    Returns:
        A float in 0..1, or a float64 array (tensor, if any argument is a tensor with dimensions); NaN where an argument
        is.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if one lies outside 0..1, or shapes do not fit.
    """
    parts = {"c_acc_before": c_acc_before, "asr_before": asr_before, "c_acc_after": c_acc_after, "asr_after": asr_after}
    return _rating(parts, ("asr_before", "asr_after"))


@overload
def rir(c_acc_before: float, r_acc_before: float, c_acc_after: float, r_acc_after: float) -> float: ...
@overload
def rir(c_acc_before: Values, r_acc_before: Values, c_acc_after: Values, r_acc_after: Values) -> Any: ...
def rir(c_acc_before: Any, r_acc_before: Any, c_acc_after: Any, r_acc_after: Any) -> Any:
    """Robust improvement rating: the rise of R-Acc, less the fall of C-Acc.

    ``(max(0, r_acc_after - r_acc_before) - max(0, c_acc_before - c_acc_after) + 1) / 2``; mind that R-Acc is after less
    before. Arguments, result and errors are those of :func:`der` with R-Acc in place of ASR.
    """
    parts = {"c_acc_before": c_acc_before, "r_acc_before": r_acc_before, "c_acc_after": c_acc_after}
    return _rating({**parts, "r_acc_after": r_acc_after}, ("r_acc_after", "r_acc_before"))


def _rating(parts: dict[str, Any], gain: tuple[str, str]) -> Any:
    values = {name: fractions(name, value) for name, value in parts.items()}
    try:
        np.broadcast_shapes(*(value.shape for value in values.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
        raise ValueError(f"the arguments must be numbers or have shapes that fit together, got {shapes}") from None
    gained = np.maximum(0.0, values[gain[0]] - values[gain[1]])
    lost = np.maximum(0.0, values["c_acc_before"] - values["c_acc_after"])
    rating = (gained - lost + 1.0) / 2.0
    if rating.ndim == 0:
        return float(rating)
    tensor = next((value for value in parts.values() if isinstance(value, Tensor) and value.dim()), None)
    return rating if tensor is None else torch.from_numpy(rating).to(tensor.device)


def _agreement(predictions: Values, labels: Values, name: str) -> float:
    predicted, wanted = _pair(predictions, labels, name)
    return float((predicted == wanted).mean()) if wanted.size else float("nan")


def _pair(predictions: Values, labels: Values, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predicted, wanted = classes("predictions", predictions), classes(name, labels)
    same_length(**{"predictions": predicted, name: wanted})
    return predicted, wanted
