"""Beatrix: a triggered image puts feature channels together that images of its class never do."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._gram_bounds import ClassBounds, calibrate, deviations, kmmd, order_statistic
from bbfast.defenses.detection._stage import staged
from bbfast.defenses.features import Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.models import roles

__all__ = ["Beatrix", "class_anomaly", "last_stage_input"]

_log = logging.getLogger(__name__)

_ORDERS = range(1, 9)
_FOLDS = 5
_FEW = 20
_LEAST_LIMIT = 1e-6  # about one Gram entry of 32,896 that leaves its bounds by a quarter of them
_STATISTIC_SAMPLES = 500
_SOURCE = {"inference": "stream", "train": "poisoned_train"}


@register_defense("beatrix")
class Beatrix(Defense):
    """Compare Gram matrices of feature maps with those of clean images of the predicted class.

    1. Feature map ``F`` ``[C, S]`` at the input of the last stage; ``G_p = sign(A) |A|^(1/p)``, ``A = F^p (F^p)^T``,
       upper triangle, ``p = 1..8``.
    2. Clean reserve, by predicted class: bounds of each entry are median -+ 10 MAD. An image's deviation is the mean
       excess over the bounds of its predicted class, relative to these.
    3. Threshold of a class: 5 folds, each judged by bounds of the other four, ``int(quantile n)``-th lowest deviation.
       The score is the deviation divided by it; above 1 is suspicious.
    4. Class statistic ``J``: kernel mean discrepancy between the spatially averaged features of suspicious images
       predicted to be of the class and those of its other and reserve images, at most 500 each. ``J* = (J - median) /
       (1.4826 MAD)``, upwards; a class above ``anomaly_threshold`` is a target.
    5. ``flag_mode``: ``sample`` flags every suspicious image, ``class_then_sample`` those in target classes.

    ``stage="inference"`` inspects the stream, ``"train"`` the training set, and gives results of kind ``detection``.
    Inspected images pass once, in the order of their pixels: neither storage order nor what else is inspected changes a
    score beyond rounding. Their feature maps are not kept; the reserve's are, and two Gram matrices of 8 orders a class
    (2.1 MB for 256 channels).

    **What it can see.** Triggers that differ from image to image too. At ``sample`` 5 % of clean images are flagged by
    construction. It cannot see poison in a class whose clean reserve is itself odd, and ``J*`` finds no all-to-all
    attack. With fewer than 20 clean images of a class the threshold is their highest deviation (a warning is logged).

    Images predicted to be of a class with fewer than 5 reserve images are not scored: score NaN, flag False, these
    classes listed in ``info["unscored"]``. Where clean images hardly deviate, the threshold is at least 1e-6.

    Source: Ma et al., NDSS 2023, arXiv 2209.11715. Not copied from BackdoorBench: Gram matrices without the power
    before the product (``compat``), a reserve drawn with replacement from the images of the evaluation, all feature
    maps held.
    """

    card = DefenseCard(
        title="Beatrix",
        paper='Ma et al., The "Beatrix" Resurrections: Robust Backdoor Detection via Gram Matrices, NDSS 2023',
        year=2023,
        arxiv="2209.11715",
        kinds=("inference", "detection"),
        needs=frozenset({"model", "reserve", "stream", "poisoned_train"}),
        summary="Finds images whose feature channels go together as no clean image of the class has them.",
        reserve_per_class=30,
        deviations=(
            "Scores are divided by the class's threshold, so that those of different classes compare.",
            "No bound nearer to 0 than a thousandth of the order's mean median is divided by; the authors add 1e-6.",
            "Only classes above the median can be targets; the authors' index is two-sided.",
            "The scale is taken out of each channel instead of the layer, which changes no Gram matrix.",
            "The reserve's images count among those not suspicious; a stream may hold no others of a class.",
            "The index divides by at least 2, what one image may give; the authors add 1e-6 to the MAD.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of Beatrix.

        Args:
            stage: ``inference`` inspects the stream of incoming images, ``train`` the training set.
            reserve_per_class: Clean images a class.
            quantile: Part of clean images below the threshold; 0.99 is the authors' other choice.
            anomaly_threshold: ``J*`` of a target class.
            flag_mode: ``auto`` is ``sample`` at inference and ``class_then_sample`` for the training set.
            compat: BackdoorBench's Gram matrices, ``A = F F^T`` for every order, and denominators ``|bound + 1e-6|``.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"flag_mode": "sample", "reserve_per_class": 10},
            "paper": {"flag_mode": "class_then_sample"},
        }

        stage: Literal["inference", "train"] = "inference"
        reserve_per_class: int = Field(30, ge=_FOLDS)
        quantile: float = Field(0.95, gt=0, lt=1)
        anomaly_threshold: float = Field(math.exp(2), gt=0)
        flag_mode: Literal["auto", "sample", "class_then_sample"] = "auto"
        compat: bool = False

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.card = staged(type(self).card, self.config.stage)  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        last_stage_input(view)
        if len(view.reserve) < _FOLDS:
            raise DataRequirementError(
                f"beatrix calibrates on at least {_FOLDS} clean images of a class, the reserve has {len(view.reserve)}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        clock = time.perf_counter()
        clean = view.read("reserve", _Calibration(self, view))
        calibrated = time.perf_counter()

        source = _SOURCE[cfg.stage]
        scores, predicted, pooled = view.read(source, _Deviations(self, view, clean))
        order = content_keys(getattr(view, source).images).argsort(stable=True)
        suspicious = scores > 1
        statistic = torch.full((view.num_classes,), torch.nan, dtype=torch.float64)
        for c, known in clean.items():
            odd, rest = (pooled[(predicted == c) & part] for part in (suspicious, ~suspicious))
            rest = torch.cat([known.pooled, rest])
            statistic[c] = kmmd(rest[:_STATISTIC_SAMPLES], odd[:_STATISTIC_SAMPLES])
        anomaly = class_anomaly(statistic)
        guilty = anomaly > cfg.anomaly_threshold
        by_class = cfg.flag_mode == "class_then_sample" or (cfg.flag_mode == "auto" and cfg.stage == "train")
        flags = suspicious & guilty.to(predicted.device)[predicted] if by_class else suspicious
        scored = time.perf_counter()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=_stored(scores, order),
            flags=_stored(flags, order),
            # By predicted class, which is not always the given one.
            threshold=torch.where(guilty, 1.0, torch.inf).float() if by_class else 1.0,
            verdict={
                "backdoored": bool(guilty.any()),
                "targets": [c for c in anomaly.nan_to_num(nan=-1.0).argsort(descending=True).tolist() if guilty[c]],
                "anomaly": {c: float(anomaly[c]) for c in clean},
            },
            info={
                "seconds": {"calibrate": calibrated - clock, "score": scored - calibrated},
                "calibration": {
                    "quantile": cfg.quantile,
                    "samples": {c: len(known.pooled) for c, known in clean.items()},
                    "limits": {c: known.limit for c, known in clean.items()},
                },
                "class_stat": {c: float(statistic[c]) for c in clean},
                "layer": last_stage_input(view),
                "unscored": sorted(set(predicted.unique().tolist()) - set(clean)),
            },
        )

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        if source == "reserve":
            return [_Calibration(self, view)]
        if source == _SOURCE[self.config.stage]:
            return [_Deviations(self, view, view.read("reserve", _Calibration(self, view)))]
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Clean:
    """What is known of a class: its bounds, its least suspicious deviation, spatial means ``[n, C]`` of its reserve."""

    bounds: ClassBounds
    limit: float
    pooled: Tensor


class _MapReader(Reader):
    """Sees the feature maps ``[B, C, ...]`` and predicted classes ``[B]`` of each batch."""

    def __init__(self, method: Beatrix, view: DefenderView) -> None:
        self.config = method.config
        self.model, self.num_classes = type(view.model).__name__, view.num_classes
        self._role = last_stage_input(view)
        self._parts: list[tuple[Tensor, ...]] = []

    @property
    def roles(self) -> tuple[str, ...]:
        return (self._role,)

    @property
    def key(self) -> Hashable:
        return type(self)

    def begin(self, total: int, device: torch.device) -> None:
        self._parts = []

    def batch(self, index: Tensor, found: Mapping[str, Tensor], logits: Tensor) -> None:
        maps = _as_maps(found[self._role])
        broken = int((~(maps.flatten(1).isfinite().all(dim=1) & logits.isfinite().all(dim=1))).sum())
        if broken:
            reason = f"its features or logits are NaN or infinite on {broken} of {len(index)} images"
            raise UnsupportedModelError("beatrix", self.model, reason, "its training diverged")
        self._parts.append(self.take(maps, logits.argmax(dim=1)))

    @abstractmethod
    def take(self, maps: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        """What is kept of a batch."""

    def joined(self) -> list[Tensor]:
        """What was kept, in the order of the pass."""
        return [torch.cat(part) for part in zip(*self._parts, strict=True)]


class _Calibration(_MapReader):
    """The reserve's pass. Its outcome is what is known of each class."""

    def take(self, maps: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        # A copy: what passes at a layer may be overwritten by the next one.
        return maps.clone(), predicted

    def outcome(self) -> dict[int, _Clean]:
        cfg, (maps, predicted) = self.config, self.joined()
        clean = {}
        for c in range(self.num_classes):
            mine = maps[predicted == c][: cfg.reserve_per_class]
            if len(mine) < _FOLDS:
                continue
            bounds, own = calibrate(mine, _ORDERS, _FOLDS, cfg.compat)
            limit = max(order_statistic(own, cfg.quantile), _LEAST_LIMIT)
            clean[c] = _Clean(bounds, limit, _spatial_mean(mine))
        if not clean:
            reason = f"it predicts no class for {_FOLDS} or more of {len(maps)} clean images"
            raise UnsupportedModelError("beatrix", self.model, reason, "raise reserve_per_class")
        few = [c for c, known in clean.items() if len(known.pooled) < _FEW]
        if few:
            _log.warning("beatrix: classes %s have fewer than %d clean images to calibrate on", few, _FEW)
        return clean


class _Deviations(_MapReader):
    """The inspected set's pass. Its outcome: score, predicted class and spatial mean of each image."""

    def __init__(self, method: Beatrix, view: DefenderView, clean: Mapping[int, _Clean]) -> None:
        super().__init__(method, view)
        self._clean = clean

    def take(self, maps: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        scores = torch.full(predicted.shape, torch.nan, device=maps.device)
        for c in set(predicted.tolist()) & set(self._clean):
            mine, known = predicted == c, self._clean[c]
            scores[mine] = deviations(maps[mine], _ORDERS, known.bounds, self.config.compat) / known.limit
        return scores, predicted, _spatial_mean(maps)

    def outcome(self) -> list[Tensor]:
        return self.joined()


def class_anomaly(statistic: Tensor) -> Tensor:
    """``(J - median) / (1.4826 MAD)`` upwards, the divisor at least 2: float64 ``[K]``, NaN where ``J`` is NaN.

    2 is the kernel of an image with itself, so what a single odd image may give. Without it a class with one is
    infinitely anomalous where most classes have none.
    """
    middle = statistic.nanquantile(0.5)
    spread = 1.4826 * (statistic - middle).abs().nanquantile(0.5)
    return (statistic - middle).clamp(min=0) / spread.clamp(min=2.0)


def last_stage_input(view: DefenderView) -> str:
    """The role whose output goes into the last stage.

    Raises:
        UnsupportedModelError: if the model has fewer than two stages.
    """
    found = roles(view.model)
    stages = [f"stage{number}" for number in range(1, 6) if found.has(f"stage{number}")]
    if len(stages) < 2:
        reason = "it has no layer of role 'stage3' or the like, before its last stage"
        hint = "give its stages with bbfast.models.register(name, roles=...)"
        raise UnsupportedModelError("beatrix", found.label, reason, hint)
    return stages[-2]


def _as_maps(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as it is, tokens ``[N, T, C]`` as ``[N, C, T]``."""
    return x.float() if x.dim() == 4 else x.float().mT


def _spatial_mean(maps: Tensor) -> Tensor:
    return maps.flatten(2).mean(dim=2)


def _stored(values: Tensor, order: Tensor) -> Tensor:
    """``values`` in the order of the stored set and on the CPU."""
    back = torch.empty_like(values)
    back[order] = values
    return back.cpu()
