"""Mean silhouette of a clustering, exact, in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["silhouette"]


def silhouette(points: Tensor, labels: Tensor, k: int, *, block: int = 1024) -> float:
    """Mean over the points of ``(b - a) / max(a, b)``.

    ``a`` is a point's mean distance to the others of its cluster, ``b`` the smallest mean distance to another cluster.
    A point alone in its cluster counts 0, as in scikit-learn; where all points share a cluster there is no structure
    and the answer is 0 (scikit-learn raises).

    Args:
        points: ``[n, D]``; computed in float64.
        labels: int64 ``[n]``, 0..k-1.
        k: Clusters.
        block: Rows of the distance matrix that exist at a time.

    Source: Rousseeuw 1987.
    """
    n = points.shape[0]
    x = points.double()
    members = torch.nn.functional.one_hot(labels, k).double() if n else x.new_zeros(0, k)
    sizes = members.sum(dim=0)
    if int((sizes > 0).sum()) < 2:
        return 0.0
    total = x.new_zeros(())
    for start in range(0, n, block):
        own = labels[start : start + block, None]
        # Never through inner products: they leave 1e-8 where the distance of a point to itself is 0.
        distance = torch.cdist(x[start : start + block], x, compute_mode="donot_use_mm_for_euclid_dist")
        sums = distance @ members
        size = sizes[own]
        a = sums.gather(1, own) / (size - 1).clamp(min=1)
        other = (sums / sizes).scatter(1, own, torch.inf).nan_to_num(nan=torch.inf)
        b = other.amin(dim=1, keepdim=True)
        score = torch.where(size > 1, (b - a) / torch.maximum(a, b).clamp(min=1e-300), 0.0)
        total = total + score.sum()
    return float(total / n)
