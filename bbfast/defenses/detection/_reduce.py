"""Principal components of each class's features, all classes in few batched eigenproblems."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bbfast import ops

__all__ = ["principal_axes"]

# Covariances of more features than this are never formed: their top directions come from subspace iteration.
_MAX_COVARIANCE = 1024
# Bytes of scatter matrices alive at a time.
_BUDGET = 1 << 28
_OVERSAMPLE, _POWER_ITERATIONS = 8, 16


def principal_axes(features: Tensor, labels: Tensor, num_classes: int, n_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, leading eigenvectors and eigenvalues of the covariance of each class.

    Exact (:func:`bbfast.ops.class_moments` and a batched symmetric eigensolver in float64) up to 1,024 features; above,
    16 subspace iterations with 8 extra directions from a fixed start.

    Args:
        features: ``[N, d]``, float.
        labels: int64 ``[N]``, 0..num_classes-1.
        num_classes: Classes ``K``; one without samples gets zeros.
        n_dims: Directions wanted; at most ``d`` are returned.

    Returns:
        Mean ``[K, d]``, axes ``[K, d, q]`` with orthonormal columns and variances ``[K, q]``, falling, float64, with
        ``q = min(n_dims, d)``. Variances that are rounding of 0 are 0.
    """
    d = features.shape[1]
    q = min(n_dims, d)
    means, axes, variances = [], [], []
    for mean, vectors, values in _solve(features, labels, num_classes, q):
        top = values.amax(dim=-1, keepdim=True)
        means.append(mean)
        axes.append(vectors)
        variances.append(torch.where(values > 1e-10 * top, values, 0.0))
    return torch.cat(means), torch.cat(axes), torch.cat(variances)


def _solve(features: Tensor, labels: Tensor, num_classes: int, q: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    d = features.shape[1]
    if d > _MAX_COVARIANCE:
        for c in range(num_classes):
            yield _subspace(features[labels == c], q)
        return
    step = max(1, _BUDGET // (8 * d * d))
    for first in range(0, num_classes, step):
        size = min(step, num_classes - first)
        if size == num_classes:
            moments = ops.class_moments(features, labels, size)
        else:
            chosen = (labels >= first) & (labels < first + size)
            moments = ops.class_moments(features[chosen], labels[chosen] - first, size)
        scale = (moments.count - 1).clamp(min=1).double()[:, None, None]
        values, vectors = torch.linalg.eigh(moments.scatter.double() / scale)
        yield moments.mean.double(), vectors.flip(-1)[..., :q], values.flip(-1)[..., :q].clamp(min=0)


def _subspace(rows: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top ``q`` principal directions of ``[n, d]`` by blocked power iteration; the start depends on ``d`` alone."""
    n, d = rows.shape
    width = min(q + _OVERSAMPLE, d)
    start = torch.randn(d, width, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    basis = torch.linalg.qr(start.to(rows.device)).Q
    if n == 0:
        zero = basis.new_zeros(1, d)
        return zero, basis[None, :, :q], zero[:, :q]
    mean = rows.double().mean(dim=0)
    x = rows.double() - mean
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(x.mT @ (x @ basis)).Q
    projected = x @ basis
    values, rotation = torch.linalg.eigh(projected.mT @ projected / max(n - 1, 1))
    vectors = basis @ rotation
    return mean[None], vectors.flip(-1)[None, :, :q], values.flip(-1)[None, :q].clamp(min=0)
