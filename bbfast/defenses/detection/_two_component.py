"""SCAn's model of features: a class mean drawn from one normal distribution, and noise shared by all classes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

__all__ = ["TwoComponent", "fit", "ledoit_wolf", "likelihood_ratio"]

# Directions with less than this part of the largest variance are rounding of float32 features.
_RANK = 1e-12
_JITTER = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class TwoComponent:
    """``x = mu_y + e`` with ``mu ~ N(0, between)`` a class and ``e ~ N(0, within)`` a sample.

    The clean samples span few directions, ``r < n`` of ``d``; both covariances live there, what shrinkage adds is the
    same in all directions.

    Args:
        basis: float64 ``[d, r]``, orthonormal columns: the span of the clean samples.
        between: float64 ``[r, r]``, covariance of class means.
        within: float64 ``[r, r]``, covariance of the noise, not shrunk.
        shrinkage: Part ``a`` of the noise's covariance that is replaced by ``trace / d`` times the identity.
        iterations: Iterations of EM.
    """

    basis: Tensor
    between: Tensor
    within: Tensor
    shrinkage: float
    iterations: int

    @property
    def _sphere(self) -> Tensor:
        """What shrinkage puts on the diagonal."""
        return self.shrinkage * self.within.trace() / self.basis.shape[0]

    @property
    def _noise(self) -> Tensor:
        eye = torch.eye(len(self.within), dtype=self.within.dtype, device=self.within.device)
        return (1 - self.shrinkage) * self.within + self._sphere * eye

    def whitened(self, x: Tensor) -> Tensor:
        """``x`` ``[..., d]`` in coordinates in which the noise has the identity as covariance; of the same shape.

        Without shrinkage, directions that the clean samples do not have are dropped (a pseudo-inverse).
        """
        values, vectors = torch.linalg.eigh(self._noise)
        scale = torch.where(values > _RANK * values[-1], values, torch.inf).rsqrt()
        inside = x @ self.basis
        shaped = (inside @ vectors * scale) @ vectors.mT
        if self.shrinkage == 0:
            return shaped @ self.basis.mT
        outside = self._sphere.rsqrt()
        return outside * x + (shaped - outside * inside) @ self.basis.mT

    def class_mean(self, count: Tensor, total: Tensor) -> Tensor:
        """Posterior mean of ``mu`` of each class, ``[K, d]``.

        Args:
            count: int64 ``[K]``, samples of each class.
            total: float64 ``[K, d]``, their sums.
        """
        return _posterior(self.between, self._noise, count, total @ self.basis) @ self.basis.mT


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    shrinkage: float | Literal["ledoit_wolf"] = "ledoit_wolf",
    *,
    max_iter: int = 100,
    tolerance: float = 1e-5,
) -> TwoComponent:
    """Fit by EM to clean features centred by their mean; every iteration works on sums over classes only.

    Args:
        features: ``[n, d]``, clean, of at least two classes.
        labels: int64 ``[n]``, true classes.
        num_classes: Classes K.
        shrinkage: Part in ``[0, 1)``, or Ledoit and Wolf's estimate of the best one from the residuals.
        max_iter: Most iterations.
        tolerance: EM ends when the covariances change by less than this (sum of Frobenius norms).

    Raises:
        ValueError: if the features do not vary, or not within the classes.

    Source: Tang et al., USENIX Security 2021, arXiv 1908.00686, section 4.2; Chen et al., ECCV 2012 (the EM).
    """
    x = features.double() - features.double().mean(dim=0)
    basis = _span(x)
    if basis.shape[1] == 0:
        raise ValueError("the features are the same for all clean samples")
    z = x @ basis
    n, r = z.shape
    count = torch.bincount(labels, minlength=num_classes)
    total = z.new_zeros(num_classes, r).index_add_(0, labels, z)
    square = z.mT @ z
    mean = total / count.clamp(min=1)[:, None]
    between, within = _covariances(square, count, total, mean, n)
    if float(within.trace()) <= _RANK * float(square.trace()) / n:
        raise ValueError("the features are the same for all clean samples of a class")
    iterations, change = 0, torch.inf
    while iterations < max_iter and change > tolerance:
        mean = _posterior(between, within, count, total)
        old = between, within
        between, within = _covariances(square, count, total, mean, n)
        change = float((between - old[0]).norm() + (within - old[1]).norm())
        iterations += 1
    if shrinkage == "ledoit_wolf":
        shrinkage = ledoit_wolf(z - mean[labels], x.shape[1])
    return TwoComponent(basis, between, within, float(shrinkage), iterations)


def likelihood_ratio(sizes: Tensor, centers: Tensor, mean: Tensor, prior_mean: Tensor) -> Tensor:
    """How much better two groups explain a class than one does, a sample: twice the log-likelihood ratio over n.

    All in whitened coordinates, where with ``m`` the class's mean and ``mu`` its posterior one it is ``(n1 |u1|^2 + n2
    |u2|^2 - n |m|^2) / n + |mu - m|^2``.

    Args:
        sizes: int64 ``[G, 2]``, samples of the groups.
        centers: float64 ``[G, 2, d]``, their means.
        mean: float64 ``[G, d]``, means of the classes.
        prior_mean: float64 ``[G, d]``, posterior means of the classes.

    Returns:
        float64 ``[G]``.
    """
    share = sizes.double() / sizes.sum(dim=1, keepdim=True)
    split = (share * centers.square().sum(dim=-1)).sum(dim=1) - mean.square().sum(dim=-1)
    return split + (prior_mean - mean).square().sum(dim=-1)


def ledoit_wolf(residuals: Tensor, d: int) -> float:
    """Part of the covariance of ``residuals`` ``[n, r]`` that is best replaced by a multiple of the identity in ``d``
    dimensions, of which the residuals span at most ``r``.

    Source: Ledoit and Wolf, Journal of Multivariate Analysis 2004, section 3.
    """
    n = residuals.shape[0]
    x = residuals - residuals.mean(dim=0)
    squared = x.square().sum(dim=1)
    trace = squared.sum() / n
    norm = (x.mT @ x / n).square().sum()
    distance = norm - trace.square() / d
    noise = (squared.square().sum() / n - norm) / n
    return float((noise / distance).clamp(0, 1)) if float(distance) > 0 else 0.0


def _covariances(square: Tensor, count: Tensor, total: Tensor, mean: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Covariances (of n - 1) of the class mean and of the residual of each sample, whose sum is 0, from sums alone."""
    weighted = mean * count[:, None]
    middle = weighted.sum(dim=0) / n
    means = mean.mT @ weighted
    mixed = total.mT @ mean
    off = n * torch.outer(middle, middle)
    return (means - off) / (n - 1), (square - mixed - mixed.mT + means - off) / (n - 1)


def _posterior(between: Tensor, within: Tensor, count: Tensor, total: Tensor) -> Tensor:
    """``between (n between + within)^-1 total`` for each class: the E step; one factorisation for each size."""
    result = torch.zeros_like(total)
    eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
    for n in count.unique().tolist():
        if n == 0:
            continue  # a class without samples has the prior's mean, 0
        rows = count == n
        matrix = n * between + within
        factor = torch.linalg.cholesky(matrix + _JITTER * matrix.trace() / len(matrix) * eye)
        result[rows] = torch.cholesky_solve(total[rows].mT, factor).mT @ between
    return result


def _span(x: Tensor) -> Tensor:
    """Orthonormal basis of the rows of ``x`` ``[n, d]``, by the smaller of its two square matrices."""
    n, d = x.shape
    if d <= n:
        values, vectors = torch.linalg.eigh(x.mT @ x)
        return vectors[:, values > _RANK * values[-1].clamp(min=1e-300)]
    values, vectors = torch.linalg.eigh(x @ x.mT)
    kept = values > _RANK * values[-1].clamp(min=1e-300)
    return torch.linalg.qr(x.mT @ vectors[:, kept]).Q
