"""Statistics of each channel of activations, class by class if asked: what BNP, MBNS and the activation tools need."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["ChannelStats", "channel_stats", "channel_stats_reference"]


class ChannelStats(NamedTuple):
    """Statistics of C channels, or of C channels of K classes; give them back as ``state`` to go on with more samples.

    Attributes:
        count: int64 ``[C]`` or ``[K, C]``, values summed up: samples times positions.
        mean: float64, 0 without values.
        var: float64, unbiased (divided by ``count - 1``, as BNP needs it); 0 for fewer than two values.
        min: float64, infinity without values.
        max: float64, minus infinity without values.
        abs_mean: float64, mean of ``|x|``, 0 without values.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of statistics
    mean: Tensor
    var: Tensor
    min: Tensor
    max: Tensor
    abs_mean: Tensor

    @property
    def biased_var(self) -> Tensor:
        """Variance divided by ``count``, as BatchNorm normalises a batch with it."""
        return self.var * ((self.count - 1).clamp(min=0) / self.count.clamp(min=1).double())


def channel_stats(
    activations: Tensor,
    labels: Tensor | None = None,
    num_classes: int | None = None,
    state: ChannelStats | None = None,
) -> ChannelStats:
    """Count, mean, variance, minimum, maximum and mean absolute value of each channel, in one pass.

    Sums run in float64 over values minus one of them, and pieces are joined by the pairwise update of Chan, Golub and
    LeVeque (1983), so nothing cancels however far the activations lie from zero. Their order depends on the shape
    alone: the bits do not depend on the number of threads. NaN is not skipped: a channel (of a class) that holds one
    has NaN in everything but ``count``. An infinity gives an infinite mean and a NaN variance, as in torch. Not
    differentiable.

    Args:
        activations: Floating: ``[N, C]``; tokens ``[N, T, C]``; or maps ``[N, C, H, W]``, contiguous or channels_last
            (read in place; other strides are copied).
        labels: int64 ``[N]``, in ``0..num_classes-1``: a sample's class. None puts all samples together.
        num_classes: K, > 0; with ``labels`` only.
        state: Statistics of earlier samples of the same channels and classes; not modified.

    Returns:
        :class:`ChannelStats` of tensors ``[C]``, or ``[K, C]`` with labels, on the device of ``activations``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, or ``labels`` and ``num_classes`` do not come together.
        IndexError: on the CPU, if a label lies outside ``0..num_classes-1``. On CUDA looking would make the host
            wait: there the kernel prints the label and stops with a device-side error.

    Source: Zheng et al. 2022 (NeurIPS, "Pre-activation Distributions Expose Backdoor Neurons"), the moments that BNP
    compares with the running ones.
    """
    classes = _check_arguments(activations, labels, num_classes, state)
    activations = activations.detach()
    if not _native.usable("channel_stats", activations):
        return _compute(activations, labels, classes, state)
    count, values = None, None
    if state is not None:
        count, values = state.count.view(classes, -1), torch.stack(state[1:]).view(5, classes, -1)
    count, values = torch.ops.bbfast.channel_stats(activations, labels, classes, count, values)
    return _unpack(count, values, labels)


def channel_stats_reference(
    activations: Tensor,
    labels: Tensor | None = None,
    num_classes: int | None = None,
    state: ChannelStats | None = None,
) -> ChannelStats:
    """:func:`channel_stats` in plain PyTorch."""
    classes = _check_arguments(activations, labels, num_classes, state)
    return _compute(activations.detach(), labels, classes, state)


def _unpack(count: Tensor, values: Tensor, labels: Tensor | None) -> ChannelStats:
    if labels is None:
        count, values = count[0], values[:, 0]
    return ChannelStats(count, *values.unbind())


