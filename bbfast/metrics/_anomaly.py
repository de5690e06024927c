"""Outliers among classes by the median absolute deviation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bbfast.metrics._arrays import floats

__all__ = ["anomaly_index"]


def anomaly_index(
    values: ArrayLike | Tensor,
    *,
    side: Literal["both", "low", "high"] = "both",
    median: Literal["average", "lower"] = "average",
    scale: float = 1.4826,
) -> Any:
    """How many robust standard deviations each value lies from the median: ``|v - med| / (scale * MAD)``.

    ``MAD`` is the median of ``|v - med|``. Medians are over the finite values. Where ``MAD`` is 0 the index is 0 for
    values at the median and infinite for all others. An infinite value (a class whose trigger was never found) has an
    infinite index on its side; NaN stays NaN.

    Args:
        values: One number per class, real ``[K]``.
        side: "both"; or "low" or "high" to give 0 to every value not below, or not above, the median.
        median: What the median of an even number of values is: their middle two's "average", or the "lower" one, which
            is torch.median's and Neural Cleanse's reference implementation's.
        scale: Factor that makes MAD the standard deviation of a normal distribution; 1 gives plain MAD units.

    Returns:
        float64 ``[K]``, a tensor on its device if ``values`` is one, else an array; all NaN if no value is finite.

    Raises:
        TypeError: if the values are not real numbers.
        ValueError: if there is not one dimension, ``scale`` is not positive, or an option is unknown.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section IV-B; Hampel 1974.
    """
    array = floats("values", values)
    if side not in ("both", "low", "high"):
        raise ValueError(f"side must be 'both', 'low' or 'high', got {side!r}")
    if median not in ("average", "lower"):
        raise ValueError(f"median must be 'average' or 'lower', got {median!r}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    index = _index(array, side, median, scale)
    return torch.from_numpy(index).to(values.device) if isinstance(values, Tensor) else index


def _index(array: NDArray[np.float64], side: str, median: str, scale: float) -> NDArray[np.float64]:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return np.full(len(array), np.nan)
    method: Any = "lower" if median == "lower" else "averaged_inverted_cdf"
    middle = np.quantile(finite, 0.5, method=method)
    spread = scale * np.quantile(np.abs(finite - middle), 0.5, method=method)
    deviation = np.abs(array - middle)
    # 0/0 is replaced; x/0, and an overflow by a spread of next to nothing, are the infinity that is meant.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        index = np.where(deviation == 0, 0.0, deviation / spread)
    if side == "low":
        return np.where(array >= middle, 0.0, index)
    return np.where(array <= middle, 0.0, index) if side == "high" else index
