"""Curvature of a model's loss and cuts through it, on several sets of images along the same random draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bbfast.analysis._curvature import hessian_product, lanczos, rademacher
from bbfast.analysis.subject import Subject
from bbfast.analysis.tools.loss_landscape import directions, loss_and_share, moved

__all__ = ["curvature", "cuts", "findings", "half_radius"]

Sides = Sequence[tuple[Tensor, Tensor]]
"""Images uint8 ``[n, C, H, W]`` and the labels that count, int64 ``[n]``."""

_BATCH = 256


def curvature(subject: Subject, sides: Sides, probes: int, m: int) -> list[float]:
    """For each side: largest Ritz value of ``m`` Lanczos steps, mean over the probes; its standard deviation (NaN for
    one probe); mean of the trace's estimates."""
    out: list[float] = []
    for images, labels in sides:

        def batches(images: Tensor = images) -> Sequence[Tensor]:
            return list(subject.batches(images, _BATCH))

        product, size = hessian_product(subject.model, lambda: iter(batches()), labels)
        generator = subject.generator("sharpness")  # the same probes for every side
        largest, traces = [], []
        for _ in range(probes):
            values, shares, _ = lanczos(product, rademacher(size, generator, subject.device), m)
            largest.append(float(values[-1]))
            traces.append(float(size * (values * shares).sum()))
        spread = float(np.std(largest, ddof=1)) if probes > 1 else float("nan")
        out += [float(np.mean(largest)), spread, float(np.mean(traces))]
    return out


@torch.no_grad()
def cuts(subject: Subject, sides: Sides, steps: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Loss and accuracy along random filter-normalised directions, the same ones for every model of an architecture.

    Args:
        subject: The model; its weights are afterwards what they were.
        sides: What is measured, two of them.
        steps: Places, ``[P]``.
        count: Directions, R.

    Returns:
        f64 ``[R, P, 4]``: losses of both sides, then accuracies.
    """
    generator = subject.generator("sharpness directions")
    drawn: list[list[Tensor]] = []
    while len(drawn) < count:
        first, second, _ = directions(subject.model, generator)
        drawn += [first, second]
    ready = [(list(subject.batches(images, _BATCH)), labels.to(subject.device)) for images, labels in sides]
    found = np.zeros((count, len(steps), 2 * len(sides)))
    with moved(subject.model) as go:
        for i, direction in enumerate(drawn[:count]):
            for j, a in enumerate(steps.tolist()):
                go(a, 0.0, direction, direction)
                pairs = [loss_and_share(subject.model, batches, labels) for batches, labels in ready]
                found[i, j] = [value for column in zip(*pairs, strict=True) for value in column]
    return found


def half_radius(steps: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
    """The distance from the middle at which a share falls below half of what it is there.

    Interpolated linearly between points, the first fall counts; the median over both ways of every direction, where one
    that never falls counts as infinite.

    Args:
        steps: Places, ``[P]``, P odd, the middle one 0.
        shares: ``[R, P]``.
    """
    middle = len(steps) // 2
    found = []
    for row in shares:
        for values, places in ((row[middle:], steps[middle:]), (row[middle::-1], -steps[middle::-1])):
            half = values[0] / 2
            below = np.flatnonzero(values < half)
            if not len(below):
                found.append(np.inf)
                continue
            k = int(below[0])
            part = (values[k - 1] - half) / (values[k - 1] - values[k])
            found.append(float(places[k - 1] + part * (places[k] - places[k - 1])))
    # Of an even number the lower of the middle two: the mean of a radius and infinity is none.
    return float(np.sort(found)[(len(found) - 1) // 2])


def findings(rows: Sequence[dict[str, Any]], summary: dict[str, Any], after: str, extent: float) -> list[str]:
    """What the rows of the table say, in words."""
    lines = []
    for row in rows:
        name = " and ".join(part for part in (row["attack"], row["defense"]) if part and part != "none")
        text = f"{name}: largest eigenvalue {row['lambda_clean']:.3g} on clean images"
        if np.isfinite(row["lambda_bd"]):
            text += f", {row['lambda_bd']:.3g} on triggered ones"
        reach = [
            f"{word} halves at {row[key]:.2f}" if np.isfinite(row[key]) else f"{word} does not halve within {extent:g}"
            for word, key in (("C-Acc", "radius_c_acc"), ("ASR", "radius_asr"))
            if not np.isnan(row[key])
        ]
        text += f"; {', '.join(reach)}" if reach else ""
        if np.isfinite(row["barrier_line"]):
            text += f"; barrier {row['barrier_line']:.2f} on the line, {row['barrier_bezier']:.2f} on the curve"
        lines.append(text + ".")
    rho = summary["spearman_lambda_bd_asr_after"]
    if np.isfinite(rho):
        lines.append(
            f"Over the attacked models, curvature on triggered images and ASR after {after} have a Spearman "
            f"correlation of {rho:+.2f}."
        )
    return lines
