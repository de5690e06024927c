"""Robust covariance and quantum-entropy scores of many small point sets at once: the algebra of SPECTRE.

Every set is a row of a batch, padded at its end; ``member`` marks its points. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["covariance", "inverse_root", "que_matrix", "que_scores", "robust_members", "top_eigenpair"]

# Eigenvalues below this part of the largest are raised to it before they are inverted.
_FLOOR = 1e-6
# Where the covariance exceeds the identity by less than this, nothing was removed and the rest is rounding.
_EXCESS = 1e-9
# Sets of at most so many points keep the inner products of all pairs.
_FEW_POINTS = 1024
_LANCZOS_STEPS, _LANCZOS_RESTARTS, _LANCZOS_TOLERANCE = 32, 10, 1e-6


def covariance(x: Tensor, member: Tensor) -> Tensor:
    """Covariance (of n - 1) of the members of each set, ``[G, k, k]``.

    Args:
        x: ``[G, n, k]``.
        member: bool ``[G, n]``.
    """
    weight = member.to(x.dtype)[..., None]
    count = weight.sum(dim=1, keepdim=True)
    centred = (x - (x * weight).sum(dim=1, keepdim=True) / count) * weight
    return centred.mT @ centred / (count - 1).clamp(min=1)


def inverse_root(matrix: Tensor) -> Tensor:
    """Inverse square root of symmetric matrices ``[G, k, k]``, small eigenvalues raised to 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = (_FLOOR * values[:, -1:]).clamp(min=1e-300)
    return (vectors * values.clamp(min=0).maximum(floor).rsqrt()[:, None]) @ vectors.mT


def que_matrix(cov: Tensor, alpha: float) -> Tensor:
    """``exp(alpha (cov - I) / (|cov|_2 - 1))`` with trace 1, the matrix exponential: ``[G, k, k]``.

    Where no direction has a variance above 1 the quotient is 0 / 0 and the answer ``I / k``: no direction stands out.

    Source: Dong, Hopkins and Li, NeurIPS 2019 (quantum entropy scoring).
    """
    values, vectors = torch.linalg.eigh(cov)
    excess = values[:, -1:] - 1
    exponent = torch.where(excess > _EXCESS, alpha * (values - 1) / excess.clamp(min=_EXCESS), 0.0)
    weight = torch.softmax(exponent, dim=1)
    return (vectors * weight[:, None]) @ vectors.mT


def que_scores(x: Tensor, matrix: Tensor) -> Tensor:
    """``x_i^T M x_i``, ``[G, n]``."""
    return ((x @ matrix) * x).sum(dim=-1)


def robust_members(x: Tensor, member: Tensor, fraction: Tensor, limit: Tensor, tau: float = 0.1) -> Tensor:
    """Members of each set without the points that spoil its covariance, bool ``[G, n]``.

    Points are dropped while one lies very far out (``h >= 10 k ln(n / tau)``), or while their fourth moments exceed
    what a normal distribution with a ``fraction`` of outliers may show; never more than ``limit`` in all.

    Args:
        x: ``[G, n, k]``, centred.
        member: bool ``[G, n]``.
        fraction: float64 ``[G]``, part of the points that may be outliers.
        limit: int64 ``[G]``, most points dropped.
        tau: Probability of dropping a good point as far out.

    Source: Hayase et al., ICML 2021, algorithm 3 (after Diakonikolas et al., ICML 2017).
    """
    kept, k = member.clone(), x.shape[2]
    left, active, guess = limit.clone(), limit > 0, x.new_zeros(x.shape[:2])
    while bool(active.any()):
        rows = active.nonzero()[:, 0]
        points, inside, e = x[rows] * kept[rows][..., None], kept[rows], fraction[rows]
        count = inside.sum(dim=1)
        y = points @ inverse_root(points.mT @ points / count[:, None, None])
        far = y.square().sum(dim=-1)
        wrong = inside & (far >= 10 * k * (count / tau).log()[:, None])
        clear = ~wrong.any(dim=1)
        rank, converged = far, torch.zeros_like(clear)
        if bool(clear.any()):
            value, vector, guess[rows[clear]] = top_eigenpair(y[clear], count[clear], guess[rows[clear]])
            bound = 1 + 10 * e[clear] * e[clear].log().square()
            converged[clear] = value <= bound
            spread = (que_scores(y[clear], vector) - vector.diagonal(dim1=1, dim2=2).sum(-1)[:, None]) / math.sqrt(2)
            away, out = _tail(spread, inside[clear], e[clear])
            rank[clear], wrong[clear] = away, out & ~converged[clear][:, None]
        drop = _at_most(wrong, rank, left[rows])
        kept[rows] &= ~drop
        left[rows] -= drop.sum(dim=1)
        active[rows] = drop.any(dim=1) & (left[rows] > 0)
    return kept


