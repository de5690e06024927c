"""Principal components of each class's features, all classes in few batched eigenproblems."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bbfast import ops

__all__ = ["principal_axes"]

# Covariances of more features than this are never formed.
_MAX_COVARIANCE = 1024
# Bytes of scatter matrices alive at a time.
_BUDGET = 1 << 28
_OVERSAMPLE, _BLOCKS, _RESTARTS, _CONVERGED = 8, 12, 20, 1e-7


def principal_axes(features: Tensor, labels: Tensor, num_classes: int, n_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, leading eigenvectors and eigenvalues of the covariance of each class.

    :func:`bbfast.ops.class_moments` and a batched symmetric eigensolver in float64 up to 1,024 features; above, inner
    products of the samples up to 1,024 samples a class, then block Lanczos from a fixed start.

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
            rows = features[labels == c]
            yield (_few_samples if len(rows) <= _MAX_COVARIANCE else _krylov)(rows, q)
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


def _few_samples(rows: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top ``q`` principal directions of ``[n, d]`` from the ``n x n`` matrix of inner products."""
    n, d = rows.shape
    x = rows.double()
    mean = x.mean(dim=0) if n else x.new_zeros(d)
    x = x - mean
    values, vectors = torch.linalg.eigh(x @ x.mT)
    # Directions of no variance are whatever completes the basis.
    padded = torch.cat([x.mT @ vectors.flip(-1)[:, :q], torch.eye(d, max(q - n, 0), dtype=x.dtype, device=x.device)], 1)
    axes = torch.linalg.qr(padded).Q
    values = torch.nn.functional.pad(values.flip(-1)[:q].clamp(min=0) / max(n - 1, 1), (0, max(q - n, 0)))
    return mean[None], axes[None], values[None]


def _krylov(rows: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top ``q`` principal directions of ``[n, d]`` by block Lanczos, restarted until they no longer change.

    The start depends on ``d`` alone. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.3.
    """
    n, d = rows.shape
    width = min(q + _OVERSAMPLE, d)
    x = rows.double()
    mean = x.mean(dim=0)
    x = x - mean
    start = torch.randn(d, width, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    block = torch.linalg.qr(start.to(x.device)).Q
    values, vectors = block.new_zeros(q), block
    for _ in range(_RESTARTS):
        basis, images = block, x.mT @ (x @ block)
        for _ in range(min(_BLOCKS, d // width) - 1):
            new = images[:, -width:]
            for _ in range(2):  # twice is enough to be orthogonal to rounding
                new = torch.linalg.qr(new - basis @ (basis.mT @ new)).Q
            basis, images = torch.cat([basis, new], dim=1), torch.cat([images, x.mT @ (x @ new)], dim=1)
        found, rotation = torch.linalg.eigh(basis.mT @ images)
        rotation = rotation.flip(-1)[:, :width]
        block, values = basis @ rotation, found.flip(-1)[:q]
        vectors = block[:, :q]
        residual = (images @ rotation[:, :q] - vectors * values).norm(dim=0)
        if bool((residual <= _CONVERGED * values[0]).all()):
            break
    return mean[None], vectors[None], values[None].clamp(min=0) / (n - 1)
