"""Arguments of the metrics as checked numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["bools", "classes", "floats", "fractions", "same_length"]


def classes(name: str, values: Any) -> NDArray[np.int64]:
    """Class numbers ``[N]``, integers >= 0.

    Raises:
        TypeError: if the values are not integers (logits, one-hot rows).
        ValueError: if there is not one dimension, or a number is negative.
    """
    array = _array(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integer class numbers [N] (argmax of logits), got {array.dtype}")
    _one_dimension(name, array)
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must be class numbers >= 0, got {array.min()}")
    return array.astype(np.int64, copy=False)


def floats(name: str, values: Any) -> NDArray[np.float64]:
    """Numbers ``[N]`` as float64; NaN and infinities pass.

    Raises:
        TypeError: if the values are not real numbers.
        ValueError: if there is not one dimension.
    """
    array = _array(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be real numbers [N], got {array.dtype}")
    _one_dimension(name, array)
    return array.astype(np.float64, copy=False)


def fractions(name: str, values: Any) -> NDArray[np.float64]:
    """Numbers in 0..1 or NaN, of any shape, as float64.

    Raises:
        TypeError: if the values are not real numbers.
        ValueError: if one lies outside 0..1, as percentages do.
    """
    array = _array(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a number or an array of numbers, got {array.dtype}")
    array = array.astype(np.float64, copy=False)
    outside = array[(array < 0) | (array > 1)]
    if outside.size:
        raise ValueError(f"{name} must be a fraction in 0..1 (not percent), got {outside.flat[0]:g}")
    return array


def bools(name: str, values: Any) -> NDArray[np.bool_]:
    """Booleans, or integers 0 and 1, ``[N]``.

    Raises:
        TypeError: if the values are neither.
        ValueError: if there is not one dimension, or an integer is not 0 or 1.
    """
    array = _array(values)
    if array.size == 0:
        array = array.astype(bool)
    if array.dtype.kind not in "biu":
        raise TypeError(f"{name} must be bool [N], got {array.dtype}")
    _one_dimension(name, array)
    if array.dtype.kind != "b" and array.size and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be bool or 0 and 1, got {array[~np.isin(array, (0, 1))][0]}")
    return array.astype(bool, copy=False)


def same_length(**arrays: NDArray[Any]) -> None:
    """Raise ``ValueError`` unless all have as many entries."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{' and '.join(lengths)} must have the same length, got {' and '.join(map(str, lengths.values()))}"
        )


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray((values.double() if values.is_floating_point() else values).numpy())
    if isinstance(values, (list, tuple)) and any(isinstance(item, Tensor) for item in values):
        values = [item.item() if isinstance(item, Tensor) else item for item in values]
    return np.asarray(values)


def _one_dimension(name: str, array: NDArray[Any]) -> None:
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension [N], got shape {list(array.shape)}")
