"""Statistics that several studies report."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["compare_pairs", "holm", "kendall", "nanmean", "spearman", "two_way"]


def kendall(scores: ArrayLike) -> NDArray[np.float64]:
    """Kendall's tau-b between the rankings of each two rows.

    Args:
        scores: ``[S, n]``, a row a seed; what is NaN in either row is left out of a pair.

    Returns:
        ``[S, S]``, ones on the diagonal; NaN where fewer than two items are left, or one row is constant.
    """
    rows = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    out = np.eye(len(rows))
    for i, j in itertools.combinations(range(len(rows)), 2):
        both = np.isfinite(rows[i]) & np.isfinite(rows[j])
        tau = float("nan")
        if both.sum() > 1 and np.ptp(rows[i][both]) > 0 and np.ptp(rows[j][both]) > 0:
            tau = float(_stats().kendalltau(rows[i][both], rows[j][both]).statistic)
        out[i, j] = out[j, i] = tau
    return out


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of the points where both are known; NaN with fewer than three, or a constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    return float(_stats().spearmanr(a[both], b[both]).statistic)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down correction: ``max_{j <= i} (m - j + 1) p_(j)`` in rising order, at most 1; NaN stays."""
    values = np.asarray(p, dtype=np.float64)
    out = np.full(values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * (len(order) - np.arange(len(order)))
    out[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return out


def compare_pairs(values: Mapping[str, ArrayLike]) -> list[dict[str, Any]]:
    """Each two of some methods, compared by Wilcoxon's signed-rank test over the cells that both have.

    Args:
        values: Method to a figure for each cell, all of one shape, in one order; NaN where a method has none.

    Returns:
        A row a pair: ``a``, ``b``, ``n`` cells, ``median_difference`` (a minus b), two-sided ``p``, and ``p_holm``,
        corrected for all pairs. Without a cell in common NaN; where no cell differs p is 1.
    """
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(values, 2):
        gap = np.ravel(values[a]).astype(np.float64) - np.ravel(values[b]).astype(np.float64)
        gap = gap[np.isfinite(gap)]
        median = float(np.median(gap)) if len(gap) else float("nan")
        rows.append({"a": a, "b": b, "n": len(gap), "median_difference": median, "p": _wilcoxon(gap)})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = float(corrected)
    return rows


def two_way(values: ArrayLike) -> list[dict[str, Any]]:
    """Two-way analysis of variance without interaction, ``y_abr = m + a_a + b_b + e``, also with cells missing.

    The sum of squares of a factor is what leaving it out adds to the residual (type II); with no cell missing that is
    the classic one.

    Args:
        values: ``[A, B]`` or ``[A, B, repeats]``; NaN is left out.

    Returns:
        Rows ``first``, ``second`` and ``residual``: ``ss``, ``df``, ``share`` of the total sum of squares, ``f`` and
        ``p``. F and p are NaN without a degree of freedom of the residual or of the factor, or if nothing varies.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.argwhere(np.isfinite(array))
    y = array[tuple(known.T)]
    parts = [(known[:, axis, None] == np.unique(known[:, axis])).astype(np.float64) for axis in (0, 1)]
    ones = np.ones((len(y), 1))
    rest, rank = _residual(y, np.hstack([ones, *parts]))
    total = _residual(y, ones)[0]
    left = len(y) - rank
    rows: list[dict[str, Any]] = []
    for name, other in (("first", parts[1]), ("second", parts[0])):
        without, fewer = _residual(y, np.hstack([ones, other]))
        ss, df = max(without - rest, 0.0), rank - fewer
        tested = df > 0 and left > 0 and total > 0 and rest > 1e-12 * total
        f = (ss / df) / (rest / left) if tested else float("nan")
        p = float(_stats().f.sf(f, df, left)) if tested else float("nan")
        rows.append({"term": name, "ss": ss, "df": df, "f": f, "p": p})
    rows.append({"term": "residual", "ss": rest, "df": left, "f": float("nan"), "p": float("nan")})
    return [{**row, "share": row["ss"] / total if total > 0 else float("nan")} for row in rows]


def _residual(y: NDArray[np.float64], design: NDArray[np.float64]) -> tuple[float, int]:
    """Sum of squares that a linear model leaves, and its rank."""
    if not len(y):
        return 0.0, 0
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return float(np.square(y - design @ fit).sum()), int(rank)


def _stats() -> Any:
    """scipy.stats, imported where it is used: who only lists the studies need not wait for it."""
    return importlib.import_module("scipy.stats")


def _wilcoxon(gap: NDArray[np.float64]) -> float:
    if not len(gap):
        return float("nan")
    moved = gap[gap != 0]
    if not len(moved):
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few cells: the number of them stands beside the p
        return float(_stats().wilcoxon(moved).pvalue)


def nanmean(values: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Any:
    """Mean of what is known; NaN, without a warning, where nothing is."""
    array = np.asarray(values, dtype=np.float64)
    count = np.isfinite(array).sum(axis=axis)
    total = np.where(np.isfinite(array), array, 0.0).sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / count
