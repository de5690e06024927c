"""Targeted DeepFool, batched: the smallest step to a class, taken until it is reached (spec/attacks 31.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["targeted_deepfool"]


def targeted_deepfool(
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    target: int,
    max_iter: int,
    *,
    overshoot: float = 0.02,
    extra_step: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A change of each image that makes it the target class.

    Each step goes to where the linearised logits of the target and of the first predicted class are equal. One backward
    pass a step gives both gradients; images that arrived leave the batch.

    Args:
        classify: Logits ``[B, K]`` of images ``[B, C, H, W]``, each row a function of its own image.
        images: float ``[B, C, H, W]``.
        target: Wanted class.
        max_iter: Largest number of steps.
        overshoot: Share by which the whole change is lengthened, to cross the boundary.
        extra_step: Added to the length of every step.
        mask: Factor of the gradient, ``[C, H, W]`` or broadcast to it; None changes every pixel.

    Returns:
        Changes ``[B, C, H, W]`` and steps taken, int64 ``[B]``; ``max_iter`` steps mean that the class was not reached.

    Source: Moosavi-Dezfooli et al., arXiv 1511.04599, algorithm 2, with one fixed class in place of the nearest one.
    """
    change = torch.zeros_like(images)
    steps = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    alive = torch.arange(len(images), device=images.device)
    start = None
    for step in range(max_iter + 1):
        x = (images[alive] + (1 + overshoot) * change[alive]).requires_grad_()
        with torch.enable_grad():
            logits = classify(x)
        predicted = logits.argmax(1)
        start = predicted if start is None else start
        going = predicted != target
        if step == max_iter or not bool(going.any()):
            break
        with torch.enable_grad():
            lead = (logits[:, target] - logits.gather(1, start[alive, None]).squeeze(1))[going]
            (gradient,) = torch.autograd.grad(lead.sum(), x)
        alive, gradient = alive[going], gradient[going]
        if mask is not None:
            gradient = gradient * mask
        norm = gradient.flatten(1).norm(dim=1)
        length = (lead.detach().abs() / norm + extra_step) / norm
        move = length.view(-1, 1, 1, 1) * gradient
        # A gradient of zero leads nowhere; the image stays and runs out of steps.
        change[alive] += torch.where(move.isfinite(), move, 0)
        steps[alive] += 1
    return (1 + overshoot) * change, steps
