"""Put A triggers on the same B images at once, with the gradient to the triggers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["stamp"]


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Every trigger on every image: ``(1 - mask_a) * images_b + mask_a * pattern_a``.

    Normalisation is affine for each channel and the weights add up to 1, so stamping normalised images with a
    normalised pattern is the same as stamping pixels and normalising afterwards; the images are normalised once for all
    triggers.

    Differentiable in ``mask`` and ``pattern``, not in ``images``. The backward pass reads the incoming gradient twice
    and makes no copy of it: autograd's own would write three tensors of its size.

    Args:
        images: float ``[B, C, H, W]``.
        mask: float ``[A, 1, H, W]``.
        pattern: float ``[A, C, H, W]``, on the images' scale.

    Returns:
        ``[A * B, C, H, W]``, trigger after trigger; channels_last if ``images`` is.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, eq. 2; all classes in one batch.
    """
    out: Tensor = _Stamp.apply(images, mask, pattern)
    return out


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        ctx.save_for_backward(images, mask, pattern)
        (a, c, h, w), b = pattern.shape, images.shape[0]
        if images.is_contiguous(memory_format=torch.channels_last) and c > 1:
            x, m, p = (tensor.permute(0, 2, 3, 1) for tensor in (images, mask, pattern))
            out = torch.lerp(x[None], p[:, None], m[:, None].expand(a, b, h, w, c))
            return out.view(a * b, h, w, c).permute(0, 3, 1, 2)
        out = torch.lerp(images[None], pattern[:, None], mask[:, None].expand(a, b, c, h, w))
        return out.view(a * b, c, h, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        images, mask, pattern = ctx.saved_tensors
        a, b = mask.shape[0], images.shape[0]
        grad = grad.unflatten(0, (a, b))
        total = grad.sum(dim=1)
        from_images = torch.einsum("abchw,bchw->ahw", grad, images)[:, None]
        to_mask = (total * pattern).sum(dim=1, keepdim=True) - from_images
        return None, to_mask, total * mask
