"""MM-BD: the class that a backdoor leads to can be had with a larger margin than the others."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._frozen import Precision, demand_finite, frozen
from bbfast.defenses.detection._margins import largest_margins, margin_p_value
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError
from bbfast.metrics import anomaly_index

__all__ = ["MMBD"]

_CAP = 50.0


@register_defense("mm_bd")
class MMBD(Defense):
    """Maximise each class's margin over all images; a class with an outlying maximum is a backdoor's target.

    1. For each class ``t``, 30 images of uniform noise; gradient ascent on ``z_t - max over the others of z`` in pixel
       space, clamped to 0..1 within the forward pass, until the sum of the 30 margins settles or 300 steps are done.
    2. ``r_t``: the largest of the 30.
    3. A gamma distribution fitted to the ``r_t`` without the largest; ``p = 1 - F(largest) ** K``. Backdoored if
       ``p < 0.05``; the target is the class of the largest. ``info["statistic"]`` is ``-ln p``, at most 50.

    The verdict's ``anomaly`` has the robust index of every ``r_t`` above the median, a second opinion: ten classes
    leave nine values to fit three parameters to, and ``p`` is then rough.

    **What it can see.** One target class, whatever the trigger; no data are needed. **What it cannot:** several targets
    or all-to-all (nothing is outlying), and models whose clean margins already spread as widely as a backdoor's. With
    fewer than four classes there is nothing to fit: ``backdoored`` is then None.

    Source: Wang et al., MM-BD, IEEE S&P 2024, arXiv 2205.06900, and the authors' code, which makes a new optimiser in
    each step: its momentum never acts, and plain gradient descent is the faithful form.
    """

    card = DefenseCard(
        title="MM-BD",
        paper="Wang et al., MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types "
        "Using a Maximum Margin Statistic, IEEE S&P 2024",
        year=2024,
        arxiv="2205.06900",
        kinds=("model",),
        needs=frozenset({"model"}),
        summary="Maximises the margin of every class from noise; an outlying one gives a backdoor's target away.",
        deviations=(
            "Plain gradient ascent: the authors' code names a momentum of 0.2 that never acts (momentum_active=True).",
            "The model's normalisation is applied inside; the authors' models have none.",
            "With fewer than 8 classes, or where it fails, the gamma fit has its origin at 0.",
            "All classes are optimised in one batch; per class the steps are the same.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of MM-BD.

        Args:
            restarts: Images of noise a class.
            steps: Steps at most.
            lr: Learning rate.
            momentum_active: Whether the momentum of 0.2 acts.
            tolerance: Relative change of a class's margins that ends its ascent.
            significance: A smaller ``p`` is a backdoor.
            batch_size: Images in a pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "paper": {}}

        restarts: int = Field(30, ge=1)
        steps: int = Field(300, ge=1)
        lr: float = Field(0.01, gt=0)
        momentum_active: bool = False
        tolerance: float = Field(1e-5, ge=0)
        significance: float = Field(0.05, gt=0, lt=1)
        batch_size: int | None = Field(None, ge=1)
        # A step changes the margins by less than bfloat16 can tell: classes would stop at once.
        precision: Precision = "fp32"

    def check(self, view: DefenderView) -> None:
        if view.num_classes < 2:
            raise DataRequirementError(
                f"mm_bd compares the margins of classes and needs at least 2, the model has {view.num_classes}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, device = self.config, view.device
        self.check(view)
        clock = time.perf_counter()
        with frozen(view, cfg.precision, cfg.steps) as (model, numerics, shown):
            final, first, taken = largest_margins(
                model,
                self._noise(view).to(device),
                mean=view.mean,
                std=view.std,
                lr=cfg.lr,
                momentum=0.2 if cfg.momentum_active else 0.0,
                steps=cfg.steps,
                tolerance=cfg.tolerance,
                batch_size=cfg.batch_size or (4096 if device.type == "cuda" else 128),
                numerics=numerics,
                progress=shown,
            )
        demand_finite(view, final, "margins")
        ascended = time.perf_counter()
        largest = final.amax(dim=1).double().cpu()
        p, fit = margin_p_value(largest)
        anomaly = anomaly_index(largest, side="high")
        order = largest.argsort(descending=True, stable=True).tolist()
        backdoored = None if p is None else p < cfg.significance
        return DefenseResult(
            kind=self.card.kinds[0],
            verdict={
                "backdoored": backdoored,
                "targets": order[:1] if backdoored else [],
                "anomaly": dict(enumerate(anomaly.tolist())),
            },
            info={
                "p": p,
                "statistic": None if p is None else min(_CAP, -math.log(max(p, 1e-300))),
                "threshold": -math.log(cfg.significance),
                "class_stat": dict(enumerate(largest.tolist())),
                "fit": fit,
                "median_margin": {"start": float(first.median()), "end": float(final.median())},
                "steps": dict(enumerate(taken.tolist())),
                "calibration": {"rule": "gamma", "significance": cfg.significance, "classes": len(largest)},
                "seconds": {
                    "features": 0.0,
                    "calibrate": time.perf_counter() - ascended,
                    "score": ascended - clock,
                },
            },
        )

    def _noise(self, view: DefenderView) -> Tensor:
        """Uniform images ``[K, R, C, H, W]``; each class's own, however many classes there are."""
        shape = (self.config.restarts, *view.image_size)
        return torch.stack(
            [torch.rand(shape, generator=view.generator(f"mm_bd class {c}")) for c in range(view.num_classes)]
        )
