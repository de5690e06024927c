"""Cognitive Distillation: a triggered image needs few pixels for its prediction."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bbfast.defenses._content import content_keys, mix64
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._frozen import Precision, demand_finite, frozen
from bbfast.defenses.detection._masks import distill
from bbfast.defenses.detection._stage import Stage, inspected_images, staged
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError

__all__ = ["CD", "mask_limit", "stratified_subset"]


@register_defense("cd")
class CD(Defense):
    """Distil from each image the pixels that its prediction needs; a trigger needs few.

    For each image a mask ``m = (tanh(w) + 1) / 2`` in ``[0, 1]^{1 x H x W}``, ``w`` starting at 1, is the outcome of
    100 steps of Adam (rate 0.1, betas 0.1 and 0.1) on
    ``mean_c |z(m x + (1 - m) d) - z(x)| + gamma sum|m| + beta TV(m)`` with one random colour ``d`` an image and step,
    and ``TV`` the squared differences of neighbours, summed, over ``H W``. The score is ``-sum|m|``. An image is
    flagged if its mask is smaller than the reserve's mean less ``threshold_sd`` standard deviations.

    Each image is optimised alone: only pixels get gradients, many images go through the network together, colours come
    from the image's pixels. Scores do not depend on batch or order beyond the network's rounding, which Adam with such
    betas (all but a sign descent) makes larger than elsewhere: ranks agree, last digits do not.

    **What it can see.** Triggers that lie in few pixels, or need few of those that they cover. About a sixth of clean
    images lie one standard deviation below the mean, so the FPR is about 0.15 by construction, of a clean model too;
    ``threshold_sd`` lowers it, AUROC says how good the ranking is. Simple images (a sign of two colours) need few
    pixels too. The pixels left out become one colour: a model that has never seen such a background (digits on black)
    needs the whole image to keep its logits, and the method then finds little (figures in the deviations page).

    **Cost.** About 300 forward passes an image, the most expensive detector. ``subset`` scores a sample of the images,
    stratified by label; the others have NaN and no flag.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908, section 3 and the authors' code. Not copied from BackdoorBench:
    a threshold from samples known to be clean by the poison labels, flags for masks *above* it, rates read off the ROC
    beside counts from another rule.
    """

    card = DefenseCard(
        title="Cognitive Distillation",
        paper="Huang et al., Distilling Cognitive Backdoor Patterns within an Image, ICLR 2023",
        year=2023,
        arxiv="2301.10908",
        kinds=("detection", "inference"),
        needs=frozenset({"model", "reserve", "poisoned_train", "stream"}),
        summary="Distils the pixels that a prediction needs; images that need few are suspicious.",
        deviations=(
            "The threshold comes from the clean reserve; BackdoorBench takes it from samples that the poison labels "
            "call clean, and flags large masks.",
            "Weight of the total variation 10, as in BackdoorBench; the authors' code has 1 (preset='official').",
            "The losses of a batch are summed; their mean scales gradients, which Adam undoes up to its epsilon.",
            "Random colours come from the image's pixels, so that scores do not depend on the order of images.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of Cognitive Distillation.

        Args:
            stage: ``train`` inspects the training set, ``inference`` the stream of incoming images.
            gamma: Weight of the mask's L1 norm.
            beta: Weight of its total variation.
            lr: Adam's learning rate.
            steps: Steps of the optimisation.
            threshold_sd: Standard deviations below the clean mean at which a mask is small.
            subset: Number of images to score, drawn by label in proportion; None is all.
            batch_size: Images in a forward pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {}, "official": {"beta": 1.0}}

        stage: Stage = "train"
        gamma: float = Field(0.01, ge=0)
        beta: float = Field(10.0, ge=0)
        lr: float = Field(0.1, gt=0)
        steps: int = Field(100, ge=1)
        threshold_sd: float = Field(1.0, ge=0)
        subset: int | None = Field(None, ge=1)
        batch_size: int | None = Field(None, ge=1)
        precision: Precision = "auto"

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        self.card = staged(type(self).card, self.config.stage)  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        if len(view.reserve) < 2:
            raise DataRequirementError(f"cd calibrates on at least 2 clean images, the reserve has {len(view.reserve)}")

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        images, reserve = inspected_images(view, cfg.stage), view.reserve.images
        labels = view.poisoned_train.labels if cfg.stage == "train" else None
        chosen = stratified_subset(images, labels, cfg.subset, view.derive_seed("cd subset"))
        clock = time.perf_counter()
        clean = self._norms(view, reserve)
        demand_finite(view, clean, "clean images")
        limit = mask_limit(clean, cfg.threshold_sd)
        calibrated = time.perf_counter()
        norms = self._norms(view, images[chosen])
        demand_finite(view, norms, "inspected images")
        scores = torch.full((len(images),), torch.nan)
        scores[chosen.cpu()] = -norms.cpu()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > -limit,
            threshold=-limit,
            info={
                "calibration": {
                    "samples": len(reserve),
                    "threshold_sd": cfg.threshold_sd,
                    "scores": (-clean).cpu(),
                },
                "unscored": len(images) - len(chosen),
                "forwards": 3 * cfg.steps * (len(reserve) + len(chosen)),
                "seconds": {
                    "features": 0.0,
                    "calibrate": calibrated - clock,
                    "score": time.perf_counter() - calibrated,
                },
            },
        )

    def _norms(self, view: DefenderView, images: Tensor) -> Tensor:
        cfg = self.config
        with frozen(view, cfg.precision, len(images)) as (model, numerics, shown):
            return distill(
                model,
                images,
                mean=view.mean,
                std=view.std,
                gamma=cfg.gamma,
                beta=cfg.beta,
                lr=cfg.lr,
                steps=cfg.steps,
                seed=view.derive_seed("cd"),
                batch_size=cfg.batch_size or (1024 if view.device.type == "cuda" else 128),
                numerics=numerics,
                progress=shown,
            )


def mask_limit(norms: Tensor, threshold_sd: float) -> float:
    """Norm below which a mask is suspiciously small: mean less ``threshold_sd`` standard deviations of clean masks.

    Args:
        norms: float ``[n]``, finite, n >= 2.
        threshold_sd: Standard deviations, 0 or more.
    """
    values = norms.double().cpu()
    return float(values.mean() - threshold_sd * values.std())


def stratified_subset(images: Tensor, labels: Tensor | None, size: int | None, seed: int) -> Tensor:
    """Positions of ``size`` images, int64, rising: of every label in proportion, chosen by the images' pixels.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``; None if there are none: a plain draw.
        size: Images to choose; None or more than there are is all.
        seed: Seed of the draw.
    """
    n, device = images.shape[0], images.device
    if size is None or size >= n:
        return torch.arange(n, device=device)
    order = mix64(content_keys(images) ^ mix64(torch.tensor(seed, device=device))).argsort(stable=True)
    groups = torch.zeros(n, dtype=torch.int64, device=device) if labels is None else labels[order]
    counts = torch.bincount(groups)
    by_group = groups.argsort(stable=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty(n, dtype=torch.float64, device=device)
    # A group's i-th image stands at (i + 1/2) / n_k of the way: the first `size` places hold each group in proportion.
    place[by_group] = (torch.arange(n, device=device) - first + 0.5).double() / counts.repeat_interleave(counts)
    return order[place.argsort(stable=True)[:size]].sort().values
