"""Noise of the sensor: normal, Poisson, salt and pepper. Images are float32 ``[N, C, H, W]``, 0..1."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.defenses._draws import Draws

__all__ = ["gaussian", "impulse", "shot"]


def gaussian(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    """Normal noise of standard deviation ``sigma``."""
    return torch.add(x, draws.normal("noise", *x.shape[1:]), alpha=sigma)


def shot(x: Tensor, photons: int, draws: Draws) -> Tensor:
    """Poisson noise: a white pixel counts ``photons`` on average."""
    # Pixels have 256 values: the distribution functions of all, one after the other, are one rising sequence, in which
    # one search finds each pixel's count.
    count = torch.arange(4 * photons + 20, dtype=torch.float64, device=x.device)
    mean = torch.arange(256, dtype=torch.float64, device=x.device)[:, None] * (photons / 255)
    log_mass = torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)
    table = log_mass.exp_().cumsum(dim=1).clamp_(max=1)
    # The last entry closes the row: no draw leaves it.
    table[:, -1] = 1
    value = (x * 255).round_().long()
    rows = torch.arange(256, dtype=torch.float64, device=x.device)[:, None]
    found = torch.searchsorted(
        (table + rows).flatten(), value + draws.uniform("counts", *x.shape[1:]).double(), right=True
    )
    return (found - value * len(count)).float().div_(photons)


def impulse(x: Tensor, amount: float, draws: Draws) -> Tensor:
    """Salt and pepper: a part ``amount`` of the values is black or white, either with the same probability."""
    u = draws.uniform("impulses", *x.shape[1:])
    return x.masked_fill(u < amount, 1.0).masked_fill_(u < amount / 2, 0.0)
