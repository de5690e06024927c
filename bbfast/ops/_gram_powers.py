"""Gram matrices of powers of a feature map: Beatrix (Ma et al. 2023, arXiv 2209.11715)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["gram_powers", "gram_powers_reference"]

_MAX_ORDER = 32


def gram_powers(features: Tensor, orders: Iterable[int] = range(1, 9), *, compat: bool = False) -> Tensor:
    """Upper triangles of the signed p-th root of the Gram matrix of the p-th power, for each order p.

    ``G_p = sign(A) |A|^(1/p)`` with ``A = F^p (F^p)^T``, ``F`` the feature map as ``[C, S]`` matrix of S positions,
    power, sign and root elementwise. Entries (i, j) with i <= j come row by row, in the order of
    ``torch.triu_indices(C, C)``.

    ``G_p(c F) = c^2 G_p(F)``, so every channel is shifted by a power of two before it is raised and the result is
    shifted back: high powers neither overflow nor vanish, whatever the features' scale, and no scaling by the layer's
    maximum is needed. 16-bit and 32-bit features are computed in float32, float64 ones in float64; the bits do not
    depend on the number of threads. Beside the result, memory for two copies of one sample a thread is taken. NaN in a
    channel gives NaN in that channel's entries. Not differentiable.

    Args:
        features: Floating ``[N, C, H, W]`` or ``[N, C, S]``, any strides, read in place. (Tokens ``[N, T, C]``:
            ``.mT``.)
        orders: Integers in ``1..32``.
        compat: The matrices of BackdoorBench, which leaves out the power before the product, so ``A = F F^T`` for
            every order.

    Returns:
        ``[N, P, C * (C + 1) / 2]``, dtype and device of ``features``.

    Raises:
        TypeError: if ``features`` is not a floating tensor or an order not an integer.
        ValueError: if ``features`` has other than three or four dimensions or an order lies outside ``1..32``.

    Source: Ma et al., NDSS 2023, arXiv 2209.11715. The paper raises the features before the product; BackdoorBench does
    not, so all its orders carry the same information: ``compat=True``.
    """
    features, numbers = _prepare(features, orders, compat)
    if _native.usable("gram_powers", features):
        return torch.ops.bbfast.gram_powers(features, numbers, compat)
    return _compute(features, numbers, compat)


def gram_powers_reference(features: Tensor, orders: Iterable[int] = range(1, 9), *, compat: bool = False) -> Tensor:
    """:func:`gram_powers` in plain PyTorch."""
    features, numbers = _prepare(features, orders, compat)
    return _compute(features, numbers, compat)


def _compute(features: Tensor, orders: list[int], compat: bool) -> Tensor:
    x = features.flatten(2).to(_check.compute_dtype(features.dtype))
    n, c, s = x.shape
    rows, columns = torch.triu_indices(c, c, device=x.device)
    result = features.new_empty(n, len(orders), rows.shape[0])
    top = x.abs().nan_to_num(nan=0, posinf=torch.inf).amax(2) if s else x.new_ones(n, c)
    top = torch.where((top > 0) & top.isfinite(), top, 1)
    scale = torch.exp2(top.log2().ceil())
    exponents = math.log2(torch.finfo(x.dtype).max)
    for place, order in enumerate(orders):
        # The peak of the powers, from which neither their products nor the sums of these leave the range of numbers.
        peak = 2.0 ** int((exponents - 2 - math.log2(max(s, 1))) / 2 / (1 if compat else order))
        raised = (x / scale[:, :, None] * peak) ** (1 if compat else order)
        gram = (raised @ raised.mT)[:, rows, columns]
        root = gram.sign() * gram.abs() ** (1 / order)
        size = (scale / peak)[:, rows], (scale / peak)[:, columns]
        if compat:
            size = size[0] ** (1 / order), size[1] ** (1 / order)
        result[:, place] = root * size[0] * size[1]
    return result


def _prepare(features: Any, orders: Any, compat: Any) -> tuple[Tensor, list[int]]:
    """Checks everything; returns the features as ``[N, C, H, W]`` and the orders as a list."""
    if not _check.is_dense(features, _check.FLOATS):
        raise TypeError(f"gram_powers: features must be a floating tensor, got {_check.describe(features)}")
    if features.dim() not in (3, 4):
        raise ValueError(f"gram_powers: features must be [N, C, S] or [N, C, H, W], got {_check.describe(features)}")
    if isinstance(orders, Tensor | str) or not isinstance(orders, Iterable):
        raise TypeError(f"gram_powers: orders must be a sequence of integers, got {_check.describe(orders)}")
    _check.flag("gram_powers", "compat", compat)
    numbers = list(orders)
    for order in numbers:
        if isinstance(order, bool) or not isinstance(order, int):
            raise TypeError(f"gram_powers: orders must be integers, got {_check.describe(order)}")
        if not 1 <= order <= _MAX_ORDER:
            raise ValueError(f"gram_powers: orders must lie in 1..{_MAX_ORDER}, got {order}")
    features = features.detach()
    return (features if features.dim() == 4 else features.unsqueeze(3)), numbers


def _fake(features: Tensor, orders: list[int], compat: bool) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, len(orders), c * (c + 1) // 2))


_native.register("gram_powers", _fake)
