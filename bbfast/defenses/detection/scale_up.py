"""SCALE-UP: the prediction of a triggered image survives making it several times brighter."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.features import normalised
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.device import choose_numerics, placed
from bbfast.training.runtime import keep_freed_memory

__all__ = ["ScaleUp", "amplified", "consistency", "standardised"]


@register_defense("scale_up")
class ScaleUp(Defense):
    """Multiply an image's pixels; if the prediction stays, something other than the object decides it.

    ``SPC(x) = 1/|S| sum_n [argmax f(clip(n x, 0, 1)) == argmax f(x)]`` over the factors ``S = 3, 5, 7, 9, 11``, in the
    space of pixels, before normalisation. ``data_free``: the score is SPC itself. ``data_limited`` (default): SPC in
    standard deviations from its mean over those images of the reserve that are predicted as the same class; a class
    that no reserve image is predicted as is measured by the whole reserve's mean and deviation. A sample is flagged if
    its score is at least ``threshold``, 0.5 in both.

    It asks the model for nothing but the predicted class. SPC has ``|S| + 1`` values, so scores tie.

    What it cannot see: triggers that do not survive saturation (faint or in dark pixels), and any trigger where clean
    predictions survive it as well: images of two tones, such as strokes on a black ground, which brightening hardly
    changes. At a fixed threshold of half a standard deviation the rate of false alarms is not under control; compare
    detectors by AUROC.

    Source: Guo et al., ICLR 2023, arXiv 2302.03251, eq. 1 to 3 (BackdoorBox and backdoor-toolbox have implementations).
    Not copied from those: one mean and deviation for all classes (``per_class=False``), calibration against labels
    where inspection compares with predictions, a threshold that is never stored, and factors applied to normalised
    images.
    """

    card = DefenseCard(
        title="SCALE-UP",
        paper="Guo et al., SCALE-UP: An Efficient Black-box Input-level Backdoor Detection, ICLR 2023",
        year=2023,
        arxiv="2302.03251",
        kinds=("inference",),
        needs=frozenset({"model", "reserve", "stream"}),
        summary="Multiplies the pixels of an image; predictions that survive it give a trigger away.",
        deviations=(
            "The deviation of a class has a floor of 0.1, below which five yes-or-no answers cannot be told apart.",
            "A class that no reserve image is predicted as uses the mean and deviation of the whole reserve.",
            "Calibration compares predictions with predictions, as inspection does; the references take labels.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of SCALE-UP.

        Args:
            mode: ``data_limited`` (standardised by the reserve) or ``data_free`` (no clean image needed).
            scales: Factors on the pixels, whole numbers above 1.
            threshold: Score from which a sample is flagged.
            per_class: Mean and deviation of SPC for each predicted class; False takes one pair for all.
            sd_floor: Smallest deviation that SPC is divided by.
            batch_size: Scaled images in a forward pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"per_class": False},
            "paper": {"mode": "data_free"},
        }

        mode: Literal["data_limited", "data_free"] = "data_limited"
        scales: tuple[int, ...] = (3, 5, 7, 9, 11)
        threshold: float = Field(0.5, allow_inf_nan=False)
        per_class: bool = True
        sd_floor: float = Field(0.1, gt=0, allow_inf_nan=False)
        batch_size: int | None = Field(None, ge=1)
        precision: Literal["auto", "fp32", "bf16"] = "auto"

        @field_validator("scales")
        @classmethod
        def _brighter(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
            if not scales or min(scales) < 2 or len(set(scales)) < len(scales):
                raise ValueError(f"scales must be different whole numbers of 2 or more, at least one, got {scales}")
            return scales

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.mode == "data_free":
            card = type(self).card
            self.card = dataclasses.replace(card, needs=card.needs - {"reserve"})  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        if self.config.mode == "data_limited" and not len(view.reserve):
            raise DataRequirementError(
                "scale_up standardises by clean images, the reserve has none; mode='data_free' does without"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        clock = time.perf_counter()
        reserve = view.reserve.images if cfg.mode == "data_limited" else None
        calibration: dict[str, Any] = {"samples": 0}
        if reserve is not None:
            clean, clean_labels = self._consistency(view, reserve)
        calibrated = time.perf_counter()
        scores, labels = self._consistency(view, view.stream.images)
        if reserve is not None:
            scores, statistics = standardised(
                scores, labels, clean, clean_labels, view.num_classes, cfg.sd_floor, cfg.per_class
            )
            calibration = {"samples": len(reserve), "scores": clean.cpu(), **statistics}
        scores = scores.float().cpu()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores >= cfg.threshold,
            threshold=cfg.threshold,
            info={
                "calibration": {"rule": cfg.mode, **calibration},
                "forwards": (1 + len(cfg.scales)) * (len(view.stream) + calibration["samples"]),
                "seconds": {"calibrate": calibrated - clock, "score": time.perf_counter() - calibrated},
            },
        )

    def _consistency(self, view: DefenderView, images: Tensor) -> tuple[Tensor, Tensor]:
        cfg, model, device = self.config, view.model, view.device
        numerics = choose_numerics(cfg.precision, True, model, device)
        with placed(model, device, numerics.memory_format), keep_freed_memory(device):
            return consistency(
                model,
                images.to(device),
                cfg.scales,
                mean=view.mean,
                std=view.std,
                batch_size=cfg.batch_size or (8192 if device.type == "cuda" else 1024),
                dtype=numerics.dtype,
            )


def amplified(images: Tensor, scale: int) -> Tensor:
    """``min(255, scale * v)`` of uint8 pixels: ``clip(scale x, 0, 1)`` exactly, of any shape."""
    return images.clamp(max=255 // scale).mul_(scale).masked_fill_(images > 255 // scale, 255)


@torch.inference_mode()
def consistency(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[int],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 1024,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scaled prediction consistency of every image, and the class predicted for it unscaled.

    Args:
        model: Normalised images to logits; in eval mode.
        images: uint8 ``[N, C, H, W]``.
        scales: Factors.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        batch_size: Images in a forward pass, scaled ones counted; at least one image's go together.
        dtype: bfloat16 or float16 runs the network under autocast.

    Returns:
        SPC float64 ``[N]``, 0..1, and labels int64 ``[N]``.

    Raises:
        UnsupportedModelError: if a logit is NaN, whose class would look consistent.
    """
    device = images.device
    step = max(1, batch_size // (1 + len(scales)))
    shares, labels = [images.new_zeros(0, dtype=torch.float64)], [images.new_zeros(0, dtype=torch.int64)]
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for part in images.split(step) if len(images) else ():
        copies = torch.cat([part, *(amplified(part, scale) for scale in scales)])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(normalised(copies, 0, len(copies), mean, std, channels_last=True))
        broken |= logits.isnan().any()
        predicted = logits.argmax(1).view(1 + len(scales), len(part))
        shares.append((predicted[1:] == predicted[0]).double().mean(dim=0))
        labels.append(predicted[0])
    if bool(broken):
        raise UnsupportedModelError(
            "scale_up", type(model).__name__, "its predictions are NaN", "its training diverged"
        )
    return torch.cat(shares), torch.cat(labels)


def standardised(
    scores: Tensor,
    labels: Tensor,
    clean: Tensor,
    clean_labels: Tensor,
    num_classes: int,
    sd_floor: float = 0.1,
    per_class: bool = True,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores in deviations from the mean of the clean scores predicted as the same class.

    Args:
        scores: ``[N]``.
        labels: int64 ``[N]``, predicted classes.
        clean: ``[R]``, of clean images, R >= 1.
        clean_labels: int64 ``[R]``, classes predicted for them.
        num_classes: Number of classes K.
        sd_floor: Smallest deviation to divide by; deviations are those of the sample itself (divided by n).
        per_class: False takes the mean and deviation of all clean scores.

    Returns:
        float64 ``[N]``, and ``mean`` ``[K]``, ``sd`` ``[K]`` (floor applied) and ``pooled``, the classes given the
        figures of the whole reserve because no clean image is predicted as them.
    """
    clean, clean_labels = clean.double(), clean_labels if per_class else torch.zeros_like(clean_labels)
    counts = torch.bincount(clean_labels, minlength=num_classes).double()
    sums = clean.new_zeros(num_classes).index_add_(0, clean_labels, clean)
    mean = torch.where(counts > 0, sums / counts, clean.mean())
    squares = clean.new_zeros(num_classes).index_add_(0, clean_labels, (clean - mean[clean_labels]).square())
    sd = torch.where(counts > 0, (squares / counts).sqrt(), clean.std(correction=0)).clamp(min=sd_floor)
    if not per_class:
        mean, sd = mean[:1].expand(num_classes), sd[:1].expand(num_classes)
    pooled = (counts == 0).nonzero()[:, 0].tolist() if per_class else list(range(num_classes))
    found = (scores.double() - mean[labels]) / sd[labels]
    return found, {"mean": mean.tolist(), "sd": sd.tolist(), "pooled": pooled}