def top_eigenpair(y: Tensor, count: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest eigenvalue ``[G]`` and its matrix ``[G, k, k]``, of norm 1, of ``V -> E[(y^T V y) y y^T] - tr(V) I``.

    For whitened ``y`` that is the covariance of ``y y^T``, so no eigenvalue is negative, and those of a normal
    distribution are 2. It is found as a combination ``sum_i u_i (y_i y_i^T - I)`` by Lanczos over ``u``; for few points
    through the inner products ``(y_i^T y_j)^2``. The start is the operator's image of the identity, so there are no
    random numbers, and a rotation of ``y`` rotates the answer.

    Args:
        y: ``[G, n, k]``, whitened, 0 on what is no member.
        count: int64 ``[G]``, members.
        guess: ``[G, n]``, the ``u`` of a set that differs little; 0 is no guess.

    Returns:
        Value, matrix, and ``u`` ``[G, n]`` of norm 1.
    """
    _, size, k = y.shape
    n = count.to(y.dtype)[:, None]
    far = y.square().sum(dim=-1)
    member = (far > 0).to(y.dtype)
    kernel = None
    if size <= _FEW_POINTS:
        kernel = (y @ y.mT).square() - far[:, :, None] - far[:, None] + k

    def combined(u: Tensor) -> Tensor:
        """``sum_i u_i (y_i y_i^T - I)``."""
        matrix = y.mT @ (y * u[..., None])
        matrix.diagonal(dim1=1, dim2=2).sub_(u.sum(dim=1, keepdim=True))
        return matrix

    def operate(u: Tensor) -> Tensor:
        if kernel is not None:
            return (kernel @ u[..., None])[..., 0] * member / n
        v = combined(u)
        return (que_scores(y, v) - v.diagonal(dim1=1, dim2=2).sum(-1)[:, None]) * member / n

    start = (far - k) * member
    if guess is not None:
        start = guess * member + 0.1 * start / start.norm(dim=1, keepdim=True).clamp(min=1e-300)
    value, weight = _lanczos(operate, start)
    vector = combined(weight)
    vector = (vector + vector.mT) / 2
    return value, vector / vector.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-300), weight


def _lanczos(operate: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue ``[G]`` of a positive operator on vectors, and its vector ``[G, m]``, by restarted Lanczos."""
    value, vector = start.new_zeros(len(start)), start
    steps = min(_LANCZOS_STEPS, start.shape[1])
    for _ in range(_LANCZOS_RESTARTS):
        basis = start.new_zeros(len(start), steps, start.shape[1])
        images = torch.zeros_like(basis)
        new = vector
        for step in range(steps):
            length = new.norm(dim=1, keepdim=True)
            # A set whose space is exhausted goes on with zeros.
            alive = length > 1e-10 * (images[:, step - 1].norm(dim=1, keepdim=True) if step else 1e-300)
            basis[:, step] = torch.where(alive, new / length.clamp(min=1e-300), 0.0)
            images[:, step] = new = operate(basis[:, step])
            for _ in range(2):  # twice is enough to be orthogonal to rounding
                new = new - ((new[:, None] @ basis.mT) @ basis)[:, 0]
        values, rotation = torch.linalg.eigh(basis @ images.mT)
        value, best = values[:, -1], rotation[:, None, :, -1]
        vector = (best @ basis)[:, 0]
        error = ((best @ images)[:, 0] - value[:, None] * vector).norm(dim=1)
        if bool((error <= _LANCZOS_TOLERANCE * value).all()):
            break
    return value, vector


def _tail(spread: Tensor, inside: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from the median, and which of them a normal tail with a ``fraction`` of outliers cannot explain."""
    count = inside.sum(dim=1, keepdim=True)
    ranked = torch.where(inside, spread, torch.inf).sort(dim=1).values
    middle = (ranked.gather(1, (count - 1) // 2) + ranked.gather(1, count // 2)) / 2
    away = torch.where(inside, (spread - middle).abs(), -torch.inf)
    ordered = torch.where(inside, away, torch.inf).sort(dim=1).values
    position = torch.arange(spread.shape[1], device=spread.device)
    t, e = ordered - 3, fraction[:, None]
    allowed = torch.where(t <= 10 * (1 / e).log(), 1.0, 3 * e / (t * t.clamp(min=1).log()).square())
    late = (t > 0) & (position < count) & (1 - position / count >= allowed)
    first = late.int().argmax(dim=1, keepdim=True)
    return away, inside & late.any(dim=1, keepdim=True) & (away > t.gather(1, first))


def _at_most(wrong: Tensor, rank: Tensor, limit: Tensor) -> Tensor:
    """The ``limit`` highest-ranked of the ``wrong`` ones of each row; ties in order of position."""
    order = torch.where(wrong, rank, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(wrong)
    chosen.scatter_(1, order, torch.arange(wrong.shape[1], device=wrong.device) < limit[:, None])
    return chosen & wrong
