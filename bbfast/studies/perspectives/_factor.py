"""What the studies of models and of data sets share: one factor beside attacks and defenses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbfast.bench import Grid
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.cells import cube
from bbfast.studies.statistics import nanmean, two_way

__all__ = ["anova_arrays", "factor_findings", "factor_summary", "measure_factor", "spread"]


def measure_factor(
    rows: Sequence[Mapping[str, Any]], grid: Grid, factor: str, levels: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Figures over attacks, defenses, the factor's levels and seeds, and what the factor explains.

    Args:
        rows: Cells.
        grid: Their grid.
        factor: Key of a row: ``model`` or ``dataset``.
        levels: Its values.

    Returns:
        Arrays: ``der``, ``asr``, ``c_acc``, ``d_c_acc`` f64 ``[A, D, F, S]``, ``none`` first of D; ``state`` int8
        ``[A, D, F]``; ``level_der`` f64 ``[D - 1, F]``, mean DER over attacks and seeds; ``spread_der`` f64
        ``[D - 1]`` (:func:`spread`). Names for ``meta``. Rows of the two-way analyses of variance of the ASR, attack by
        factor, one analysis a defense.
    """
    attacks = [entry.label for entry in grid.attacks]
    defenses = [NO_DEFENSE, *(entry.label for entry in grid.defenses if entry.label != NO_DEFENSE)]
    axes: dict[str, Any] = {"attack": attacks, "defense": defenses, factor: list(levels), "seed": list(grid.seeds)}
    found = cube(rows, axes)
    der = nanmean(found["der"], 3)[:, 1:]
    arrays: dict[str, Any] = {key: found[key] for key in ("der", "asr", "c_acc", "d_c_acc")}
    arrays |= {
        "state": found.state,
        "level_der": nanmean(der, 0),
        "spread_der": np.array([spread(der[:, j]) for j in range(der.shape[1])]),
    }
    terms = {"first": "attack", "second": factor, "residual": "residual"}
    analyses = [
        {"defense": name, **row, "term": terms[row["term"]]}
        for j, name in enumerate(defenses)
        for row in two_way(found["asr"][:, j])
    ]
    return arrays, {"attacks": attacks, "defenses": defenses, "levels": list(levels), "factor": factor}, analyses


def spread(values: NDArray[np.float64]) -> float:
    """Standard deviation over the levels of a factor of the mean over attacks: how little a defense can be relied on.

    Args:
        values: ``[A, F]``; only levels with any figure count, and only attacks with figures at all of them.

    Returns:
        NaN with fewer than two such levels, or no such attack.
    """
    levels = np.isfinite(values).any(axis=0)
    both = values[np.isfinite(values[:, levels]).all(axis=1)][:, levels]
    return float(both.mean(axis=0).std(ddof=1)) if len(both) and both.shape[1] > 1 else float("nan")


def anova_arrays(analyses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares and p-values of the analyses as arrays, a row a defense."""
    rows = [analyses[i : i + 3] for i in range(0, len(analyses), 3)]
    return {
        "anova_share": np.array([[row["share"] for row in three] for three in rows]),
        "anova_p": np.array([[row["p"] for row in three[:2]] for three in rows]),
    }


def factor_summary(arrays: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a study of one factor."""
    attack, factor, rest = arrays["anova_share"][0].tolist()
    found: dict[str, Any] = {
        "asr_share_of_attack": attack,
        f"asr_share_of_{names['factor']}": factor,
        "asr_share_of_residual": rest,
        f"asr_p_of_{names['factor']}": float(arrays["anova_p"][0, 1]),
        "mean_der": float(nanmean(arrays["level_der"])),
    }
    if np.isfinite(arrays["spread_der"]).any():
        best = int(np.nanargmin(arrays["spread_der"]))
        found |= {
            "most_stable_defense": names["defenses"][1 + best],
            "its_spread": float(arrays["spread_der"][best]),
        }
    return found


def factor_findings(arrays: dict[str, Any], names: dict[str, Any], analyses: Sequence[dict[str, Any]]) -> list[str]:
    """What came out of a study of one factor, in sentences."""
    factor, lines = names["factor"], []
    for row in analyses:
        if row["term"] == factor and np.isfinite(row["share"]):
            p = f" (F = {row['f']:.2f}, p = {row['p']:.3g})" if np.isfinite(row["p"]) else ""
            when = "without a defense" if row["defense"] == "none" else f"after {row['defense']}"
            lines.append(f"{when}, the {factor} explains {100 * row['share']:.0f} % of the variation of the ASR{p}.")
    means, spreads = nanmean(arrays["level_der"], 1), arrays["spread_der"]
    for j in np.argsort(np.where(np.isfinite(means), -means, np.inf), kind="stable").tolist():
        if np.isfinite(means[j]):
            moved = f", and moves by {spreads[j]:.3f} (sd) between {factor}s" if np.isfinite(spreads[j]) else ""
            lines.append(f"{names['defenses'][1 + j]}: mean DER {means[j]:.3f}{moved}.")
    return [line[0].upper() + line[1:] if line.startswith(("without", "after")) else line for line in lines]
