"""SentiNet: the region that decides a triggered image's class decides that of any image it is pasted onto."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._gradcam import grad_cam, map_positions, salient
from bbfast.defenses.detection._overlays import draw_overlays
from bbfast.defenses.features import normalised
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.models import roles
from bbfast.training.device import Numerics, choose_numerics, placed
from bbfast.training.runtime import keep_freed_memory

__all__ = ["Boundary", "SentiNet", "masked_paste"]


@register_defense("sentinet")
class SentiNet(Defense):
    """Paste the region that Grad-CAM finds onto clean images, and noise of the same shape for comparison.

    For an image ``x`` predicted as ``c``, with the mask of its salient pixels and ``N`` images ``r`` of the reserve:
    ``fooled`` is the part of the ``r`` with ``x``'s region pasted in that are predicted as ``c``; ``avgconf`` the mean
    of the largest probability over the ``r`` with uniform noise in that region. On the reserve itself (an image is
    never pasted onto itself) the highest ``fooled`` in each 0.02 of ``avgconf`` are joined by a parabola. The score is
    the distance above it, ``(fooled - q(avgconf)) / sqrt(1 + q'(avgconf)^2)``; at most ``fpr`` of the reserve lie above
    the threshold (``calibration="mean_below"``, the paper: the mean distance of the clean points below the curve).

    Overlays are drawn by a hash of the image's pixels, and each overlay has its own noise: scores depend neither on the
    batch nor on what else is inspected. Cost: ``2 N`` forward passes a sample.

    What it cannot see: triggers that are not confined to a region (blended, WaNet, SIG), or whose region Grad-CAM
    misses: at the last convolution of small networks it may point elsewhere (small_cnn on digits covers none of a
    corner patch there, 96 % of it at ``layer="layer3"``). Networks whose last map has one position (ResNet18 and
    ConvNeXt at 32 pixels) are refused; give an earlier ``layer``.

    Source: Chou, Tramer, Pellegrino, IEEE S&P Workshops 2020, arXiv 1812.00292. ``decision="confidence"`` is
    BackdoorBench's: ``avgconf`` of ``x``'s region on a background of noise, against 0.9. Not copied: a normaliser that
    changes three columns of the image instead of its three channels, no overlays for CIFAR-100 and Tiny ImageNet, a
    reserve from the images of the evaluation, and (backdoor-toolbox) the true place of the trigger instead of
    Grad-CAM's.
    """

    card = DefenseCard(
        title="SentiNet",
        paper="Chou et al., SentiNet: Detecting Localized Universal Attacks, IEEE S&P Workshops 2020",
        year=2020,
        arxiv="1812.00292",
        kinds=("inference",),
        needs=frozenset({"model", "reserve", "stream"}),
        summary="Pastes an image's decisive region onto clean images; one that takes their class along is a trigger.",
        deviations=(
            "The mask is Grad-CAM's for the predicted class alone; the paper subtracts those of other classes.",
            "The distance to the curve is vertical, divided by sqrt(1 + slope^2), not found by minimisation.",
            "Beyond the clean range of avgconf the curve stays at its end, where a parabola would run off.",
            "The threshold is an order statistic of the clean distances, at most 5 % above.",
            "At most n - 1 overlays from a reserve of n images.",
            "In a transformer Grad-CAM reads the input of the last block; at its output patches have no gradient.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of SentiNet.

        Args:
            overlays: Clean images that a region is pasted onto, ``N``.
            mask: ``top`` (the ``mask_level`` part of the pixels) or ``threshold`` (Grad-CAM of at least that).
            mask_level: See ``mask``.
            layer: Dotted name of the module that Grad-CAM reads; None is the last convolution, in a transformer the
                last block; on images so small that its map has one position the last stage that has more.
            inert: ``region`` (noise in the region of the clean image) or ``background`` (noise around ``x``'s region).
            decision: ``boundary`` (the distance above the clean curve) or ``confidence`` (``avgconf`` itself).
            calibration: Threshold of ``boundary``: ``quantile`` or ``mean_below``.
            fpr: Part of clean samples that may be flagged, for ``quantile``.
            confidence: Threshold of ``decision="confidence"``.
            batch_size: Pasted images in a forward pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``; Grad-CAM is always computed in float32.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {
            "bbfast": {},
            "reference": {
                "mask": "threshold",
                "mask_level": 0.85,
                "inert": "background",
                "decision": "confidence",
            },
            "paper": {"calibration": "mean_below"},
        }

        overlays: int = Field(100, ge=1)
        mask: Literal["top", "threshold"] = "top"
        mask_level: float = Field(0.15, gt=0, lt=1)
        layer: str | None = None
        inert: Literal["region", "background"] = "region"
        decision: Literal["boundary", "confidence"] = "boundary"
        calibration: Literal["quantile", "mean_below"] = "quantile"
        fpr: float = Field(0.05, gt=0, lt=1)
        confidence: float = Field(0.9, ge=0, lt=1)
        batch_size: int | None = Field(None, ge=1)
        precision: Literal["auto", "fp32", "bf16"] = "auto"

    def check(self, view: DefenderView) -> None:
        self._layer(view)
        if len(view.reserve) < 2:
            raise DataRequirementError(
                f"sentinet pastes onto clean images, at least 2, the reserve has {len(view.reserve)}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, model, device = self.config, view.model, view.device
        self.check(view)
        reserve = view.reserve.to(device)
        count, seed = min(cfg.overlays, len(reserve) - 1), view.derive_seed("sentinet")
        noise = torch.randint(
            0, 256, reserve.images.shape, dtype=torch.uint8, generator=view.generator("sentinet/noise")
        ).to(device)
        keys, own = content_keys(reserve.images), torch.arange(len(reserve), device=device)
        numerics = choose_numerics(cfg.precision, True, model, device)
        clock = time.perf_counter()
        with placed(model, device, numerics.memory_format), keep_freed_memory(device):
            draws = draw_overlays(keys, reserve.labels, count, seed, exclude=own)
            clean = self._points(view, reserve.images, reserve.images, noise, draws, numerics)
            if not bool(clean.isfinite().all()):
                reason, hint = "its predictions on clean images are NaN", "its training diverged"
                raise UnsupportedModelError("sentinet", type(model).__name__, reason, hint)
            calibrated = time.perf_counter()
            images = view.stream.images.to(device)
            draws = draw_overlays(content_keys(images), reserve.labels, count, seed)
            points = self._points(view, images, reserve.images, noise, draws, numerics)
        if cfg.decision == "confidence":
            scores, limit, curve = points[:, 0], cfg.confidence, None
        else:
            boundary = Boundary(clean)
            scores, curve = boundary.distance(points), boundary.coefficients
            limit = boundary.threshold(clean, cfg.calibration, cfg.fpr)
        scores = scores.float()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > limit,
            threshold=limit,
            info={
                "overlays": count,
                "forwards": 2 * count * (len(reserve) + len(images)),
                "calibration": {
                    "samples": len(reserve),
                    "rule": cfg.calibration if cfg.decision == "boundary" else cfg.decision,
                    "points": clean,
                    "curve": curve,
                },
                "seconds": {"calibrate": calibrated - clock, "score": time.perf_counter() - calibrated},
            },
        )

    def _layer(self, view: DefenderView) -> nn.Module:
        """The layer asked for, or the last that has a map of more than one position on these images."""
        model, name = view.model, self.config.layer
        if name is not None:
            if not name or name not in dict(model.named_modules()):
                raise UnsupportedModelError("sentinet", type(model).__name__, f"it has no layer {name!r}")
            choices = [model.get_submodule(name)]
        else:
            known = roles(model)
            wanted = ("last_conv", "stage4", "stage3", "stage2", "stage1")
            choices = [known.module(role) for role in wanted if role == "last_conv" or known.has(role)]
        for layer in choices:
            if map_positions(model, layer, view.image_size) > 1:
                return layer
        size = "x".join(map(str, view.image_size[1:]))
        which = "none of its stages" if name is None else f"layer {name!r} does not"
        reason = f"{which} {'gives' if name is None else 'give'} a map of more than one position for images of {size}"
        raise UnsupportedModelError("sentinet", type(model).__name__, reason)

    def _points(
        self, view: DefenderView, images: Tensor, bank: Tensor, noise: Tensor, draws: Tensor, numerics: Numerics
    ) -> Tensor:
        """``(avgconf, fooled)`` of every image, float64 ``[N, 2]`` on the CPU."""
        cfg, model = self.config, view.model
        layer, device = self._layer(view), images.device
        step = max(1, (cfg.batch_size or (8192 if device.type == "cuda" else 1024)) // draws.shape[1])
        found = [torch.zeros(0, 2, dtype=torch.float64)]
        for start in range(0, len(images), step):
            x, drawn = images[start : start + step], draws[start : start + step]
            cam, labels = grad_cam(model, layer, normalised(x, 0, len(x), view.mean, view.std, True))
            mask, below, above = salient(cam, cfg.mask, cfg.mask_level), bank[drawn], noise[drawn]
            other = (above, below) if cfg.inert == "region" else (x[:, None].expand_as(below), above)
            results = []
            for top, ground in ((x[:, None].expand_as(below), below), other):
                pasted = masked_paste(top, ground, mask[:, None]).flatten(0, 1)
                with torch.inference_mode(), numerics.autocast(device):
                    logits = model(normalised(pasted, 0, len(pasted), view.mean, view.std, True)).float()
                results.append(logits.softmax(1).double().view(*drawn.shape, -1))
            fooled = (results[0].argmax(2) == labels[:, None]).double().mean(dim=1)
            # A NaN has a largest position, so it would look like a class.
            fooled = fooled.masked_fill(results[0].isnan().flatten(1).any(dim=1), torch.nan)
            found.append(torch.stack((results[1].amax(2).mean(dim=1), fooled), 1).cpu())
        return torch.cat(found)


def masked_paste(top: Tensor, ground: Tensor, mask: Tensor) -> Tensor:
    """``top`` where ``mask`` is set and ``ground`` elsewhere; images ``[..., C, H, W]``, mask bool ``[..., H, W]``."""
    return torch.where(mask.unsqueeze(-3), top, ground)


class Boundary:
    """The curve over the clean points ``(avgconf, fooled)``, float64 ``[n, 2]``, n >= 1: a parabola by least squares
    through the point with the highest ``fooled`` of each 0.02 of ``avgconf``; a line or a constant through fewer than
    three of them."""

    def __init__(self, clean: Tensor) -> None:
        # By bin, then from the highest down; of equal ones the least confident.
        bins = (clean[:, 0] / 0.02).floor()
        rows = sorted(zip(bins.tolist(), (-clean[:, 1]).tolist(), clean[:, 0].tolist(), strict=True))
        first = {b: (conf, -fooled) for b, fooled, conf in reversed(rows)}
        points = torch.tensor(list(first.values()), dtype=torch.float64)
        self.low, self.high = float(clean[:, 0].min()), float(clean[:, 0].max())
        powers = torch.arange(min(3, len(points)), dtype=torch.float64)
        design = points[:, :1] ** powers
        solution = torch.linalg.lstsq(design, points[:, 1:], driver="gelsd").solution[:, 0]
        self.coefficients: list[float] = torch.nn.functional.pad(solution, (0, 3 - len(solution))).tolist()

    def distance(self, points: Tensor) -> Tensor:
        """Distance above the curve, negative below, float64 ``[N]``."""
        a, b, c = self.coefficients
        conf = points[:, 0].clamp(self.low, self.high)
        return (points[:, 1] - (a + b * conf + c * conf.square())) / (1 + (b + 2 * c * conf).square()).sqrt()

    def threshold(self, clean: Tensor, rule: str, fpr: float) -> float:
        """Distance above which a sample is flagged: of the clean ones at most ``fpr`` (``quantile``), or the mean
        distance of those below the curve (``mean_below``)."""
        distances = self.distance(clean).float().double()
        if rule == "quantile":
            return float(distances.sort(descending=True).values[int(fpr * len(distances))])
        below = distances[distances < -1e-6]  # a point on the curve is not below it by rounding
        return float(-below.mean()) if len(below) else 0.0
