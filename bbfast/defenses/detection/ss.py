"""Spectral Signatures: poisoned samples stand out along the direction in which their class varies most."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast.defenses._retrain import demand_recipe, retrain
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._inspected import Inspected, demand_role, inspect
from bbfast.defenses.detection._reduce import principal_axes
from bbfast.defenses.features import FeatureReader, Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.metrics import anomaly_index

__all__ = ["SS", "budget", "spectral_scores"]

_ROLES = {"penultimate": "penultimate", "layer4_flat": "stage4"}


@register_defense("ss")
class SS(Defense):
    """Remove the samples of each class that lie farthest out along its top singular vector; train again.

    1. Penultimate features of the training set (eval mode, no augmentation), one shared pass.
    2. Per given label: mean, and ``v``, the leading eigenvector of the covariance.
    3. Score ``<f(x) - mean, v>^2``, divided by its median over the class, so that scores of different classes compare.
    4. Flag the ``ceil(1.5 * assumed_poison_fraction * n)`` highest of each class, ties by the pixels.
    5. ``retrain``: a fresh model trained on the rest with the recipe of the attacked one.

    **What it can see.** Poison that moves the class's features farther than anything else in the class does, as a
    minority. It cannot tell whether there is any: 15 % of *every* class are flagged by default, of a clean model too,
    so the FPR is about 0.15 by construction; AUROC says how good the ranking is. Where half of a class is poison (one
    target of ten classes, 10 % poisoned) both halves lie equally far from the mean and the score says nothing about
    which is which. ``classes="suspicious"`` (ours) flags only classes whose ratio of the two leading variances is an
    outlier among the classes: ``anomaly_index > anomaly_threshold``, upwards.

    Samples of classes with fewer than 3 samples are not scored: score NaN, flag False, the classes listed in
    ``info["unscored"]``. A class whose features do not vary has score 0 and no flags.

    Source: Tran et al., NeurIPS 2018, arXiv 1811.00636, algorithm 1. Not copied from BackdoorBench: projection of
    uncentred features (a large common mean inverts the ranking), augmentation while features are taken.
    """

    card = DefenseCard(
        title="Spectral Signatures",
        paper="Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018",
        year=2018,
        arxiv="1811.00636",
        kinds=("detection", "training"),
        needs=frozenset({"model", "poisoned_train", "fresh_model"}),
        summary="Drops the samples of each class that lie farthest out along its top singular vector, trains again.",
        deviations=(
            "Scores are divided by their median over the class; the order within a class is the paper's.",
            "Centred features are projected; BackdoorBench projects uncentred ones.",
            "The bound on the poison is assumed (10 % of a class, so 15 % are removed); the paper is given it.",
            "A budget of ceil(1.5 eps n) samples; percentile=85 is BackdoorBench's rule, the same up to one sample.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of Spectral Signatures.

        Args:
            assumed_poison_fraction: Assumed upper bound on the poisoned part of a class; 1.5 times it is flagged.
            percentile: Flag the scores above this percentile of the class instead (linear interpolation).
            target_labels: Flag in these classes only; None is all.
            classes: ``suspicious`` flags only in classes of outlying spectrum.
            anomaly_threshold: Robust standard deviations that make a spectrum outlying, for ``suspicious``.
            feature: ``layer4_flat`` is the fourth stage's whole output, as in BackdoorBench.
            retrain: Train a fresh model without the flagged samples; False gives scores and flags only.
        """

        detect_only: ClassVar[dict[str, Any]] = {"retrain": False}
        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {"percentile": 85.0}}

        assumed_poison_fraction: float = Field(0.10, gt=0, le=0.5)
        percentile: float | None = Field(None, ge=0, le=100)
        target_labels: tuple[int, ...] | None = None
        classes: Literal["all", "suspicious"] = "all"
        anomaly_threshold: float = Field(3.0, gt=0)
        feature: Literal["penultimate", "layer4_flat"] = "penultimate"
        retrain: bool = True

        @field_validator("target_labels")
        @classmethod
        def _labels(cls, labels: tuple[int, ...] | None) -> tuple[int, ...] | None:
            if labels is not None and (not labels or min(labels) < 0):
                raise ValueError("expected at least one class number, none negative")
            return labels

    def check(self, view: DefenderView) -> None:
        demand_role(view, _ROLES[self.config.feature])
        labels = self.config.target_labels
        if labels is not None and max(labels) >= view.num_classes:
            raise ValueError(f"ss: target_labels must lie in 0..{view.num_classes - 1}, got {list(labels)}")
        if self.config.retrain:
            demand_recipe(view, "ss", ", or retrain=False")

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        return [FeatureReader(_ROLES[self.config.feature])] if source == "poisoned_train" else ()

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, clock = self.config, time.perf_counter()
        data = inspect(view, _ROLES[cfg.feature])
        read = time.perf_counter()
        scores, ratio = spectral_scores(data)
        wanted, anomaly = self._wanted(ratio)
        flags = self._flags(scores, data, wanted)
        scored = time.perf_counter()
        seconds = {"features": read - clock, "score": scored - read}

        stored = data.stored(flags)
        model: nn.Module | None = None
        history: list[dict[str, Any]] = []
        if cfg.retrain:
            model, history = retrain(view, ~stored, "ss")
            seconds["retrain"] = time.perf_counter() - scored
        lowest = torch.full_like(ratio, torch.inf)
        lowest.scatter_reduce_(0, data.labels[flags], scores[flags], "amin")
        present = data.counts > 0
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model,
            scores=data.stored(scores).float(),
            flags=stored,
            threshold=lowest.float().cpu(),
            # It accuses every class unless told to choose, so it says nothing about any.
            verdict=_verdict(wanted, anomaly) if cfg.classes == "suspicious" else {},
            history=history,
            info={
                "seconds": seconds,
                "calibration": {"assumed_poison_fraction": cfg.assumed_poison_fraction, "percentile": cfg.percentile},
                "class_stat": {c: float(ratio[c]) for c in present.nonzero()[:, 0].tolist()},
                "unscored": (present & ratio.isnan()).nonzero()[:, 0].tolist(),
                "removed": int(stored.sum()),
            },
        )

    def _wanted(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Classes in which samples may be flagged, bool ``[K]``, and how outlying each one's spectrum is."""
        cfg = self.config
        wanted = ~ratio.isnan()
        anomaly = anomaly_index(ratio, side="high")
        if cfg.target_labels is not None:
            named = torch.zeros_like(wanted)
            named[list(cfg.target_labels)] = True
            wanted = wanted & named
        if cfg.classes == "suspicious":
            wanted = wanted & (anomaly > cfg.anomaly_threshold)
        return wanted, anomaly

    def _flags(self, scores: Tensor, data: Inspected, wanted: Tensor) -> Tensor:
        cfg = self.config
        flags = torch.zeros_like(scores, dtype=torch.bool)
        for c in wanted.nonzero()[:, 0].tolist():
            rows = data.members(c)
            mine = scores[rows]
            if not bool((mine > 0).any()):
                continue
            if cfg.percentile is not None:
                flags[rows] = mine > _percentile(mine, cfg.percentile)
            else:
                top = mine.argsort(descending=True, stable=True)[: budget(len(mine), cfg.assumed_poison_fraction)]
                flags[rows.start + top] = True
        return flags


def spectral_scores(data: Inspected) -> tuple[Tensor, Tensor]:
    """Squared projection on the class's leading eigenvector in units of its median, and how far that vector leads.

    Returns:
        Scores float64 ``[N]``, NaN in classes of fewer than 3 samples (two lie equally far from their mean), and the
        ratio of the two largest variances, float64 ``[K]``: infinite if there is but one, 1 if there is none, NaN for
        classes not scored.
    """
    num_classes = len(data.counts)
    mean, axes, variances = principal_axes(data.features, data.labels, num_classes, 2)
    scores = torch.full(data.labels.shape, torch.nan, dtype=torch.float64, device=data.features.device)
    ratio = torch.full((num_classes,), torch.nan, dtype=torch.float64, device=data.features.device)
    for c in (data.counts >= 3).nonzero()[:, 0].tolist():
        rows = data.members(c)
        x = data.features[rows].double() - mean[c]
        # Below this a variance is the rounding of float32 features.
        floor = (1e-6 * float(data.features[rows].abs().amax())) ** 2
        first, second = (float(v) if v > floor else 0.0 for v in torch.nn.functional.pad(variances[c], (0, 1))[:2])
        ratio[c] = first / second if second else (math.inf if first else 1.0)
        projected = (x @ axes[c, :, 0]).square() if first else torch.zeros_like(x[:, 0])
        middle = _percentile(projected, 50.0)
        # More than half of the class at its very mean: the mean of the squares, which is above 0, is the unit then.
        scores[rows] = projected / (middle if middle > 0 else projected.mean().clamp(min=1e-300))
    return scores, ratio


def budget(n: int, fraction: float) -> int:
    """``ceil(1.5 * fraction * n)``, at most ``n``, where rounding in the product does not count as a sample."""
    return min(n, math.ceil(round(1.5 * fraction * n, 9)))


def _percentile(values: Tensor, percent: float) -> Tensor:
    """As numpy's by linear interpolation; torch's refuses more than 2**24 values."""
    ranked = values.sort().values
    position = (len(values) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def _verdict(wanted: Tensor, anomaly: Tensor) -> dict[str, Any]:
    known = (~anomaly.isnan()).nonzero()[:, 0].tolist()
    targets = [c for c in anomaly.nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist() if wanted[c]]
    return {"backdoored": bool(targets), "targets": targets, "anomaly": {c: float(anomaly[c]) for c in known}}
