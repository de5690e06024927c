"""Reflections in a pane of glass: Refool (Liu et al. 2020, arXiv 2007.02343, section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check
from bbfast.ops._func import holds_nothing
from bbfast.ops._layout import result_format
from bbfast.ops._precision import full_precision
from bbfast.ops._rounding import check_rounding, to_images, unselected

__all__ = ["reflect"]

_MODES = ("ghost", "focus", "out_of_focus")
_GAMMA = 2.2
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TENSOR_RADIUS = 10  # taps on each side of a blur whose sigma, up to 5, stands in a tensor

Pair = tuple[int, int] | Tensor


def reflect(
    images: Tensor,
    reflection: Tensor,
    mode: str,
    *,
    alpha_t: float | Tensor = 0.4,
    offset: Pair = (5, 5),
    ghost_alpha: float | Tensor = 0.3,
    sigma: float | Tensor = 3.0,
    att: float | Tensor = 1.13,
    window_offset: Pair = (0, 0),
    where: Tensor | None = None,
    rounding: str = "truncate",
) -> Tensor:
    """Lay the reflection of another picture over ``images``.

    With ``t`` and ``r`` the image and the reflection in linear light (0..1, raised to 2.2), the result is ``clip((R +
    alpha_t t) ** (1 / 2.2), 0, 1)``, where ``R`` is for mode

    - ``"focus"``: ``(1 - alpha_t) r``, a reflection as sharp as the image.
    - ``"ghost"`` (a thick pane reflects twice): ``(1 - alpha_t) g``, where ``g = ghost_alpha r1 + (1 - ghost_alpha)
      r2`` of two copies of ``r`` on a canvas of ``(H + dy, W + dx)``, ``r1`` at its upper left and ``r2`` at ``offset =
      (dy, dx)``, cut to rows ``dy..H-1`` and columns ``dx..W-1`` where both are, and enlarged to ``H x W`` bilinearly.
    - ``"out_of_focus"``: ``a b``, where ``b`` is ``r`` blurred by a Gaussian of ``2 ceil(2 sigma) + 1`` taps (borders
      mirrored without repeating the edge), lowered in each channel by ``(mu - 1) att`` and clipped to 0..1; ``mu`` is
      the mean of ``b + t`` where it exceeds 1, at least 1. ``a = k (1 - alpha_t / 2)``, and ``k`` is a Gaussian hill of
      ``S x S``, ``S = max(H, W)``, 3 deviations to each side, of which the window at ``window_offset`` is taken: the
      square root of the product of its bins' probabilities, 1 at the top.

    The random draws of the method are arguments: a number for all images, or one for each. The defaults lie in the
    middle of its ranges.

    Plain torch: blur and ghost are products with small matrices, on 32 x 32 images 2 to 60 times as fast as depthwise
    convolutions (on 224 x 224 9 times with one ``sigma``, 0.6 times with one for each); most of the rest is the last
    power, which torch vectorises. Computed in float32 (float64 for float64 images). Differentiable in floating
    ``images``, ``reflection`` and tensor parameters, but for the clipping; where both are black the gradient is 0.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating in 0..1, any strides; what is negative counts as black.
        reflection: ``[C, H, W]`` or ``[N, C, H, W]``, in the images' units: floating for float images, uint8 or
            floating in 0..255 for uint8 images.
        mode: ``"ghost"``, ``"focus"`` or ``"out_of_focus"``.
        alpha_t: Weight of the image in 0..1, a number or ``[N]``.
        offset: (dy, dx) between the two copies of a ghost, integers in ``0..H-1`` and ``0..W-1``, or an integer tensor
            ``[N, 2]``.
        ghost_alpha: Weight of the first copy in 0..1, a number or ``[N]``.
        sigma: Deviation of the blur in pixels, > 0: a number, or ``[N]`` up to 5.
        att: How far the blurred reflection is lowered where the sum is too bright, 0..10, a number or ``[N]``.
        window_offset: (y, x) of the window in the hill, integers in ``0..S-H`` and ``0..S-W`` or an integer tensor
            ``[N, 2]``; (0, 0) alone fits square images.
        where: bool ``[N]``, the images to change; None changes all, the others are copied.
        rounding: ``"truncate"`` cuts the fraction of uint8 results off, as the method does; ``"nearest"`` rounds half
            to even.

    Returns:
        New tensor of the images' shape, dtype, device and memory format; float results lie in 0..1.

    Raises:
        TypeError: if a dtype or type does not fit.
        ValueError: if a shape, device, ``mode``, ``rounding`` or a number does not fit; on the CPU also if a tensor
            parameter leaves its range or a float tensor holds NaN (on other devices values are not looked at, since
            that would make the host wait; a ``sigma`` above 5 is cut to 10 taps on each side there).

    Deviations: ``"focus"`` is in the paper but not in the reference implementation, whose canvas has 560 pixels
    whatever the image; here it has the image's larger side.
    """
    op = "reflect"
    if mode not in _MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    truncate = check_rounding(op, rounding)
    _check.images(op, images)
    _check.where(op, where, images)
    reflection = _check.pattern(op, reflection, images, "reflection")
    height, width = images.shape[2:]
    alpha = _check.parameter(op, "alpha_t", alpha_t, images, 0, 1)
    first = _check.parameter(op, "ghost_alpha", ghost_alpha, images, 0, 1)
    lowering = _check.parameter(op, "att", att, images, 0, 10)
    deviation, radius = _sigma(op, sigma, images)
    side = max(height, width)
    shift = _pair(op, "offset", offset, images, (height - 1, width - 1), used=mode == "ghost")
    corner = _pair(op, "window_offset", window_offset, images, (side - height, side - width), used=True)
    _check.finite(op, "images", images)
    _check.finite(op, "reflection", reflection)
    if holds_nothing(images) or holds_nothing(reflection):
        return images.clone(memory_format=result_format(images))

    unit = 255 if images.dtype == torch.uint8 else 1
    compute = _check.compute_dtype(images.dtype)
    t, r = _linear(images, unit, compute), _linear(reflection, unit, compute)
    if mode == "focus":
        layer = (1 - alpha) * r
    elif mode == "ghost":
        layer = (1 - alpha) * _ghost(r, shift, first)
    else:
        blurred = _blur(r, deviation, radius)
        hill = _hill(side, corner[..., 0], height).unsqueeze(2) * _hill(side, corner[..., 1], width).unsqueeze(1)
        layer = _dimmed(blurred, t, lowering) * (hill.unsqueeze(1).to(compute) * (1 - alpha / 2))
    light = layer + alpha * t
    # The root's slope at 0 is infinite: black is taken out, so that its gradient is 0 and not NaN.
    black = light <= 0
    result = torch.where(black, 0, torch.where(black, 1, light) ** (1 / _GAMMA)).clamp(max=1)
    out = unselected(to_images(result * unit, images.dtype, truncate), images, where)
    return out.contiguous(memory_format=result_format(images))


def _linear(x: Tensor, unit: int, compute: torch.dtype) -> Tensor:
    """Linear light; of bytes by a table, which is four times as fast as the power of each."""
    if x.dtype != torch.uint8:
        return (x.to(compute) / unit).clamp(min=0) ** _GAMMA
    table = (torch.arange(256, dtype=compute, device=x.device) / unit) ** _GAMMA
    return table.index_select(0, x.flatten().int()).view(x.shape)


def _ghost(r: Tensor, offset: Tensor, first: float | Tensor) -> Tensor:
    """Both copies, cut and enlarged: each is ``A r B'`` with one matrix for the rows and one for the columns."""
    (a1, a2), (b1, b2) = (_enlarge(size, offset[..., i], r.dtype) for i, size in enumerate(r.shape[2:]))
    with full_precision(r.device.type):
        return first * (a1 @ r @ b1.mT) + (1 - first) * (a2 @ r @ b2.mT)


