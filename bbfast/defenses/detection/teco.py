"""TeCo: a triggered image withstands some corruptions far longer than others."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast._progress import Bar
from bbfast.defenses._content import content_keys
from bbfast.defenses._corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._frozen import Precision, frozen
from bbfast.defenses.features import normalised
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.device import Numerics

__all__ = ["TeCo", "flip_severities", "upper_limit"]

NEVER = len(SEVERITIES) + 1


@register_defense("teco")
class TeCo(Defense):
    """Corrupt an image in fifteen ways, each harder and harder, and see when the prediction turns.

    1. ``y0``: predicted class of the image.
    2. For each of 15 corruptions: ``s_c``, the first of 5 severities at which the prediction is not ``y0``; 6 if none.
       Each severity is applied to the image as it came.
    3. Score: population standard deviation of the 15 ``s_c``. A clean image is about equally robust to all; a triggered
       one keeps its prediction where the trigger survives and loses it where it does not.

    An image is flagged above the order statistic of the reserve that at most ``fpr`` of it exceed (``calibration=
    "none"`` asks for no clean image and flags nothing, as in the paper: the ranking is the result). Scores have few
    values, so ties are common; the threshold errs towards fewer flags.

    It asks the model for nothing but the predicted class. What is random in a corruption is a function of the image's
    pixels and the seed, so scores depend neither on the batch nor on what else is inspected. An image whose prediction
    has turned is not corrupted further in that way: what the 76 passes would give, with fewer.

    **What it cannot see.** A trigger that all corruptions spare or destroy alike; and where clean images are uneven too
    (strokes on black bear blur and no noise) the scores say little. Small images are corrupted harder than the tables'
    authors meant: the constants are those of 224 pixels.

    Source: Liu et al., CVPR 2023, arXiv 2303.18191, section 4. Not copied from the authors' code or BackdoorBench:
    there each severity, and each next corruption, is applied on top of all before; few clean images are judged against
    all triggered ones.
    """

    card = DefenseCard(
        title="TeCo",
        paper="Liu et al., Detecting Backdoors During the Inference Stage Based on Corruption Robustness Consistency, "
        "CVPR 2023",
        year=2023,
        arxiv="2303.18191",
        kinds=("inference",),
        needs=frozenset({"model", "reserve", "stream"}),
        summary="Compares how long a prediction withstands each of fifteen corruptions; triggers make it uneven.",
        deviations=(
            "Each severity is applied to the original image; both public codes corrupt cumulatively.",
            "A threshold from the clean reserve at a false positive rate of 5 %; the paper has none.",
            "Corruptions are computed on tensors: JPEG without the bit stream, ice that is made instead of "
            "photographed, random numbers from the image's pixels; pixels are rounded, not cut off.",
            "Glass swaps pixels; in the public code both get the same value.",
            "Motion beyond the border goes on with the edge; in the public code the image darkens.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of TeCo.

        Args:
            corruptions: Which corruptions, at least two.
            calibration: ``quantile`` of the reserve, or ``none``: no reserve, no flags.
            fpr: Part of clean images that may be flagged.
            batch_size: Images in a pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"calibration": "none"},
            "paper": {"calibration": "none"},
        }

        corruptions: tuple[Literal[CORRUPTIONS], ...] = Field(CORRUPTIONS, min_length=2)  # type: ignore[valid-type]
        calibration: Literal["quantile", "none"] = "quantile"
        fpr: float = Field(0.05, gt=0, lt=1)
        batch_size: int | None = Field(None, ge=1)
        precision: Precision = "auto"

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.calibration == "none":
            card = type(self).card
            self.card = dataclasses.replace(card, needs=card.needs - {"reserve"})  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        if self.config.calibration != "none" and not len(view.reserve):
            raise DataRequirementError(
                "teco calibrates on clean images, the reserve has none; calibration='none' ranks without a threshold"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        clock = time.perf_counter()
        limit, calibration = None, {"rule": cfg.calibration, "samples": 0}
        forwards = 0
        if cfg.calibration != "none":
            clean, forwards = self._scores(view, view.reserve.images)
            limit = upper_limit(clean, cfg.fpr)
            calibration |= {"samples": len(clean), "fpr": cfg.fpr, "scores": clean}
        calibrated = time.perf_counter()
        scores, more = self._scores(view, view.stream.images)
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=None if limit is None else scores > limit,
            threshold=limit,
            info={
                "calibration": calibration,
                "forwards": forwards + more,
                "seconds": {"calibrate": calibrated - clock, "score": time.perf_counter() - calibrated},
            },
        )

    def _scores(self, view: DefenderView, images: Tensor) -> tuple[Tensor, int]:
        cfg = self.config
        with frozen(view, cfg.precision, len(images) * len(cfg.corruptions)) as (model, numerics, shown):
            severities, forwards = flip_severities(
                model,
                images,
                cfg.corruptions,
                mean=view.mean,
                std=view.std,
                seed=view.derive_seed("teco"),
                batch_size=cfg.batch_size or (8192 if view.device.type == "cuda" else 512),
                numerics=numerics,
                progress=shown,
            )
        away = severities.double() - severities.double().mean(dim=1, keepdim=True)
        return away.square().mean(dim=1).sqrt().float().cpu(), forwards


@torch.no_grad()
def flip_severities(
    model: nn.Module,
    images: Tensor,
    corruptions: tuple[str, ...],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    batch_size: int,
    numerics: Numerics,
    progress: Bar | None = None,
) -> tuple[Tensor, int]:
    """First severity of each corruption at which the predicted class is another than that of the image.

    Args:
        model: Normalised images to logits; in eval mode.
        images: uint8 ``[N, C, H, W]``.
        corruptions: Names, of :data:`bbfast.defenses._corruptions.CORRUPTIONS`.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        seed: Seed of the corruptions.
        batch_size: Images in a pass.
        numerics: Number format and layout of the network.
        progress: Told of every image and corruption done.

    Returns:
        int64 ``[N, number of corruptions]``, 1..6 with 6 for never, and how many images went through the model.

    Raises:
        UnsupportedModelError: if a logit is NaN, whose class would look steady.
    """

    def predicted(batch: Tensor) -> Tensor:
        with numerics.autocast(batch.device):
            logits = model(normalised(batch, 0, len(batch), mean, std, numerics.channels_last))
        if bool(logits.isnan().any()):
            raise UnsupportedModelError(
                "teco", type(model).__name__, "its predictions are NaN", "its training diverged"
            )
        return logits.argmax(dim=1)

    found = torch.full((len(images), len(corruptions)), NEVER, device=images.device)
    forwards = 0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        keys, before = content_keys(batch), predicted(batch)
        forwards += len(batch)
        for column, name in enumerate(corruptions):
            steady = torch.arange(len(batch), device=images.device)
            for severity in SEVERITIES:
                after = predicted(corrupt(batch[steady], keys[steady], name, severity, seed))
                forwards += len(steady)
                turned = after != before[steady]
                found[start + steady[turned], column] = severity
                steady = steady[~turned]
                if not len(steady):
                    break
            if progress is not None:
                progress.advance(len(batch))
    return found, forwards


def upper_limit(scores: Tensor, fpr: float) -> float:
    """The ``floor(fpr n)``-th highest of ``n`` scores, counted from 0: at most ``fpr n`` of them lie above it."""
    return float(scores.sort(descending=True).values[int(fpr * len(scores))])
