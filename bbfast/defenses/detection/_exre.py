"""Exclusionary reclassification: what does a model that never saw a cluster make of it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bbfast.defenses.detection._clusters import ClassClusters

__all__ = ["Reclassified", "judge", "reclassify"]


@dataclasses.dataclass(frozen=True, eq=False)
class Reclassified:
    """What became of each cluster when a model without it classified it; ``[S, k]`` each.

    Args:
        kept: int64, samples classified as their given label.
        moved: int64, samples classified as the most frequent other class.
        source: int64, that other class; -1 if none.
        confidence: float64, mean of the largest probability; 0 for a cluster that was not excluded.
        tested: bool, the cluster was excluded: it is not empty and leaves enough of its class.
        present: bool, the cluster is not empty.
    """

    kept: Tensor
    moved: Tensor
    source: Tensor
    confidence: Tensor
    tested: Tensor
    present: Tensor

    @property
    def ratio(self) -> Tensor:
        """The ExRe score ``kept / moved``, float64; infinite where nothing moved or nothing was tested."""
        ratio = self.kept.double() / self.moved.double()
        return torch.where(self.tested & (self.moved > 0), ratio, torch.inf)


def reclassify(
    clusters: ClassClusters,
    num_classes: int,
    train_and_classify: Callable[[int, Tensor, Tensor], Tensor],
    largest_share: float = 0.65,
) -> Reclassified:
    """Train one model for each cluster rank, without the clusters of that rank, and let it classify them.

    Every class loses its largest cluster in the first round, its next one in the second, and so on: ``k`` trainings on
    together ``k - 1`` times the data, whatever the number of classes.

    Args:
        clusters: Clusters of the classes.
        num_classes: Classes.
        train_and_classify: Takes the round and the bool masks ``[N]`` of the samples to train on and to classify; gives
            the logits of the latter ``[M, K]``.
        largest_share: A cluster that is more of its class than this stays: a model cannot be asked about a class that
            it hardly saw.
    """
    sizes = clusters.sizes
    tested = (sizes > 0) & (sizes < sizes.sum(dim=1, keepdim=True)) & (clusters.shares <= largest_share)
    kept, moved = torch.zeros_like(sizes), torch.zeros_like(sizes)
    source, confidence = torch.full_like(sizes, -1), torch.zeros(sizes.shape, dtype=torch.float64, device=sizes.device)
    scored = clusters.slot >= 0
    for j in range(sizes.shape[1]):
        out = scored & (clusters.cluster == j) & tested[clusters.slot.clamp(min=0), j] if len(sizes) else scored
        if not bool(out.any()):
            continue
        slot = clusters.slot[out]
        best, predicted = train_and_classify(j, ~out, out).to(slot.device).double().softmax(dim=1).max(dim=1)
        votes = torch.zeros(len(sizes), num_classes, dtype=torch.int64, device=slot.device)
        votes.view(-1).index_add_(0, slot * num_classes + predicted, torch.ones_like(predicted))
        own = votes.gather(1, clusters.classes[:, None])
        others = votes.scatter(1, clusters.classes[:, None], -1)
        kept[:, j] = own[:, 0]
        moved[:, j], most = others.max(dim=1)
        source[:, j] = torch.where(moved[:, j] > 0, most, -1)
        confidence[:, j].index_add_(0, slot, best)
        confidence[:, j] /= sizes[:, j].clamp(min=1)
    return Reclassified(kept, moved, source, confidence, tested, sizes > 0)


def judge(found: Reclassified, threshold: float) -> tuple[Tensor, Tensor]:
    """Which clusters are poisonous, and how strongly the test speaks for it.

    A cluster is if ``kept / moved <= threshold``. Where that holds for every cluster of a class, the clusters are
    different things under one label, and one of them must be the class itself: a model that knows the triggered images'
    true classes names them with confidence, while a class it was never shown puzzles it, so the cluster classified with
    the least confidence is let off.

    Returns:
        bool ``[S, k]`` and evidence ``moved / (kept + moved)`` in 0..1, float64 ``[S, k]``, 0 for a cluster let off.
    """
    suspicious = found.tested & (found.ratio <= threshold)
    evidence = found.moved.double() / (found.kept + found.moved).clamp(min=1).double()
    every = (suspicious == found.present).all(dim=1) & suspicious.any(dim=1)
    known = torch.where(found.tested, found.confidence, torch.inf)
    rows = every.nonzero()[:, 0]
    spared = known[rows].argmin(dim=1)
    suspicious[rows, spared] = False
    evidence[rows, spared] = 0.0
    return suspicious, evidence