def _compute(activations: Tensor, labels: Tensor | None, classes: int, state: ChannelStats | None) -> ChannelStats:
    n = activations.shape[0]
    if labels is not None and _check.inspectable(labels) and n:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise IndexError(f"channel_stats: labels must lie in 0..{classes - 1}, got {low}..{high}")
    x = activations.double()
    if x.dim() != 3:  # to [N, positions, C]
        x = x[:, None] if x.dim() == 2 else x.flatten(2).mT
    own = torch.zeros(n, dtype=torch.int64, device=x.device) if labels is None else labels
    positions, c = x.shape[1:]

    def per_class(values: Tensor) -> Tensor:
        return values.new_zeros(classes, c).index_add(0, own, values)

    def extreme(values: Tensor, reduce: str, start: float) -> Tensor:
        index = own[:, None].expand_as(values)
        return torch.full((classes, c), start, dtype=x.dtype, device=x.device).scatter_reduce(0, index, values, reduce)

    count = torch.zeros(classes, dtype=torch.int64, device=x.device).index_add(0, own, torch.full_like(own, positions))
    count = count[:, None].expand(classes, c).clone()
    divisor = count.clamp(min=1)
    mean = per_class(x.sum(1)) / divisor
    var = per_class((x - mean[own][:, None]).square().sum(1)) / (count - 1).clamp(min=1)
    infinity = float("inf")
    least = extreme(x.amin(1), "amin", infinity) if positions else torch.full_like(mean, infinity)
    most = extreme(x.amax(1), "amax", -infinity) if positions else torch.full_like(mean, -infinity)
    batch = ChannelStats(count, mean, var, least, most, per_class(x.abs().sum(1)) / divisor)
    if labels is None:
        batch = ChannelStats(*(t[0] for t in batch))
    return batch if state is None else _merge(state, batch)


def _merge(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    """Statistics of the values of ``a`` and ``b`` together (Chan, Golub and LeVeque 1983, eq. 1.5)."""
    count = a.count + b.count
    divisor = count.clamp(min=1)

    def weighted(x: Tensor, y: Tensor) -> Tensor:
        return (x * a.count + y * b.count) / divisor

    scatter = a.var * (a.count - 1).clamp(min=1) + b.var * (b.count - 1).clamp(min=1)
    scatter = scatter + (b.mean - a.mean).square() * (a.count * (b.count / divisor.double()))
    return ChannelStats(
        count,
        weighted(a.mean, b.mean),
        scatter / (count - 1).clamp(min=1),
        torch.minimum(a.min, b.min),
        torch.maximum(a.max, b.max),
        weighted(a.abs_mean, b.abs_mean),
    )


def _check_arguments(activations: Any, labels: Any, num_classes: Any, state: Any) -> int:
    """Checks everything; returns the number of classes, 1 without labels."""
    op = "channel_stats"
    if not _check.is_dense(activations, _check.FLOATS):
        raise TypeError(f"{op}: activations must be a floating tensor, got {_check.describe(activations)}")
    if activations.dim() not in (2, 3, 4):
        came = _check.describe(activations)
        raise ValueError(f"{op}: activations must be [N, C], [N, T, C] or [N, C, H, W], got {came}")
    c = activations.shape[1 if activations.dim() == 4 else -1]
    if labels is not None:
        _check.vector(op, "labels", labels, torch.int64, activations.shape[0], activations)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"{op}: num_classes must be a positive integer, got {num_classes!r}")
    elif num_classes is not None:
        raise ValueError(f"{op}: num_classes needs labels, got {num_classes!r} without")
    if state is not None:
        _check_state(state, (c,) if labels is None else (num_classes, c), activations)
    return 1 if labels is None else int(num_classes)


def _check_state(state: Any, shape: tuple[int, ...], activations: Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != len(ChannelStats._fields):
        raise TypeError(f"channel_stats: state must be a ChannelStats, got {_check.describe(state)}")
    for name, value in zip(ChannelStats._fields, state, strict=True):
        dtype = torch.int64 if name == "count" else torch.float64
        if not _check.is_dense(value, (dtype,)):
            kind = str(dtype).removeprefix("torch.")
            raise TypeError(f"channel_stats: state.{name} must be a {kind} tensor, got {_check.describe(value)}")
        if tuple(value.shape) != shape:
            raise ValueError(f"channel_stats: state.{name} must be {list(shape)}, got {_check.describe(value)}")
        _check.same_device("channel_stats", f"state.{name}", value, activations)


def _fake(
    activations: Tensor, labels: Tensor | None, num_classes: int, count: Tensor | None, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    c = activations.shape[1 if activations.dim() == 4 else -1]
    return (
        activations.new_empty((num_classes, c), dtype=torch.int64),
        activations.new_empty((5, num_classes, c), dtype=torch.float64),
    )


_native.register("channel_stats", _fake)
