"""The largest margin of every class over all images, and how likely the largest of them is by chance."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bbfast._progress import Bar
from bbfast.training.device import Numerics

__all__ = ["largest_margins", "margin_p_value", "margins"]

_MIN_NULL = 3
_MIN_FOR_THREE_PARAMETERS = 8


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_t - max over the other classes of z``, ``[N]``.

    Args:
        logits: ``[N, K]``, K >= 2.
        labels: int64 ``[N]``, ``t``.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


def largest_margins(
    model: nn.Module,
    start: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    lr: float,
    momentum: float,
    steps: int,
    tolerance: float,
    batch_size: int,
    numerics: Numerics,
    progress: Bar | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ascent on the margin of each class from given images, all classes together.

    A class stops when the sum of its margins changes by less than ``tolerance`` of itself in a step; the others go on
    without it. Images do not touch one another.

    Args:
        model: Normalised images to logits; in eval mode, without gradients of its weights.
        start: float ``[K, R, C, H, W]``, 0..1; left as it is.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        lr: Learning rate of gradient descent.
        momentum: Its momentum; 0 is none.
        steps: Steps at most.
        tolerance: Relative change that ends a class.
        batch_size: Images in a pass.
        numerics: Number format and layout of the network.
        progress: Told of every step.

    Returns:
        Margins after the last step float32 ``[K, R]``; margins at the start, likewise; steps taken int64 ``[K]``.
    """
    classes, each = start.shape[:2]
    device = start.device
    shift, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    images = start.clone()
    velocity = torch.zeros_like(images) if momentum else None
    active = torch.arange(classes, device=device)
    last = torch.full((classes,), torch.nan, dtype=torch.float64, device=device)
    first = torch.zeros(classes, each, device=device)
    taken = torch.zeros(classes, dtype=torch.int64, device=device)

    def passes(rows: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
        flat, labels = images[rows].flatten(0, 1), rows.repeat_interleave(each)
        values, gradients = [], []
        for x, t in zip(flat.split(batch_size), labels.split(batch_size), strict=True):
            leaf = x.detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                shown = (leaf.clamp(0, 1) - shift) / scale
                with numerics.autocast(device):
                    logits = model(shown.contiguous(memory_format=numerics.memory_format))
                value = margins(logits.float(), t)
            values.append(value.detach())
            if differentiate:
                gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
        gradient = torch.cat(gradients).view(-1, *start.shape[1:]) if differentiate else flat
        return torch.cat(values).view(-1, each), gradient

    for step in range(steps):
        value, gradient = passes(active, True)
        if step == 0:
            first = value
        if velocity is not None:
            velocity[active] = gradient = momentum * velocity[active] + gradient
        images[active] = images[active] + lr * gradient
        taken[active] += 1
        total = value.sum(dim=1).double()
        settled = (total - last[active]).abs() < tolerance * last[active].abs()
        last[active] = total
        active = active[~settled]
        if progress is not None:
            progress.advance()
        if not len(active):
            break
    final, _ = passes(torch.arange(classes, device=device), False)
    return final, first, taken


def margin_p_value(values: Tensor) -> tuple[float | None, dict[str, float | str]]:
    """Probability that the largest of as many draws as there are classes reaches the largest value.

    A gamma distribution is fitted to the values without the largest one; ``p = 1 - F(largest) ** K``. Three parameters
    by maximum likelihood; two, with the origin fixed at 0, for fewer than 8 classes or where that fit fails.

    Args:
        values: float ``[K]``, one a class, finite.

    Returns:
        The probability, None if fewer than 3 values are left to fit or they do not vary, or if two parameters must do
        and one is not positive; and the fit.
    """
    ranked = np.sort(values.double().cpu().numpy())
    null, largest = ranked[:-1], float(ranked[-1])
    if len(null) < _MIN_NULL or null[0] == null[-1]:
        return None, {"fit": "none"}
    fits = ("gamma3", "gamma2") if len(ranked) >= _MIN_FOR_THREE_PARAMETERS else ("gamma2",)
    for fit in fits:
        found = _fit(null, fit)
        if found is not None:
            shape, origin, scale = found
            log_cdf = float(_stats().gamma.logcdf(largest, shape, loc=origin, scale=scale))
            p = float(-np.expm1(len(ranked) * log_cdf))
            return p, {"fit": fit, "shape": shape, "origin": origin, "scale": scale}
    return None, {"fit": "none"}


def _stats() -> Any:
    """scipy.stats, imported where a fit is made: who only lists the methods need not wait for it."""
    return importlib.import_module("scipy.stats")


def _fit(null: np.ndarray, fit: str) -> tuple[float, float, float] | None:
    stats = _stats()
    if fit == "gamma2" and null[0] <= 0:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            found = stats.gamma.fit(null) if fit == "gamma3" else stats.gamma.fit(null, floc=0)
        except (stats.FitError, ValueError, RuntimeError):
            return None
    shape, origin, scale = (float(value) for value in found)
    with np.errstate(all="ignore"):
        likely = bool(np.isfinite(stats.gamma.logpdf(null, shape, loc=origin, scale=scale)).all())
    return (shape, origin, scale) if likely and shape > 0 and scale > 0 else None
