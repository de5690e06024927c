"""FREAK: predictions of poisoned images hang on other frequencies than those of clean ones."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._frozen import Precision, demand_finite, frozen
from bbfast.defenses.detection._overlays import draw_overlays
from bbfast.defenses.detection._spectrum import conjugate_pairs, sensitive_frequencies
from bbfast.defenses.detection._stage import Stage, inspected_images, staged
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError

__all__ = ["Freak", "atypical_counts", "count_threshold", "typical_frequencies"]


@register_defense("freak")
class Freak(Defense):
    """Count the frequencies that a prediction is sensitive to and those of clean images are not. A reconstruction.

    1. ``S(x)[u, v]``: mean over channels of ``|dz / dX[u, v]|``, ``z`` the predicted class's logit, ``X`` the image's
       2-d Fourier transform; by the chain rule the modulus of the transform of the gradient with respect to pixels.
    2. ``T(x)``: the ``topk`` most sensitive frequencies.
    3. On ``hold_samples`` clean images count how often each frequency lies in ``T``; typical are those that reach
       ``alpha_mu`` times the mean count.
    4. Score: the number of frequencies in ``T(x)`` that are not typical. Flagged above the threshold, from the clean
       images that were not counted in 3: the order statistic that at most ``fpr`` of them exceed, or (``mean_plus``)
       their mean plus ``beta``.

    Conjugate frequencies are one: a real image's spectrum is symmetric, and half of it holds all.

    **What it can see.** Triggers to which the model responds at frequencies that its other classes leave alone. Scores
    are small whole numbers, so ties are common; the threshold errs towards fewer flags.

    **What it is not.** The paper's workshop version gives the idea, BackdoorBench the names of the settings and no
    code: steps 3 and 4 are our reading of those names (``info["reconstruction"]``).

    Source: Al Kader Hammoud et al., CVPR workshops 2023, arXiv 2303.13211; settings of BackdoorBench.
    """

    card = DefenseCard(
        title="FREAK",
        paper="Al Kader Hammoud et al., Don't FREAK Out: A Frequency-Inspired Approach to Detecting Backdoor Poisoned "
        "Samples in DNNs, CVPR workshops 2023",
        year=2023,
        arxiv="2303.13211",
        kinds=("detection", "inference"),
        needs=frozenset({"model", "reserve", "poisoned_train", "stream"}),
        summary="Counts the frequencies that a prediction hangs on and those of clean images do not.",
        deviations=(
            "A reconstruction: the reference gives settings without code, the paper the idea.",
            "Half of the frequency grid is taken by default, 512 at 32 pixels as in the reference; it has 100 on "
            "CIFAR-100 and 408 on Tiny ImageNet.",
            "The threshold is an order statistic of clean images at 5 %; the reference's settings suggest their mean "
            "plus 9 (calibration='mean_plus').",
            "The threshold comes from clean images that did not define the typical frequencies.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of FREAK.

        Args:
            stage: ``train`` inspects the training set, ``inference`` the stream of incoming images.
            topk: Most sensitive frequencies of an image; None is half of the grid.
            hold_samples: Clean images that define the typical frequencies, at most half of the reserve.
            alpha_mu: Part of the mean count that makes a frequency typical.
            calibration: ``quantile`` or ``mean_plus``.
            fpr: Part of clean images that may be flagged, for ``quantile``.
            beta: Frequencies above the clean mean, for ``mean_plus``.
            batch_size: Images in a pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {"topk": 512, "hold_samples": 32, "alpha_mu": 1.0, "calibration": "mean_plus", "beta": 9.0},
        }

        stage: Stage = "train"
        topk: int | None = Field(None, ge=1)
        hold_samples: int = Field(32, ge=1)
        alpha_mu: float = Field(1.0, ge=0)
        calibration: Literal["quantile", "mean_plus"] = "quantile"
        fpr: float = Field(0.05, gt=0, lt=1)
        beta: float = Field(9.0, ge=0)
        batch_size: int | None = Field(None, ge=1)
        precision: Precision = "fp32"

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.card = staged(type(self).card, self.config.stage)  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        _, height, width = view.image_size
        if self.config.topk is not None and self.config.topk > height * width:
            raise ConfigError(
                f"freak: topk must lie in 1..{height * width}, the frequencies of {height} x {width} pixels, got "
                f"{self.config.topk}"
            )
        if len(view.reserve) < 2:
            raise DataRequirementError(
                f"freak takes at least 2 clean images, one to define typical frequencies and one to calibrate; the "
                f"reserve has {len(view.reserve)}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        images, reserve = inspected_images(view, cfg.stage), view.reserve
        clock = time.perf_counter()
        clean = self._frequencies(view, reserve.images, "clean images")
        weights = conjugate_pairs(*reserve.images.shape[2:])[1].to(clean.device)
        held = self._held(view)
        typical = typical_frequencies(clean[held], weights, cfg.alpha_mu)
        calibration = atypical_counts(clean[~held], typical, weights)
        limit = count_threshold(calibration, cfg.calibration, cfg.fpr, cfg.beta)
        calibrated = time.perf_counter()
        members = self._frequencies(view, images, "inspected images")
        read = time.perf_counter()
        scores = atypical_counts(members, typical, weights).cpu()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > limit,
            threshold=limit,
            info={
                "reconstruction": True,
                "typical": int((typical * weights).sum()),
                "calibration": {
                    "samples": len(calibration),
                    "held": int(held.sum()),
                    "rule": cfg.calibration,
                    "fpr": cfg.fpr,
                    "beta": cfg.beta,
                    "scores": calibration.cpu(),
                },
                "seconds": {
                    "features": read - calibrated,
                    "calibrate": calibrated - clock,
                    "score": time.perf_counter() - read,
                },
            },
        )

    def _held(self, view: DefenderView) -> Tensor:
        """Which images define the typical frequencies, bool ``[n]``: classes in turn, chosen by their pixels."""
        reserve = view.reserve
        size = len(reserve)
        # Numbered by content: the draw takes positions, and the order of the reserve must have no part in it.
        order = content_keys(reserve.images).argsort(stable=True)
        seed = view.derive_seed("freak hold")
        key = torch.zeros(1, dtype=torch.int64, device=order.device)
        chosen = draw_overlays(key, reserve.labels[order], min(self.config.hold_samples, size // 2), seed)[0]
        held = torch.zeros(size, dtype=torch.bool, device=order.device)
        held[order[chosen]] = True
        return held

    def _frequencies(self, view: DefenderView, images: Tensor, what: str) -> Tensor:
        cfg = self.config
        height, width = images.shape[2:]
        with frozen(view, cfg.precision, len(images)) as (model, numerics, shown):
            members, finite = sensitive_frequencies(
                model,
                images,
                mean=view.mean,
                std=view.std,
                topk=cfg.topk or height * width // 2,
                batch_size=cfg.batch_size or (1024 if view.device.type == "cuda" else 128),
                numerics=numerics,
                progress=shown,
            )
        demand_finite(view, torch.where(finite, 0.0, torch.nan), what)
        return members


def typical_frequencies(members: Tensor, weights: Tensor, alpha_mu: float) -> Tensor:
    """Frequencies that are sensitive on clean images at least ``alpha_mu`` times as often as the mean of the grid.

    Args:
        members: bool ``[n, R]``.
        weights: int64 ``[R]``, frequencies of the whole grid that each stands for.
        alpha_mu: Part of the mean count.

    Returns:
        bool ``[R]``.
    """
    counts = members.sum(dim=0).double()
    return counts >= alpha_mu * float((counts * weights).sum() / weights.sum())


def atypical_counts(members: Tensor, typical: Tensor, weights: Tensor) -> Tensor:
    """How many frequencies of the whole grid are sensitive and not typical: float32 ``[N]``, whole numbers."""
    return (members & ~typical).float() @ weights.float()


def count_threshold(counts: Tensor, rule: str, fpr: float, beta: float) -> float:
    """Count above which an image is flagged.

    Args:
        counts: float ``[n]`` of clean images, n >= 1.
        rule: ``quantile``: the ``floor(fpr n)``-th highest, counted from 0, so that no more than ``fpr n`` of them lie
            above it. ``mean_plus``: their mean plus ``beta``.
        fpr: Part of clean images that may be flagged.
        beta: Frequencies above the mean.
    """
    values = counts.double().cpu()
    if rule == "mean_plus":
        return float(values.mean()) + beta
    return float(values.sort(descending=True).values[int(fpr * len(values))])
