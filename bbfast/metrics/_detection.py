"""How well a detector tells poisoned samples from clean ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bbfast.metrics._arrays import bools, floats, same_length

__all__ = ["detection"]

_MISS_WEIGHT = 9
_NAN = float("nan")


def detection(
    scores: ArrayLike | Tensor | None, truth: ArrayLike | Tensor, flags: ArrayLike | Tensor | None = None
) -> dict[str, float]:
    """Detection metrics; the positive class is "poisoned".

    From the flags, the detector's own decision: ``tpr``, ``fpr``, ``precision``, ``f1``, ``balanced_accuracy`` and
    ``f1_w9`` (recall with misses counted nine times: the F1 of BackdoorBench's tables). From the scores, whatever the
    threshold: ``auroc`` (ties by midrank), ``auprc`` (average precision), ``tpr_at_fpr_01``, ``_05``, ``_10`` (the
    largest TPR of any threshold whose FPR is at most 1, 5, 10 %) and ``fpr_at_tpr_95`` (the smallest FPR of any
    threshold whose TPR is at least 95 %).

    What is not defined is NaN, never 0: without poisoned samples all but ``fpr`` and ``precision``; without clean ones
    ``fpr``, ``balanced_accuracy``, ``auroc`` and the values at a given rate. With nothing flagged, ``precision``,
    ``f1`` and ``f1_w9`` are 0.

    Args:
        scores: Suspicion of each sample, real ``[N]``, higher = more suspicious; infinities are ranked. NaN marks a
            sample that the method could not score: it counts as less suspicious than every scored one, so that leaving
            out hard samples never pays, and is counted in ``unscored``. None if the method gives flags only: its
            metrics are NaN.
        truth: Whether each is poisoned, bool (or 0 and 1) ``[N]``.
        flags: Whether each was called poisoned, bool (or 0 and 1) ``[N]``; None if the method decides nothing: the
            metrics of the flags are then NaN.

    Returns:
        The metrics above, fractions in 0..1 or NaN, and ``unscored``, a number of samples.

    Raises:
        TypeError: if scores are not real numbers, or truth or flags not bool.
        ValueError: if lengths differ or there is not one dimension.
    """
    poisoned = bools("truth", truth)
    result: dict[str, float] = {}
    if flags is None:
        result |= dict.fromkeys(("tpr", "fpr", "precision", "f1", "balanced_accuracy", "f1_w9"), _NAN)
    else:
        flagged = bools("flags", flags)
        same_length(flags=flagged, truth=poisoned)
        result |= _from_flags(flagged, poisoned)
    if scores is None:
        ranked = ("auroc", "auprc", "tpr_at_fpr_01", "tpr_at_fpr_05", "tpr_at_fpr_10", "fpr_at_tpr_95")
        return result | dict.fromkeys(ranked, _NAN) | {"unscored": len(poisoned)}
    values = floats("scores", scores)
    same_length(scores=values, truth=poisoned)
    return result | _from_scores(values, poisoned) | {"unscored": int(np.isnan(values).sum())}


def _from_flags(flagged: NDArray[np.bool_], poisoned: NDArray[np.bool_]) -> dict[str, float]:
    tp, fp = int((flagged & poisoned).sum()), int((flagged & ~poisoned).sum())
    positives, negatives = int(poisoned.sum()), int((~poisoned).sum())
    fn = positives - tp
    tpr = _ratio(tp, positives, _NAN)
    fpr = _ratio(fp, negatives, _NAN)
    precision = _ratio(tp, tp + fp, 0.0)
    recall_w = _ratio(tp, tp + _MISS_WEIGHT * fn, _NAN)
    return {
        "tpr": tpr,
        "fpr": fpr,
        "precision": precision,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn, _NAN) if positives else _NAN,
        "balanced_accuracy": (tpr + 1.0 - fpr) / 2.0,
        "f1_w9": _ratio(2 * precision * recall_w, precision + recall_w, 0.0) if positives else _NAN,
    }


def _from_scores(scores: NDArray[np.float64], poisoned: NDArray[np.bool_]) -> dict[str, float]:
    tp, fp = _sweep(scores, poisoned)
    positives, negatives = tp[-1], fp[-1]
    if positives == 0:
        auprc = _NAN
        tpr = np.full(len(tp), _NAN)
    else:
        tpr = tp / positives
        auprc = float(np.sum(np.diff(tpr) * tp[1:] / (tp[1:] + fp[1:])))
    if positives == 0 or negatives == 0:
        return {
            "auroc": _NAN,
            "auprc": auprc,
            "tpr_at_fpr_01": _NAN,
            "tpr_at_fpr_05": _NAN,
            "tpr_at_fpr_10": _NAN,
            "fpr_at_tpr_95": _NAN,
        }
    # The trapezoid over groups of equal scores is the midrank AUROC; in integers, so that it is exact.
    doubled = int(np.sum((fp[1:] - fp[:-1]) * (tp[1:] + tp[:-1])))
    return {
        "auroc": doubled / (2 * int(positives) * int(negatives)),
        "auprc": auprc,
        # Compared as counts: 0.05 * 20 is 1, and a rate of 1/20 must count as at most 5 %.
        "tpr_at_fpr_01": float(tpr[100 * fp <= 1 * negatives].max()),
        "tpr_at_fpr_05": float(tpr[100 * fp <= 5 * negatives].max()),
        "tpr_at_fpr_10": float(tpr[100 * fp <= 10 * negatives].max()),
        "fpr_at_tpr_95": float((fp / negatives)[100 * tp >= 95 * positives].min()),
    }


def _sweep(scores: NDArray[np.float64], poisoned: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Poisoned and clean samples at or above each distinct score, from none to all: two int64 ``[groups + 1]``."""
    unscored = np.isnan(scores)
    # Descending by score, the unscored last; infinities are scores, so a second key keeps NaN apart from -inf.
    order = np.lexsort((-np.where(unscored, 0.0, scores), unscored))
    ranked, missing = scores[order], unscored[order]
    last_of_group = np.ones(len(scores), dtype=bool)
    if len(scores):
        last_of_group[:-1] = (ranked[1:] != ranked[:-1]) & ~(missing[1:] & missing[:-1])
    tp = np.cumsum(poisoned[order], dtype=np.int64)[last_of_group]
    count = np.flatnonzero(last_of_group) + 1
    return np.concatenate(([0], tp)), np.concatenate(([0], count - tp))


def _ratio(part: float, whole: float, otherwise: float) -> float:
    return part / whole if whole else otherwise
