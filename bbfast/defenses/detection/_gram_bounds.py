"""Beatrix's statistics: bounds of Gram entries, deviations from them, and kernel mean discrepancy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bbfast import ops

__all__ = ["ClassBounds", "calibrate", "class_bounds", "deviations", "excess", "kmmd", "order_statistic", "sort_rows"]

_WIDTH = 10.0  # MADs, without the factor of the normal distribution
_FLOOR = 1e-3  # of the mean median of an order: no bound nearer to 0 is divided by
_COMPAT = 1e-6
_CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
_CALIBRATION_BYTES = 1 << 23
_COLUMNS = 1 << 14  # of one pass through a sorting network, which works in cache


@dataclasses.dataclass(frozen=True, eq=False)
class ClassBounds:
    """What is usual for each Gram entry of one class.

    Args:
        low: float32 ``[P, T]``, median - 10 MAD.
        high: float32 ``[P, T]``, median + 10 MAD.
        floor: float32 ``[P]``, least magnitude of a bound as denominator; 0 divides by ``|bound + 1e-6|``.
    """

    low: Tensor
    high: Tensor
    floor: Tensor


def class_bounds(grams: Tensor, compat: bool = False) -> ClassBounds:
    """Bounds from clean samples: median (the lower of two) and median absolute deviation of each entry.

    Args:
        grams: float32 ``[n, P, T]``, n >= 1, finite.
        compat: BackdoorBench's denominators.
    """
    n = len(grams)
    ranked = sort_rows(grams)
    middle = ranked[(n - 1) // 2]
    # The h values nearest to the median stand side by side: the MAD is the reach of the best such window.
    h = (n + 1) // 2
    reach = torch.maximum(middle - ranked[: n - h + 1], ranked[h - 1 :] - middle).amin(dim=0)
    floor = middle.new_zeros(len(middle)) if compat else _FLOOR * middle.abs().mean(dim=1)
    return ClassBounds(middle - _WIDTH * reach, middle + _WIDTH * reach, floor)


def excess(grams: Tensor, bounds: ClassBounds) -> Tensor:
    """How far the entries lie outside of their bounds, relative to these, summed: float32 ``[n]``.

    Args:
        grams: float32 ``[n, P, T]``.
        bounds: Of the samples' class.
    """
    flat = grams.flatten(1)
    below = (bounds.low.flatten() - flat).clamp_min_(0) @ _inverse(bounds.low, bounds.floor)
    return below + (flat - bounds.high.flatten()).clamp_min_(0) @ _inverse(bounds.high, bounds.floor)


def _inverse(bound: Tensor, floor: Tensor) -> Tensor:
    shifted = torch.where(floor[:, None] > 0, bound.abs(), (bound + _COMPAT).abs())
    tiny = torch.finfo(bound.dtype).tiny
    return shifted.clamp(min=floor.clamp(min=tiny)[:, None]).reciprocal().flatten()


def deviations(maps: Tensor, orders: Sequence[int], bounds: ClassBounds, compat: bool = False) -> Tensor:
    """Mean relative excess of the Gram entries of samples of one class, float32 ``[n]``.

    Args:
        maps: Feature maps ``[n, C, S]`` or ``[n, C, H, W]``.
        orders: Orders of the Gram matrices.
        bounds: Of the samples' class.
        compat: BackdoorBench's Gram matrices.
    """
    channels = maps.shape[1]
    size = 4 * len(orders) * channels * (channels + 1) // 2
    step = max(1, _CHUNK_BYTES.get(maps.device.type, 1 << 22) // size)
    parts = [excess(ops.gram_powers(part, orders, compat=compat).float(), bounds) for part in maps.split(step)]
    return torch.cat(parts) / (len(orders) * channels * channels / 2)


def calibrate(maps: Tensor, orders: Sequence[int], folds: int = 5, compat: bool = False) -> tuple[ClassBounds, Tensor]:
    """Bounds of one class, and what clean samples deviate from bounds that were made without them.

    A few orders at a time: where channels are many, the Gram matrices of all never lie in memory together.

    Args:
        maps: Feature maps of clean samples, ``[n, C, S]`` or ``[n, C, H, W]``, n >= folds.
        orders: Orders of the Gram matrices.
        folds: Parts; each is judged by bounds of the others. Consecutive samples, parts of like size.
        compat: BackdoorBench's matrices and denominators.

    Returns:
        Bounds from all samples, and float32 ``[n]`` deviations.
    """
    n, channels = maps.shape[:2]
    edges = [n * i // folds for i in range(folds + 1)]
    total, every = maps.new_zeros(n, dtype=torch.float32), []
    step = max(1, _CALIBRATION_BYTES // (2 * n * channels * (channels + 1)))
    for first in range(0, len(orders), step):
        grams = ops.gram_powers(maps, orders[first : first + step], compat=compat).float()
        every.append(class_bounds(grams, compat))
        for start, stop in itertools.pairwise(edges):
            others = torch.cat([grams[:start], grams[stop:]])
            total[start:stop] += excess(grams[start:stop], class_bounds(others, compat))
    joined = ClassBounds(*(torch.cat([getattr(b, name) for b in every]) for name in ("low", "high", "floor")))
    return joined, total / (len(orders) * channels * channels / 2)


def order_statistic(values: Tensor, quantile: float) -> float:
    """The ``int(quantile * n)``-th lowest of ``values`` ``[n]``, counted from 0; the highest if that is beyond."""
    return float(values.sort().values[min(int(quantile * len(values)), len(values) - 1)])


def sort_rows(x: Tensor) -> Tensor:
    """``x`` ``[n, ...]`` sorted along its first dimension.

    On a CPU by a network of elementwise minima and maxima, several times as fast as torch.sort for few and long rows.

    Source: Batcher's merge exchange, Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M.
    """
    if x.is_cuda:
        return x.sort(dim=0).values
    flat = x.flatten(1)
    result = torch.empty_like(flat)
    pairs = list(_comparators(len(x)))
    for start in range(0, flat.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        row = list(flat[:, columns].clone().unbind())
        spare = torch.empty_like(row[0])
        for low, high in pairs:
            torch.minimum(row[low], row[high], out=spare)
            torch.maximum(row[low], row[high], out=row[high])
            row[low], spare = spare, row[low]
        result[:, columns] = torch.stack(row)
    return result.view_as(x)


def _comparators(n: int) -> Iterator[tuple[int, int]]:
    top = 1 << max((n - 1).bit_length() - 1, 0)
    p = top if n > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            for i in range(n - d):
                if i & p == r:
                    yield i, i + d
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2


def kmmd(first: Tensor, second: Tensor) -> float:
    """Kernel maximum mean discrepancy of two samples, times ``m n / (m + n)``; 0 if one is empty.

    The kernel is the sum of two Gaussian ones, ``exp(-|x - y|^2 / b)``, whose ``b`` are half the median squared
    distance (of all pairs, each with itself too; the lower median) and the whole.

    Args:
        first: ``[m, C]``.
        second: ``[n, C]``.
    """
    m, n = len(first), len(second)
    if not m or not n:
        return 0.0
    x = torch.cat([first, second]).double()
    x = x - x.mean(dim=0)
    square = x.square().sum(dim=1)
    distance = (square[:, None] + square - 2 * x @ x.mT).clamp_min_(0)
    distance.fill_diagonal_(0)
    base = float(distance.flatten().median()) / 2
    if base == 0:
        base = float(distance.mean()) / 2  # more than half of all samples are the same
    if base == 0:
        return 0.0
    kernel = torch.exp(-distance / base) + torch.exp(-distance / (2 * base))
    value = kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()
    return float(value) * m * n / (m + n)