def _enlarge(size: int, offset: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the rows of the result take from those of the copies that are not shifted and that are, ``[1 | N, 1, size,
    size]``: weights fall linearly from 1 at the place looked at to 0 one row farther."""
    d = offset.view(-1, 1, 1, 1).double()
    rows = torch.arange(size, dtype=torch.float64, device=offset.device)
    kept = size - d
    place = torch.minimum(((rows + 0.5) * kept / size - 0.5).clamp(min=0), kept - 1).mT
    return tuple((1 - (p - rows).abs()).clamp(min=0).to(dtype) for p in (place + d, place))  # type: ignore[return-value]


def _blur(r: Tensor, sigma: Tensor, radius: int) -> Tensor:
    taps = torch.arange(-radius, radius + 1, device=r.device)
    weights = torch.exp(-taps.square() / (2 * sigma.square())) * (taps.abs() <= torch.ceil(2 * sigma))
    weights = weights / weights.sum(1, keepdim=True)
    rows, columns = (_mirrored(weights, taps, size).to(r.dtype) for size in r.shape[2:])
    with full_precision(r.device.type):
        return rows @ r @ columns.mT


def _mirrored(weights: Tensor, taps: Tensor, size: int) -> Tensor:
    """The convolution as a matrix, ``[1 | N, 1, size, size]``: what a tap beyond an edge would see stands mirrored
    inside. Summed in float64, so that the order, which a device chooses, does not show."""
    rows = torch.arange(size, device=taps.device)
    period = max(2 * (size - 1), 1)
    seen = (rows.unsqueeze(1) + taps).remainder(period)
    seen = torch.minimum(seen, period - seen)
    n = weights.shape[0]
    matrix = weights.new_zeros(n, size, size)
    return matrix.scatter_add(2, seen.expand(n, -1, -1), weights.unsqueeze(1).expand(-1, size, -1)).unsqueeze(1)


def _dimmed(blurred: Tensor, t: Tensor, att: float | Tensor) -> Tensor:
    both = blurred + t
    over = (both > 1).to(both.dtype)
    mean = (both * over).sum((2, 3), keepdim=True) / (over.sum((2, 3), keepdim=True) + 1e-6)
    return (blurred - (mean.clamp(min=1) - 1) * att).clamp(0, 1)


def _hill(side: int, begin: Tensor, size: int) -> Tensor:
    """Square roots of the probabilities of ``side`` bins, the largest 1; ``size`` of them from ``begin`` on, ``[1 | N,
    size]``."""
    reach = 3 + 7 / (2 * side)
    edges = torch.linspace(-reach, reach, side + 1, dtype=torch.float64, device=begin.device)
    bins = torch.special.ndtr(edges).diff().sqrt()
    return (bins / bins.max())[begin.view(-1, 1) + torch.arange(size, device=begin.device)]


def _sigma(op: str, value: Any, images: Tensor) -> tuple[Tensor, int]:
    """The deviation as float64 ``[1 | N, 1]``, and how many taps on each side cover it."""
    limit = _TENSOR_RADIUS / 2 if isinstance(value, Tensor) else 1e4
    sigma = _check.parameter(op, "sigma", value, images, 1e-3, limit)
    if isinstance(sigma, Tensor):
        return sigma.view(-1, 1).double(), _TENSOR_RADIUS
    return torch.full((1, 1), sigma, dtype=torch.float64, device=images.device), math.ceil(2 * sigma)


def _pair(op: str, name: str, value: Any, images: Tensor, most: tuple[int, int], used: bool) -> Tensor:
    """Two integers from 0 to ``most`` for all images or for each, as int64 ``[1 | N, 2]``."""
    n = images.shape[0]
    used = used and images.numel() > 0
    if isinstance(value, Tensor):
        if not _check.is_dense(value, _INTEGERS):
            raise TypeError(f"{op}: {name} must be two integers or an integer tensor, got {_check.describe(value)}")
        if tuple(value.shape) not in ((2,), (n, 2)):
            raise ValueError(f"{op}: {name} must be two integers or [{n}, 2], got {_check.describe(value)}")
        _check.same_device(op, name, value, images)
        pair = value.long().view(-1, 2)
        if used and _check.inspectable(pair):
            high = torch.tensor(most)
            if not bool(((pair >= 0) & (pair <= high)).all()):
                raise ValueError(f"{op}: {name} must lie in 0..{most[0]} and 0..{most[1]}, got {pair.tolist()}"[:200])
        return pair
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(type(v) is int for v in value):
        raise TypeError(f"{op}: {name} must be two integers or an integer tensor, got {_check.describe(value)}")
    if used and not all(0 <= v <= m for v, m in zip(value, most, strict=True)):
        raise ValueError(f"{op}: {name} must lie in 0..{most[0]} and 0..{most[1]}, got {tuple(value)}")
    y, x = (torch.full((1,), v, dtype=torch.int64, device=images.device) for v in value)
    return torch.stack((y, x), 1)
