"""SCAn: a class that is better explained by two groups of features than by one has been contaminated."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._clusters import class_batches
from bbfast.defenses.detection._inspected import Inspected, demand_role, finite_features, inspect
from bbfast.defenses.detection._kmeans import kmeans, split_starts
from bbfast.defenses.detection._two_component import TwoComponent, fit, likelihood_ratio
from bbfast.defenses.features import FeatureReader, Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.metrics import anomaly_index

__all__ = ["Scan", "TwoGroups", "two_groups"]

_log = logging.getLogger(__name__)

_FEWEST_CLASSES = 8
# Samples of one batch of classes, padding included.
_BATCH_POINTS = {"cpu": 1 << 13, "cuda": 1 << 17}
_DIRECTIONS, _POWER_ITERATIONS = 16, 4


@register_defense("scan")
class Scan(Defense):
    """Model clean features as class mean plus shared noise, and ask of each class whether it is one group or two.

    1. Clean reserve: ``x = mu_class + e``, ``mu ~ N(0, Su)``, ``e ~ N(0, Se)``; both covariances by EM. ``Se`` is
       shrunk towards a multiple of the identity (``shrinkage``), for a hundred images cannot fill 512 dimensions.
    2. Each class of the training set, together with its reserve images, is split in two by the assignment that ``Se``
       makes best: 2-means after whitening by ``Se``.
    3. ``J``: the likelihood ratio of two groups against one, whose mean is the posterior one under ``N(0, Su)``.
    4. ``J* = (J - median) / (1.4826 MAD)`` over the classes; above ``anomaly_threshold`` the class is a target.
    5. There the group with fewer reserve images (of equally many, the smaller group) is flagged.

    The score is the distance from the boundary of the two groups, towards the one with fewer reserve images, in
    standard deviations of the noise, times ``min(1, J* / anomaly_threshold)``: classes that look like the others rank
    low. Threshold: 0 in target classes.

    **What it can see.** One or a few target classes among at least 8 (the MAD of fewer says little; a warning is
    logged). Half of a class may be poison, or more: the reserve says which half. It cannot see all-to-all attacks,
    after which every class is two groups, nor poison whose features mix with those of its target.

    2-means starts in the 16 directions in which the whitened class varies most, from ``n_init`` k-means++ draws and
    cuts along each direction, and ends in all directions; from random starts there, small groups are missed.

    Samples of classes with fewer than ``min_samples`` samples are not scored: score NaN, flag False, the classes listed
    in ``info["unscored"]``.

    Source: Tang et al., USENIX Security 2021, arXiv 1908.00686. Not copied from BackdoorBench: the posterior mean
    without its factor ``Su Se^-1`` in the statistic, a two-sided index that also accuses the most homogeneous class,
    the reserve found by position (off by one) and drawn with replacement from the images of the evaluation.
    """

    card = DefenseCard(
        title="SCAn",
        paper="Tang et al., Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination "
        "Detection, USENIX Security 2021",
        year=2021,
        arxiv="1908.00686",
        kinds=("detection",),
        needs=frozenset({"model", "poisoned_train", "reserve"}),
        summary="Finds the class whose features are two groups where the others are one.",
        deviations=(
            "Penultimate features; BackdoorBench sums a convolution's output over space.",
            "The covariance of the noise is shrunk (Ledoit-Wolf); the papers' codes take a pseudo-inverse.",
            "The two groups come from the best of many starts of 2-means; the paper's from one random start.",
            "Only classes above the median can be targets; BackdoorBench's index is two-sided.",
            "Scores are the method's boundary as a margin; the paper has flags only.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of SCAn.

        Args:
            reserve_per_class: Clean images a class.
            shrinkage: Part of the noise's covariance replaced by a multiple of the identity; 0 is a pseudo-inverse.
            anomaly_threshold: ``J*`` of a target class.
            max_iter: Most iterations of EM.
            tolerance: Change of the covariances at which EM ends.
            n_init: Restarts of 2-means.
            min_samples: Fewest training samples of a class that is scored.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {"shrinkage": 0.0}}
        dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"gtsrb": {"min_samples": 40}}

        reserve_per_class: int = Field(10, ge=2)
        shrinkage: Annotated[float, Field(ge=0, lt=1)] | Literal["ledoit_wolf"] = "ledoit_wolf"
        anomaly_threshold: float = Field(math.exp(2), gt=0)
        max_iter: int = Field(100, ge=1)
        tolerance: float = Field(1e-5, gt=0)
        n_init: int = Field(10, ge=1)
        min_samples: int = Field(20, ge=2)

    def check(self, view: DefenderView) -> None:
        demand_role(view)
        counts = torch.bincount(view.reserve.labels, minlength=view.num_classes)
        if len(view.reserve) == 0 or int((counts > 0).sum()) < 2 or int(counts.max()) < 2:
            raise DataRequirementError(
                "scan needs clean images of at least 2 classes, 2 or more of one; the reserve has "
                f"{len(view.reserve)} images of {int((counts > 0).sum())} classes"
            )

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        return [FeatureReader("penultimate")] if source in ("poisoned_train", "reserve") else ()

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, clock = self.config, time.perf_counter()
        data, reserve = inspect(view), finite_features(view, "reserve")
        order = content_keys(view.reserve.images).to(reserve.device).argsort(stable=True)
        reserve, known = reserve[order], view.reserve.labels.to(reserve.device)[order]
        read = time.perf_counter()
        try:
            model = fit(reserve, known, view.num_classes, cfg.shrinkage, max_iter=cfg.max_iter, tolerance=cfg.tolerance)
        except ValueError as error:
            raise UnsupportedModelError("scan", type(view.model).__name__, str(error), "has it been trained?") from None
        fitted = time.perf_counter()
        groups = two_groups(view, data, reserve, known, model, cfg.n_init, cfg.min_samples)
        anomaly = anomaly_index(groups.ratio, side="high")
        weight = (anomaly / cfg.anomaly_threshold).clamp(0, 1).nan_to_num(nan=0.0)
        guilty = anomaly > cfg.anomaly_threshold
        scores = groups.margin * weight[data.labels]
        flags = guilty[data.labels] & (groups.margin > 0)
        scored = time.perf_counter()

        classes = (~groups.ratio.isnan()).nonzero()[:, 0].tolist()
        if len(classes) < _FEWEST_CLASSES:
            _log.warning("scan: %d classes are scored; outliers among fewer than 8 mean little", len(classes))
        targets = [c for c in anomaly.nan_to_num(nan=-1.0).argsort(descending=True).tolist() if guilty[c]]
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=data.stored(scores).float(),
            flags=data.stored(flags),
            threshold=torch.where(guilty, 0.0, torch.inf).float().cpu(),
            verdict={
                "backdoored": bool(targets),
                "targets": targets,
                "anomaly": {c: float(anomaly[c]) for c in classes},
            },
            info={
                "seconds": {"features": read - clock, "calibrate": fitted - read, "score": scored - fitted},
                "calibration": {
                    "samples": len(reserve),
                    "shrinkage": model.shrinkage,
                    "iterations": model.iterations,
                    "anomaly_threshold": cfg.anomaly_threshold,
                },
                "likelihood_ratio": {c: float(groups.ratio[c]) for c in classes},
                "share": {c: float(groups.share[c]) for c in classes},
                "unscored": ((data.counts > 0) & groups.ratio.isnan()).nonzero()[:, 0].tolist(),
            },
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TwoGroups:
    """Each class in two groups.

    Args:
        margin: float64 ``[N]``, distance from the boundary, above 0 on the side of the suspected group, in standard
            deviations of the noise; NaN where the class is too small.
        ratio: float64 ``[K]``, the likelihood ratio a sample; NaN where the class is too small.
        share: float64 ``[K]``, part of the class in the suspected group, the reserve included.
    """

    margin: Tensor
    ratio: Tensor
    share: Tensor


def two_groups(
    view: DefenderView,
    data: Inspected,
    reserve: Tensor,
    known: Tensor,
    model: TwoComponent,
    n_init: int,
    min_samples: int,
) -> TwoGroups:
    """Split every class, together with its clean images, by 2-means in whitened features.

    Args:
        view: Seeds the restarts.
        data: The training set.
        reserve: Features of the clean images, ``[n, d]``.
        known: Their labels.
        model: Fitted to them.
        n_init: Restarts.
        min_samples: Fewest training samples of a class that is split.
    """
    kept = (data.counts >= min_samples).nonzero()[:, 0]
    centre = data.features.sum(dim=0, dtype=torch.float64) + reserve.sum(dim=0, dtype=torch.float64)
    centre = centre / (len(data.labels) + len(known))
    clean = torch.bincount(known, minlength=len(data.counts))
    ratio, share = data.features.new_full((2, len(data.counts)), torch.nan, dtype=torch.float64)
    margin = data.features.new_full(data.labels.shape, torch.nan, dtype=torch.float64)
    for group in class_batches(data.counts[kept] + clean[kept], _BATCH_POINTS.get(data.features.device.type, 1 << 13)):
        classes = kept[group]
        # The training samples first, then the clean ones, then padding.
        sets = [
            model.whitened(torch.cat([data.features[data.members(c)], reserve[known == c]]).double() - centre)
            for c in classes.tolist()
        ]
        points = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True)
        count = (data.counts + clean)[classes]
        uniforms = torch.stack(
            [
                torch.rand(n_init, 2, generator=view.generator(f"scan/{c}"), dtype=torch.float64)
                for c in classes.tolist()
            ]
        )
        found = _split(points, count, uniforms)
        mean = points.sum(dim=1) / count[:, None]
        prior = _prior_means(model, data, reserve, known, classes, centre)
        ratio[classes] = likelihood_ratio(found.sizes, found.centers, mean, model.whitened(prior))
        for s, c in enumerate(classes.tolist()):
            rows, n = data.members(c), int(data.counts[c])
            spared = torch.bincount(found.labels[s, n : int(count[s])], minlength=2)
            suspect = 0 if int(spared[0]) < int(spared[1]) else 1
            towards = found.centers[s, suspect] - found.centers[s, 1 - suspect]
            gap = towards.norm().clamp(min=1e-300)
            margin[rows] = (points[s, :n] - found.centers[s].mean(dim=0)) @ towards / gap
            share[c] = found.sizes[s, suspect] / count[s]
    return TwoGroups(margin, ratio, share)


def _prior_means(
    model: TwoComponent, data: Inspected, reserve: Tensor, known: Tensor, classes: Tensor, centre: Tensor
) -> Tensor:
    """Posterior class means of the model for classes of the training set with their clean images, ``[G, d]``."""
    sums = [
        data.features[data.members(c)].sum(dim=0, dtype=torch.float64)
        + reserve[known == c].sum(dim=0, dtype=torch.float64)
        for c in classes.tolist()
    ]
    count = data.counts[classes] + torch.bincount(known, minlength=len(data.counts))[classes]
    return model.class_mean(count, torch.stack(sums) - count[:, None] * centre)


def _split(points: Tensor, count: Tensor, uniforms: Tensor) -> Any:
    """2-means of each set: many starts where it varies most, the best one carried on in all directions."""
    real = (torch.arange(points.shape[1], device=points.device) < count[:, None])[..., None]
    x = torch.where(real, points - points.sum(dim=1, keepdim=True) / count[:, None, None], 0.0)
    d = x.shape[2]
    width = min(_DIRECTIONS, d)
    start = torch.randn(d, width, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    basis = torch.linalg.qr(start.to(x.device)).Q.expand(len(x), -1, -1)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(x.mT @ (x @ basis)).Q
    coarse = x @ basis
    coarse = coarse @ torch.linalg.eigh(coarse.mT @ coarse).eigenvectors.flip(-1)
    found = kmeans(coarse, count, 2, uniforms, split_starts(coarse, count))
    member = torch.nn.functional.one_hot(found.labels.clamp(min=0), 2).double() * real
    centers = member.mT @ points / found.sizes.clamp(min=1)[..., None]
    empty = (found.sizes == 0)[..., None]
    centers = torch.where(empty, centers.flip(1), centers)
    return kmeans(points, count, 2, uniforms[:, :1], centers[:, None])
