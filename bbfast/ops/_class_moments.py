"""Mean and scatter of features, class by class: what activation clustering, SPECTRE, SCAn and Beatrix start from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["Moments", "class_moments", "class_moments_reference"]


class Moments(NamedTuple):
    """Moments of K classes; give them back to :func:`class_moments` as ``state`` to go on with more samples.

    Attributes:
        count: int64 ``[K]``, samples of each class.
        mean: float64 ``[K, D]``, 0 for a class without samples.
        scatter: float64 ``[K, D, D]``, sum of ``(x - mean) (x - mean)^T``; divide by ``count`` or ``count - 1`` for a
            covariance.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks of moments
    mean: Tensor
    scatter: Tensor


def class_moments(features: Tensor, labels: Tensor, num_classes: int, state: Moments | None = None) -> Moments:
    """Count, mean and scatter matrix of the features of each class, in float64.

    Each call centres its samples on their own class mean before multiplying, and joins the result with ``state`` by the
    pairwise update of Chan, Golub and LeVeque (1983), so nothing cancels however far the features lie from zero. The
    sums run in the order of the samples: the bits do not depend on the number of threads. Not differentiable.

    Args:
        features: ``[N, D]``, floating.
        labels: int64 ``[N]``, in ``0..num_classes-1``.
        num_classes: K, > 0.
        state: Moments of earlier samples of the same classes and width; not modified.

    Returns:
        :class:`Moments` on the device of ``features``; new memory.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, or ``num_classes`` is not positive.
        IndexError: on the CPU, if a label lies outside ``0..num_classes-1``. On CUDA looking would make the host
            wait: there the kernel prints the label and stops with a device-side error.
    """
    _check_arguments(features, labels, num_classes, state)
    features = features.detach()
    if _native.usable("class_moments", features):
        old = (None, None, None) if state is None else state
        return Moments(*torch.ops.bbfast.class_moments(features, labels, num_classes, *old))
    return _compute(features, labels, num_classes, state)


def class_moments_reference(
    features: Tensor, labels: Tensor, num_classes: int, state: Moments | None = None
) -> Moments:
    """:func:`class_moments` in plain PyTorch."""
    _check_arguments(features, labels, num_classes, state)
    return _compute(features.detach(), labels, num_classes, state)


def _compute(features: Tensor, labels: Tensor, num_classes: int, state: Moments | None) -> Moments:
    if _check.inspectable(labels) and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise IndexError(f"class_moments: labels must lie in 0..{num_classes - 1}, got {low}..{high}")
    x = features.double()
    member = torch.nn.functional.one_hot(labels, num_classes).to(x.dtype)
    count = member.sum(0)
    mean = (member.T @ x) / count.clamp(min=1).unsqueeze(1)
    centred = x - mean[labels]
    own = (centred * column.unsqueeze(1) for column in member.unbind(1))
    scatter = torch.stack([part.T @ part for part in own])
    batch = Moments(count.long(), mean, scatter)
    return batch if state is None else _merge(state, batch)


def _merge(a: Moments, b: Moments) -> Moments:
    """Moments of the samples of ``a`` and ``b`` together (Chan, Golub and LeVeque 1983, eq. 1.5)."""
    count = a.count + b.count
    share = b.count.double() / count.clamp(min=1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share.unsqueeze(1)
    weight = (a.count * share).view(-1, 1, 1)
    return Moments(count, mean, a.scatter + b.scatter + delta.unsqueeze(2) * delta.unsqueeze(1) * weight)


def _check_arguments(features: Any, labels: Any, num_classes: int, state: Any) -> None:
    if not _check.is_dense(features, _check.FLOATS):
        raise TypeError(f"class_moments: features must be a floating tensor [N, D], got {_check.describe(features)}")
    if features.dim() != 2:
        raise ValueError(f"class_moments: features must be [N, D], got {_check.describe(features)}")
    _check.vector("class_moments", "labels", labels, torch.int64, features.shape[0], features)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"class_moments: num_classes must be a positive integer, got {num_classes!r}")
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != len(Moments._fields):
        raise TypeError(f"class_moments: state must be the Moments of another call, got {_check.describe(state)}")
    d = features.shape[1]
    expected = ((num_classes,), (num_classes, d), (num_classes, d, d))
    dtypes = (torch.int64, torch.float64, torch.float64)
    for name, value, shape, dtype in zip(Moments._fields, state, expected, dtypes, strict=True):
        if not _check.is_dense(value, (dtype,)):
            kind = str(dtype).removeprefix("torch.")
            raise TypeError(f"class_moments: state.{name} must be a {kind} tensor, got {_check.describe(value)}")
        if tuple(value.shape) != shape:
            raise ValueError(f"class_moments: state.{name} must be {list(shape)}, got {_check.describe(value)}")
        _check.same_device("class_moments", f"state.{name}", value, features)


def _fake(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    count: Tensor | None,
    mean: Tensor | None,
    scatter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d = features.shape[1]
    return (
        labels.new_empty(num_classes),
        features.new_empty((num_classes, d), dtype=torch.float64),
        features.new_empty((num_classes, d, d), dtype=torch.float64),
    )


_native.register("class_moments", _fake)
