"""STRIP: the prediction of a triggered image does not care what is laid over it."""

from __future__ import annotations

import logging
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._overlays import draw_overlays, mean_entropy
from bbfast.defenses.detection._stage import staged
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.device import choose_numerics, placed
from bbfast.training.runtime import keep_freed_memory

__all__ = ["Strip", "entropy_threshold"]

_log = logging.getLogger(__name__)


@register_defense("strip")
class Strip(Defense):
    """Superimpose clean images on a sample; if the predictions stay certain, something in it decides them.

    ``H(x) = 1/M sum_j H(softmax(f(blend(x, r_j))))`` over ``M`` overlays from the clean reserve, in nats; the score is
    ``-H``. A sample is flagged if its ``H`` lies strictly below the ``frr`` quantile of ``H`` over the reserve itself,
    blended with the reserve, never with itself. With ``n`` reserve images the threshold is the ``floor(frr n)``-th
    lowest of their entropies, so at most ``frr n`` of them are flagged; ``normal_fit`` (the paper) takes the quantile
    of a normal distribution with their mean and standard deviation.

    Every sample has its own overlays, drawn without replacement, classes in turn, from a generator seeded by the
    image's pixels: scores depend neither on the batch nor on what else is inspected. A reserve of ``n`` images gives at
    most ``n - 1`` overlays (one is the calibrated image itself), for calibration and inspection alike;
    ``info["overlays"]`` has the number.

    Cost: ``M`` forward passes a sample, on a CPU too; ``overlays=32`` takes a third of the time.

    What it cannot see: triggers that lose their power under a superimposed image (WaNet, Input-aware, SSBA), and
    all-to-all attacks, whose predictions still depend on the image.

    Source: Gao et al., ACSAC 2019, arXiv 1902.06531; ``M = 100``, ``alpha = 1`` as there and in BackdoorBench. Not
    copied from the latter: entropy where a score of suspicion is meant (AUROC upside down), one draw a batch of 128,
    calibration images laid over themselves, a reserve drawn with replacement from the images of the evaluation, and by
    default the sum of two normalised images, which leaves the range of pixels (``blend="add_normalised"``).
    """

    card = DefenseCard(
        title="STRIP",
        paper="Gao et al., STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019",
        year=2019,
        arxiv="1902.06531",
        kinds=("inference", "detection"),
        needs=frozenset({"model", "reserve", "stream", "poisoned_train"}),
        summary="Lays clean images over a sample; predictions that stay certain give a trigger away.",
        deviations=(
            "Entropy in nats, not bits.",
            "False rejection rate 5 % by an order statistic of the reserve; the paper fits a normal distribution.",
            "Overlays are drawn for each sample, classes in turn; BackdoorBench draws one set for a batch of 128.",
            "Calibration never blends an image with itself.",
            "At most n - 1 overlays from a reserve of n images, so 99 instead of 100 for ten classes.",
            "All 100 overlays on CPUs too.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of STRIP.

        Args:
            stage: ``inference`` inspects the stream of incoming images, ``train`` the training set.
            overlays: Superimposed images a sample, ``M``.
            blend: ``add_clip`` (sum of pixels, saturated), ``add_normalised`` (sum of normalised images, not clipped)
                or ``convex`` (``alpha`` of the sample, the rest of the overlay).
            alpha: Weight of the overlay; for ``convex`` of the sample, below 1.
            frr: Part of clean samples that may be rejected.
            calibration: ``quantile`` (order statistic) or ``normal_fit``.
            batch_size: Superimposed images in a forward pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"blend": "add_normalised", "alpha": 1.0, "overlays": 100, "frr": 0.1},
            "paper": {"calibration": "normal_fit", "frr": 0.01},
        }

        stage: Literal["inference", "train"] = "inference"
        overlays: int = Field(100, ge=1)
        blend: Literal["add_clip", "add_normalised", "convex"] = "add_clip"
        alpha: float = Field(1.0, gt=0)
        frr: float = Field(0.05, gt=0, lt=1)
        calibration: Literal["quantile", "normal_fit"] = "quantile"
        batch_size: int | None = Field(None, ge=1)
        precision: Literal["auto", "fp32", "bf16"] = "auto"

        @model_validator(mode="after")
        def _mixes(self) -> Strip.Config:
            if self.blend == "convex" and self.alpha >= 1:
                raise ValueError(f"alpha must be below 1 for blend='convex' (0.5 is usual), got {self.alpha}")
            return self

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.card = staged(type(self).card, self.config.stage)  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        if len(view.reserve) < 2:
            raise DataRequirementError(
                f"strip calibrates on at least 2 clean images, the reserve has {len(view.reserve)}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, device = self.config, view.device
        self.check(view)
        images = (view.stream if cfg.stage == "inference" else view.poisoned_train).images
        reserve = view.reserve.to(device)
        size = len(reserve)
        count = min(cfg.overlays, size - 1)
        if count < cfg.overlays:
            _log.info("strip: %d overlays instead of %d, the reserve has %d images", count, cfg.overlays, size)
        seed = view.derive_seed("strip")
        clock = time.perf_counter()
        own = draw_overlays(
            content_keys(reserve.images), reserve.labels, count, seed, exclude=torch.arange(size, device=device)
        )
        calibration = self._entropy(view, reserve.images, reserve.images, own)
        if not bool(calibration.isfinite().all()):
            name = type(view.model).__name__
            raise UnsupportedModelError(
                "strip", name, "its predictions on clean images are NaN", "its training diverged"
            )
        limit = entropy_threshold(calibration, cfg.frr, cfg.calibration)
        calibrated = time.perf_counter()
        draws = draw_overlays(content_keys(images).to(device), reserve.labels, count, seed)
        scores = -self._entropy(view, images, reserve.images, draws).cpu()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > -limit,
            threshold=-limit,
            info={
                "overlays": count,
                "calibration": {
                    "samples": size,
                    "rule": cfg.calibration,
                    "frr": cfg.frr,
                    "scores": (-calibration).cpu(),
                },
                "forwards": count * (size + len(images)),
                "seconds": {"calibrate": calibrated - clock, "score": time.perf_counter() - calibrated},
            },
        )

    def _entropy(self, view: DefenderView, images: Tensor, overlays: Tensor, draws: Tensor) -> Tensor:
        cfg, model, device = self.config, view.model, view.device
        numerics = choose_numerics(cfg.precision, True, model, device)
        with placed(model, device, numerics.memory_format), keep_freed_memory(device):
            return mean_entropy(
                model,
                images,
                overlays,
                draws,
                blend=cfg.blend,
                alpha=cfg.alpha,
                mean=view.mean,
                std=view.std,
                batch_size=cfg.batch_size or (8192 if device.type == "cuda" else 1024),
                dtype=numerics.dtype,
            )


def entropy_threshold(entropies: Tensor, frr: float, rule: str = "quantile") -> float:
    """Entropy below which a sample is rejected.

    Args:
        entropies: float ``[n]`` of clean samples, n >= 1.
        frr: Part of clean samples that may be rejected, in ``(0, 1)``.
        rule: ``quantile``: the ``floor(frr n)``-th lowest entropy, counted from 0, so that no more than ``frr n`` of
            them lie below it. ``normal_fit``: the ``frr`` quantile of a normal distribution with their mean and
            standard deviation.

    Raises:
        ValueError: if there are no entropies or one is not finite.
    """
    n = entropies.numel()
    if n == 0 or not bool(entropies.isfinite().all()):
        raise ValueError(f"entropies must be at least one finite number, got {n} of which some may be NaN or infinite")
    values = entropies.double().cpu()
    if rule == "quantile":
        return float(values.sort().values[int(frr * n)])
    deviation = values.std() if n > 1 else torch.zeros(())
    return float(values.mean() + deviation * torch.special.ndtri(torch.tensor(frr, dtype=torch.float64)))
