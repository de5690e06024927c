"""FullGrad: a logit taken apart into the input's share and those of all biases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bbfast.analysis._layers import spatial

__all__ = ["fullgrad", "implicit_bias"]


def implicit_bias(layer: nn.Module, out: Tensor) -> Tensor | None:
    """What a layer adds to a multiple of its input, to be broadcast over what it puts out; None if nothing.

    Of a BatchNorm in eval mode ``beta - gamma mean / sqrt(var + eps)``, of any other layer its ``bias``.
    """
    bias: Any = getattr(layer, "bias", None)
    if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
        gain = (layer.running_var + layer.eps).rsqrt()
        gain = gain if layer.weight is None else gain * layer.weight
        bias = -layer.running_mean * gain if bias is None else bias - layer.running_mean * gain
    if not isinstance(bias, Tensor) or not bias.numel():
        return None
    last = isinstance(layer, nn.Linear) or type(layer) is nn.LayerNorm
    return bias if last else bias.view(-1, *[1] * (out.dim() - 2))


def fullgrad(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map of the largest logit, and how far its parts add up to it.

    ``z = <dz/dx, x> + sum_l <dz/dy_l, b_l>``, ``y_l`` what layer l puts out and ``b_l`` its bias: exact for a network
    of layers linear in their input, ReLU and pooling in eval mode. The map is ``psi(dz/dx x) + sum_l psi(dz/dy_l
    b_l)``, over the layers whose output has places; ``psi``: absolute values, least to most of the image's, bilinear to
    the image, summed over channels.

    Args:
        model: In eval mode; it must not be changed by its own hooks meanwhile.
        x: Normalised images, float ``[n, C, H, W]``.

    Returns:
        Maps ``[n, H, W]``, not scaled; the sum of all parts ``[n]``; the logit ``[n]``; of ``x``'s type.

    Source: Srinivas and Fleuret, NeurIPS 2019, arXiv 1905.00780: the full-gradient decomposition, implicit biases, and
    the FullGrad map; ``psi`` scales the channels of a layer together.
    """
    kept: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(layer: nn.Module, _: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or (bias := implicit_bias(layer, out)) is None:
            return None
        kept.append((layer, bias.detach(), out))
        return out.clone()  # an activation that works in place must not change what was kept

    handles = [layer.register_forward_hook(hook) for layer in model.modules() if not any(layer.children())]
    x = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            best = model(x).amax(1)
            inputs = [x, *(out for _, _, out in kept)]
            slopes: tuple[Tensor | None, ...] = torch.autograd.grad(best.sum(), inputs, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    size = (x.shape[2], x.shape[3])
    part = x.detach() * (torch.zeros_like(x) if slopes[0] is None else slopes[0])
    total, maps = part.flatten(1).sum(1), _psi(part, size)
    for (layer, bias, _), slope in zip(kept, slopes[1:], strict=True):
        if slope is None:
            continue
        part = slope * bias
        total = total + part.flatten(1).sum(1)
        placed = spatial(layer, part)
        if placed is not None and placed.shape[2:] != (1, 1):
            maps = maps + _psi(placed, size)
    return maps, total, best.detach()


def _psi(part: Tensor, size: tuple[int, int]) -> Tensor:
    """float ``[n, H, W]``: channels are summed first, which is the same and a map instead of hundreds."""
    flat = part.abs().flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    small = (part.abs().sum(1) - part.shape[1] * low) / (high - low).clamp_min(torch.finfo(part.dtype).tiny)
    return F.interpolate(small[:, None], size, mode="bilinear", align_corners=False)[:, 0]
