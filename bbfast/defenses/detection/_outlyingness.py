"""Which samples of a batch a small network finds unlike clean ones, for many batches at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["adjusted_outlyingness", "discriminate", "medcouple"]

_WIDTH = 128


def discriminate(inspected: Tensor, clean: Tensor, *, steps: int, lr: float, generator: torch.Generator) -> Tensor:
    """Train one network a batch to say 1 to its inspected features and 0 to its clean ones.

    ``d - 128 - 128 - 1`` with ReLU and sigmoid, squared error; each step first to 1, then to 0, each with an Adam
    of its own. The batches are independent problems: their weights are stacked and stepped together.

    Args:
        inspected: Features float32 ``[G, B, d]``.
        clean: Features float32 ``[G, C, d]``.
        steps: Pairs of steps.
        lr: Learning rate of both optimisers.
        generator: CPU generator of the initial weights.

    Returns:
        What the trained networks say of the inspected features, float32 ``[G, B]``.
    """
    groups, _, d = inspected.shape
    weights = []
    for inputs, outputs in ((d, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, 1)):
        for shape in ((groups, inputs, outputs), (groups, 1, outputs)):
            raw = torch.rand(shape, generator=generator).mul_(2).sub_(1) / math.sqrt(inputs)
            weights.append(raw.to(inspected.device).requires_grad_())

    def says(x: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = weights
        hidden = torch.baddbmm(b2, torch.baddbmm(b1, x, w1).relu(), w2).relu()
        return torch.baddbmm(b3, hidden, w3).sigmoid()[..., 0]

    # Adam works value by value: a sum over batches leaves each one's steps as they would be alone.
    up, down = (torch.optim.Adam(weights, lr=lr) for _ in range(2))
    with torch.enable_grad():
        for _ in range(steps):
            for optimizer, x, target in ((up, inspected, 1.0), (down, clean, 0.0)):
                loss = (says(x) - target).square().mean(dim=1).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.no_grad():
        return says(inspected)


def adjusted_outlyingness(values: Tensor) -> Tensor:
    """Distance from the median, over that of the whisker of a skew-adjusted boxplot on the same side.

    Args:
        values: ``[G, n]``, n >= 1.

    Returns:
        float64 ``[G, n]``, 0 or more; infinite off a median at which the whisker stands.

    Source: Hubert and Van der Veeken, J. Chemometrics 2008; whiskers of Hubert and Vandervieren 2008.
    """
    x = values.double()
    q1, median, q3 = torch.quantile(x, torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype, device=x.device), dim=1)
    skew, reach = medcouple(values), 1.5 * (q3 - q1)
    right = skew > 0
    low = q1 - torch.exp(torch.where(right, -4.0, -3.0) * skew) * reach
    high = q3 + torch.exp(torch.where(right, 3.0, 4.0) * skew) * reach
    away = x - median[:, None]
    whisker = torch.where(away >= 0, (high - median)[:, None], (median - low)[:, None])
    return torch.where(away == 0, 0.0, away.abs() / whisker)


def medcouple(values: Tensor) -> Tensor:
    """Robust skewness in -1..1, float64 ``[G]``: the median over pairs either side of the median of how unequal their
    distances from it are. By the whole matrix of pairs: n is a batch.

    Args:
        values: ``[G, n]``, n >= 1.

    Source: Brys, Hubert and Struyf, J. Comput. Graph. Stat. 2004, with their kernel for values tied with the median.
    """
    z = values.double().sort(dim=1).values
    groups, n = z.shape
    z = z - (z[:, (n - 1) // 2] + z[:, n // 2]).div(2)[:, None]
    above, below = z[:, :, None], z[:, None, :]
    tied = (z == 0).double()
    place = tied.cumsum(dim=1) - 1  # of a tied value among them
    ties = torch.sign(place[:, :, None] + place[:, None, :] - (tied.sum(dim=1) - 1)[:, None, None])
    both = (above == 0) & (below == 0)
    kernel = torch.where(both, ties, (above + below) / torch.where(both, 1.0, above - below))
    pairs = (above >= 0) & (below <= 0)
    ranked = kernel.where(pairs, torch.inf).view(groups, -1).sort(dim=1).values
    count = pairs.view(groups, -1).sum(dim=1)
    middle = torch.stack([(count - 1) // 2, count // 2], dim=1)
    return ranked.gather(1, middle).mean(dim=1)
