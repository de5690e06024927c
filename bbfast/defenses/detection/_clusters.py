"""Each class's features, reduced and clustered: the common part of activation-clustering detectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bbfast.defenses.detection._kmeans import kmeans, split_starts
from bbfast.defenses.detection._reduce import principal_axes
from bbfast.defenses.detection._silhouette import silhouette

__all__ = [
    "ClassClusters",
    "class_batches",
    "class_medians",
    "cluster_classes",
    "membership_margin",
    "nearer_to_another_class",
]

# Points of one batch of classes, padding included: as many as stay in a processor's cache, or as keep a GPU busy. Its
# largest class may have twice the points of its smallest.
_BATCH_POINTS = {"cpu": 1 << 13, "cuda": 1 << 20}
_SPREAD = 2


@dataclasses.dataclass(frozen=True, eq=False)
class ClassClusters:
    """Clusters of every class that is large enough; ``S`` such classes.

    Args:
        classes: int64 ``[S]``, the class numbers, rising.
        slot: int64 ``[N]``, position of a sample's class in ``classes``; -1 where the class is too small.
        cluster: int64 ``[N]``, the sample's cluster, by falling size; -1 where the class is too small.
        sizes: int64 ``[S, k]``, falling.
        centers: float64 ``[S, k, q]``, in the reduced space of the class.
        squared: float64 ``[N, k]``, squared distances to the centres of the own class; 0 where the class is too small.
        silhouettes: float64 ``[S]``.
        inertia: float64 ``[S]``.
    """

    classes: Tensor
    slot: Tensor
    cluster: Tensor
    sizes: Tensor
    centers: Tensor
    squared: Tensor
    silhouettes: Tensor
    inertia: Tensor

    @property
    def shares(self) -> Tensor:
        """Sizes as shares of the class, float64 ``[S, k]``."""
        return self.sizes.double() / self.sizes.sum(dim=1, keepdim=True)


def cluster_classes(
    features: Tensor,
    labels: Tensor,
    ids: Tensor,
    num_classes: int,
    *,
    k: int,
    n_dims: int,
    whiten: bool,
    n_init: int,
    min_count: int,
    generator: Callable[[int], torch.Generator],
    silhouette_samples: int | None = None,
) -> ClassClusters:
    """Reduce each class to its leading principal components and split it by k-means.

    Samples are taken in order of ``ids`` and random numbers depend on the class alone, so the storage order of the
    samples does not change the outcome.

    Args:
        features: ``[N, d]``, finite.
        labels: int64 ``[N]``, 0..num_classes-1, as given.
        ids: int64 ``[N]``, numbers that stay with the samples.
        num_classes: Classes.
        k: Clusters a class.
        n_dims: Principal components kept.
        whiten: Divide each component by its standard deviation.
        n_init: Restarts of k-means; for two clusters three more for each component (``split_starts``).
        min_count: Classes with fewer samples are left out.
        generator: Gives a fresh generator for a class number.
        silhouette_samples: At most so many samples of a class enter its silhouette; None takes all.
    """
    n, device = features.shape[0], features.device
    order = ids.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=num_classes)
    starts = counts.cumsum(0) - counts
    scored = (counts >= max(min_count, k)).nonzero()[:, 0]
    mean, axes, variances = principal_axes(features[order], labels[order], num_classes, n_dims)
    if whiten:
        axes = axes * torch.where(variances > 0, variances, 1.0).rsqrt()[:, None] * (variances > 0)[:, None]

    size, q = scored.numel(), axes.shape[2]
    slot = torch.full((n,), -1, device=device)
    cluster = torch.full((n,), -1, device=device)
    squared = torch.zeros(n, k, dtype=torch.float64, device=device)
    sizes = torch.zeros(size, k, dtype=torch.int64, device=device)
    centers = torch.zeros(size, k, q, dtype=torch.float64, device=device)
    silhouettes, inertia = torch.zeros(2, size, dtype=torch.float64, device=device)
    draws = {int(c): generator(int(c)) for c in scored}
    for group in class_batches(counts[scored], _BATCH_POINTS.get(device.type, 1 << 13)):
        classes = scored[group]
        count = counts[classes]
        ranks = torch.arange(int(count.max()), device=device)
        real = ranks < count[:, None]
        index = order[(starts[classes][:, None] + ranks).clamp(max=n - 1)]
        points = torch.stack(
            [(features[rows].double() - mean[c]) @ axes[c] for c, rows in zip(classes.tolist(), index, strict=True)]
        )
        uniforms = torch.stack([torch.rand(n_init, k, generator=draws[int(c)], dtype=torch.float64) for c in classes])
        found = kmeans(points, count, k, uniforms, split_starts(points, count) if k == 2 else None)
        slot[index[real]] = group[:, None].expand_as(index)[real]
        cluster[index[real]] = found.labels[real]
        squared[index[real]] = torch.cdist(points, found.centers, compute_mode="donot_use_mm_for_euclid_dist")[
            real
        ].square()
        sizes[group], centers[group], inertia[group] = found.sizes, found.centers, found.inertia
        for s, c, m, x, y in zip(group.tolist(), classes.tolist(), count.tolist(), points, found.labels, strict=True):
            some = torch.arange(m)
            if silhouette_samples is not None and m > silhouette_samples:
                some = torch.randperm(m, generator=draws[c])[:silhouette_samples]
            some = some.to(device)
            silhouettes[s] = silhouette(x[some], y[some], k)
    return ClassClusters(scored, slot, cluster, sizes, centers, squared, silhouettes, inertia)


def membership_margin(clusters: ClassClusters, suspicious: Tensor, weight: Tensor) -> Tensor:
    """How far a sample lies from its class's main cluster towards another, times that cluster's weight.

    ``(|x - main|^2 - |x - c|^2) / |main - c|^2`` is -1 at the main centre, 0 half way and +1 at ``c``. The main cluster
    is the largest one that is not suspicious. The largest product over the other clusters counts.

    Args:
        clusters: Clusters of the classes.
        suspicious: bool ``[S, k]``.
        weight: float64 ``[S, k]``, not negative.

    Returns:
        float64 ``[N]``; NaN for samples of classes that were not clustered, minus the weight where a class has one
        cluster.
    """
    size, k = suspicious.shape
    score = torch.full(clusters.slot.shape, torch.nan, dtype=torch.float64, device=weight.device)
    if size == 0:
        return score
    free = ~suspicious & (clusters.sizes > 0)
    main = torch.where(free.any(dim=1), free.int().argmax(dim=1), 0)
    rows = torch.arange(size, device=weight.device)
    gap = (clusters.centers - clusters.centers[rows, main][:, None]).square().sum(dim=-1)
    other = (clusters.sizes > 0) & (torch.arange(k, device=weight.device) != main[:, None])
    known = clusters.slot >= 0
    slot, squared = clusters.slot[known], clusters.squared[known]
    margin = (squared.gather(1, main[slot][:, None]) - squared) / gap[slot].clamp(min=1e-300)
    towards = torch.where(other[slot], margin * weight[slot], -torch.inf).amax(dim=1)
    alone = -weight[rows, main][slot]
    score[known] = torch.where(other.any(dim=1)[slot], towards, alone)
    return score


def class_medians(features: Tensor, groups: Tensor, count: int) -> Tensor:
    """Coordinate-wise median of each group's rows, ``[count, d]``; NaN for a group without rows.

    Args:
        features: ``[N, d]``.
        groups: int64 ``[N]``, 0..count-1, or -1 for rows of no group.
        count: Groups.
    """
    medians = torch.full((count, features.shape[1]), torch.nan, dtype=features.dtype, device=features.device)
    for group in range(count):
        rows = features[groups == group]
        if len(rows):
            ordered = rows.sort(dim=0).values
            medians[group] = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    return medians


def nearer_to_another_class(clusters: ClassClusters, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Clusters whose median lies nearer to another class's median than to that of their own class; bool ``[S, k]``.

    In the full feature space: the classes' reduced spaces have nothing to do with each other.
    """
    size, k = clusters.sizes.shape
    centres = class_medians(features, labels, num_classes)
    group = torch.where(clusters.slot >= 0, clusters.slot * k + clusters.cluster, -1)
    medians = class_medians(features, group, size * k)
    distance = torch.cdist(medians.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist")
    own_class = clusters.classes.repeat_interleave(k)[:, None]
    own = distance.gather(1, own_class)[:, 0]
    others = distance.nan_to_num(nan=torch.inf).scatter(1, own_class, torch.inf).amin(dim=1)
    return (others < own).view(size, k)


def class_batches(counts: Tensor, most: int) -> Iterator[Tensor]:
    """Positions of classes of like size that are clustered together, so that little is padding."""
    order = counts.argsort()
    ranked = counts[order].tolist()
    start = 0
    for stop in range(1, len(ranked) + 1):
        full = stop == len(ranked)
        if full or ranked[stop] > _SPREAD * ranked[start] or ranked[stop] * (stop - start + 1) > most:
            yield order[start:stop]
            start = stop
