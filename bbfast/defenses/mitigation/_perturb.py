"""Adversarial steps on a batch of perturbations: where they start, and the ball they stay in."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.data.loader import derive_seed

__all__ = ["project_", "start"]


@torch.no_grad()
def project_(delta: Tensor, norm_type: str, bound: float) -> Tensor:
    """Bring every perturbation ``[B, C, H, W]`` back into its ball, in place.

    ``linf`` clamps; ``l2`` and ``l1`` scale a sample whose norm exceeds ``bound`` down to it; ``none`` does nothing.
    """
    if norm_type == "linf":
        return delta.clamp_(-bound, bound)
    if norm_type == "none":
        return delta
    size = delta.flatten(1).norm(p=2 if norm_type == "l2" else 1, dim=1).clamp_(min=1e-12)
    return delta.mul_((bound / size).clamp_(max=1).view(-1, 1, 1, 1))


def start(like: Tensor, how: str, norm_type: str, bound: float, seed: int) -> Tensor:
    """The first perturbation of a batch: ``max`` and ``min`` are plus and minus ``bound`` at every pixel, ``zero``, or
    ``random`` (uniform between them, drawn on the CPU from ``seed``); projected."""
    if how == "random":
        drawn = torch.rand(like.shape, generator=torch.Generator().manual_seed(derive_seed("start", seed)))
        delta = ((2 * drawn - 1) * bound).to(like)
    else:
        delta = torch.full_like(like, {"max": bound, "min": -bound, "zero": 0.0}[how])
    return project_(delta, norm_type, bound)
