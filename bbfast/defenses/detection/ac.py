"""Activation Clustering: poisoned samples of a class form a cluster of their own in the model's features."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.defenses._content import content_keys
from bbfast.defenses._retrain import demand_recipe, retrain
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._clusters import (
    ClassClusters,
    cluster_classes,
    membership_margin,
    nearer_to_another_class,
)
from bbfast.defenses.detection._exre import Reclassified, judge, reclassify
from bbfast.defenses.features import FeatureReader, Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError

__all__ = ["AC"]

_log = logging.getLogger(__name__)


@register_defense("ac")
class AC(Defense):
    """Split each class's features into two clusters and call one of them poison; train again without it.

    1. Penultimate features of the training set (eval mode, no augmentation), one shared pass.
    2. Per given label: centre, keep ``n_dims`` principal components, 2-means (``n_init`` restarts by k-means++, and
       three starts for each component, cut at 10, 50 and 90 % of its samples).
    3. Judge the clusters (``analysis``), flag the samples of the guilty ones.
    4. ``retrain``: a fresh model trained on the rest with the recipe of the attacked one.

    **Analyses.** ``smaller``: the smaller cluster of every class, so up to half of each clean class goes
    (BackdoorBench's default). ``relative-size``: clusters under ``size_threshold`` of the class. ``silhouette-scores``
    (default): those, in classes whose silhouette exceeds ``silhouette_threshold``. ``distance``: a cluster whose median
    lies nearer to another class's median than to its own class's. ``exre`` (the paper's exclusionary reclassification):
    a model trained without a cluster names most of its samples as one other class (``kept / moved <= exre_threshold``).
    It takes one training for the largest clusters of all classes together, one for the next largest, and so on, about
    as much as one training on everything; a cluster of more than ``1 - size_threshold`` of its class is not tested.

    **What it can see.** Size rules need the poisoned share of the target class well under a half. With one target and
    ten classes, a poisoning ratio of 10 % makes it about half: the clusters may be perfect and ``smaller``,
    ``relative-size`` and ``silhouette-scores`` still name the wrong one or none; ``info["split_evenly"]`` lists classes
    that look so. Only ``exre`` can then tell which half is the class. At 1 to 5 % the size rules work.

    **Reduction.** ``pca`` (default) keeps the components' scale. ``ica`` and ``whiten`` divide by the standard
    deviations: FastICA with unit variance is that followed by a rotation, to which distances, sizes and silhouettes are
    blind, so both names run the whitening and no ICA iteration. The paper and BackdoorBench's detector whiten, its
    mitigation does not. Whitening shrinks exactly the direction that tells two clusters apart: on a Gaussian fixture
    with 10 % contamination at 6 standard deviations k-means with random restarts misses the cluster in four of ten
    runs after it, never without it. The starts along the components find it in both.

    **Scores.** Position of a sample between the centre of the largest cluster (-1) and of the nearest other one (+1),
    times ``min(1, size_threshold / share of that cluster)``; times the class's silhouette under ``silhouette-scores``;
    under ``exre`` between the cluster least like poison and the others, times ``moved / (kept + moved)``. The decision
    is made on clusters, so there is no threshold on this scale.

    Samples of classes with fewer than ``max(20, 2 * n_dims)`` samples (``min_samples``) are not scored: score NaN, flag
    False, the classes listed in ``info["unscored"]``. Images of equal pixels always share their fate, and the storage
    order of the training set does not matter.

    Source: Chen et al., SafeAI@AAAI 2019, arXiv 1811.03728; defaults of BackdoorBench. Not copied from it: clustering
    within mini-batches, verdicts attached to other samples by a second shuffled pass, augmentation while features are
    taken, an uninitialised verdict of the larger cluster under ``silhouette-scores``.
    """

    card = DefenseCard(
        title="Activation Clustering",
        paper="Chen et al., Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering, SafeAI 2019",
        year=2019,
        arxiv="1811.03728",
        kinds=("detection", "training"),
        needs=frozenset({"model", "poisoned_train", "fresh_model"}),
        summary="Clusters each class's features in two, drops the cluster that looks like poison, trains again.",
        deviations=(
            "Clusters each class over the whole training set; BackdoorBench clusters mini-batches and attaches the "
            "verdicts to other samples.",
            "k-means with 10 restarts and 30 starts along the components instead of the 1 of current scikit-learn.",
            "ICA is run as PCA whitening, which gives the same partition.",
            "Plain principal components by default, as BackdoorBench's mitigation; the paper uses ICA.",
            "exre excludes one cluster of every class at a time, at most 65 % of a class; where all clusters of "
            "a class fail the test, the one classified least confidently is let off.",
            "The silhouette of a class is taken on at most 2,000 of its samples.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of Activation Clustering.

        Args:
            n_dims: Components kept.
            n_clusters: Clusters a class; the largest is never flagged by a size rule.
            reduce: ``pca`` keeps the components' scale, ``ica`` and ``whiten`` equalise it.
            analysis: How clusters are judged.
            size_threshold: Share of the class under which a cluster is small; under ``exre`` what must stay.
            silhouette_threshold: Silhouette above which a class counts as split, for ``silhouette-scores``.
            exre_threshold: Largest ``kept / moved`` of a poisonous cluster, for ``exre``.
            n_init: Restarts of k-means.
            silhouette_samples: Most samples of a class in its silhouette; None takes all.
            min_samples: Fewest samples of a class that is scored; None is ``max(20, 2 * n_dims)``.
            retrain: Train a fresh model without the flagged samples; False gives scores and flags only.
        """

        detect_only: ClassVar[dict[str, Any]] = {"retrain": False}
        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"reduce": "pca", "analysis": "smaller"},
            "paper": {"reduce": "ica", "analysis": "exre"},
        }
        dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"gtsrb": {"min_samples": 40}}

        n_dims: int = Field(10, ge=1)
        n_clusters: int = Field(2, ge=2)
        reduce: Literal["pca", "ica", "whiten"] = "pca"
        analysis: Literal["smaller", "relative-size", "silhouette-scores", "distance", "exre"] = "silhouette-scores"
        size_threshold: float = Field(0.35, gt=0, le=1)
        silhouette_threshold: float = Field(0.1, ge=-1, le=1)
        exre_threshold: float = Field(1.0, ge=0)
        n_init: int = Field(10, ge=1)
        silhouette_samples: int | None = Field(2000, ge=2)
        min_samples: int | None = Field(None, ge=1)
        retrain: bool = True

        @property
        def fewest(self) -> int:
            """Fewest samples of a class that is scored."""
            return max(20, 2 * self.n_dims) if self.min_samples is None else max(self.min_samples, self.n_clusters)

    def check(self, view: DefenderView) -> None:
        if self.config.retrain or self.config.analysis == "exre":
            demand_recipe(view, "ac", ", or retrain=False")

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        return [FeatureReader("penultimate")] if source == "poisoned_train" else ()

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, data = self.config, view.poisoned_train
        clock = time.perf_counter()
        seconds: dict[str, float] = {}

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[name], clock = now - clock, now

        features = view.features("penultimate", "poisoned_train").flatten(1)
        broken = int((~features.isfinite().all(dim=1)).sum())
        if broken:
            raise UnsupportedModelError(
                "ac",
                type(view.model).__name__,
                f"its features are NaN or infinite on {broken} of {len(features)} training samples",
                "its training diverged",
            )
        lap("features")
        labels = data.labels.to(features.device)
        clusters = cluster_classes(
            features,
            labels,
            content_keys(data.images).to(features.device),
            view.num_classes,
            k=cfg.n_clusters,
            n_dims=cfg.n_dims,
            whiten=cfg.reduce != "pca",
            n_init=cfg.n_init,
            min_count=cfg.fewest,
            generator=lambda c: view.generator(f"ac/{c}"),
            silhouette_samples=cfg.silhouette_samples,
        )
        suspicious, weight, details = self._judge(view, clusters, features, labels)
        scores = membership_margin(clusters, suspicious, weight)
        member = clusters.cluster[:, None] == torch.arange(cfg.n_clusters, device=labels.device)
        flags = (suspicious[clusters.slot.clamp(min=0)] & member).any(dim=1) if len(suspicious) else member.any(dim=1)
        lap("cluster")

        model: nn.Module | None = None
        history: list[dict[str, Any]] = []
        if cfg.retrain:
            model, history = retrain(view, ~flags, "ac")
            lap("retrain")
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model,
            scores=scores.float().cpu(),
            flags=flags.cpu(),
            verdict=self._verdict(clusters, suspicious),
            history=history,
            info={"seconds": seconds, **self._info(view, clusters, suspicious, flags), **details},
        )

    def _judge(
        self, view: DefenderView, clusters: ClassClusters, features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Guilty clusters, bool ``[S, k]``; weight of each in the score, float64 ``[S, k]``; what to tell about it."""
        cfg = self.config
        shares, details = clusters.shares, {}
        weight = (cfg.size_threshold / shares).clamp(max=1.0)
        follower = torch.zeros_like(shares, dtype=torch.bool)
        follower[:, 1:] = clusters.sizes[:, 1:] > 0
        if cfg.analysis == "smaller":
            last = (clusters.sizes > 0).sum(dim=1, keepdim=True) - 1
            suspicious = follower & (torch.arange(cfg.n_clusters, device=shares.device) == last)
        elif cfg.analysis == "relative-size":
            suspicious = follower & (shares < cfg.size_threshold)
        elif cfg.analysis == "silhouette-scores":
            split = clusters.silhouettes[:, None]
            suspicious = follower & (shares < cfg.size_threshold) & (split > cfg.silhouette_threshold)
            weight = weight * split.clamp(min=0)
        elif cfg.analysis == "distance":
            suspicious = nearer_to_another_class(clusters, features, labels, view.num_classes)
        else:
            found = reclassify(
                clusters,
                view.num_classes,
                lambda j, keep, out: self._reclassify(view, j, keep, out),
                largest_share=1 - cfg.size_threshold,
            )
            suspicious, weight = judge(found, cfg.exre_threshold)
            details["exre"] = _describe(clusters, found)
        return suspicious, weight, details

    def _reclassify(self, view: DefenderView, round_: int, keep: Tensor, out: Tensor) -> Tensor:
        from bbfast.training import predict

        model, _ = retrain(view, keep, "ac", f"exre-{round_}")
        return predict(model, view.poisoned_train.subset(out.cpu()), device=view.device)

    def _verdict(self, clusters: ClassClusters, suspicious: Tensor) -> dict[str, Any]:
        if self.config.analysis == "smaller":
            return {}  # it accuses every class, so it says nothing about any
        targets = clusters.classes[suspicious.any(dim=1)].tolist()
        anomaly = dict(zip(clusters.classes.tolist(), (1 - clusters.shares.amin(dim=1)).tolist(), strict=True))
        return {"backdoored": bool(targets), "targets": targets, "anomaly": anomaly}

    def _info(self, view: DefenderView, clusters: ClassClusters, suspicious: Tensor, flags: Tensor) -> dict[str, Any]:
        cfg, names = self.config, clusters.classes.tolist()
        even = (clusters.shares.amin(dim=1) >= cfg.size_threshold) & (clusters.silhouettes > cfg.silhouette_threshold)
        split_evenly = clusters.classes[even].tolist()
        if split_evenly and cfg.analysis in ("relative-size", "silhouette-scores"):
            _log.info(
                "ac: classes %s are split too evenly for a size rule; analysis='exre' can judge them", split_evenly
            )
        present = torch.bincount(view.poisoned_train.labels, minlength=view.num_classes).nonzero()[:, 0].tolist()
        return {
            "sizes": dict(zip(names, clusters.sizes.tolist(), strict=True)),
            "silhouette": dict(zip(names, clusters.silhouettes.tolist(), strict=True)),
            "guilty_clusters": {
                c: row.nonzero()[:, 0].tolist() for c, row in zip(names, suspicious, strict=True) if row.any()
            },
            "split_evenly": split_evenly,
            "unscored": [c for c in present if c not in set(names)],
            "removed": int(flags.sum()),
        }


def _describe(clusters: ClassClusters, found: Reclassified) -> dict[int, list[dict[str, Any]]]:
    return {
        c: [
            {
                "kept": int(found.kept[s, j]),
                "moved": int(found.moved[s, j]),
                "source": int(found.source[s, j]),
                "confidence": float(found.confidence[s, j]),
            }
            for j in range(found.kept.shape[1])
            if bool(found.tested[s, j])
        ]
        for s, c in enumerate(clusters.classes.tolist())
    }
