"""IBD-PSC: the model stays sure of a triggered image's class while its normalisation layers are amplified."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, ClassVar, Literal

from pydantic import Field

from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._norm_scaling import affine_norms, first_count, model_name, scaling_consistency
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.training.device import choose_numerics, placed
from bbfast.training.runtime import keep_freed_memory

__all__ = ["IBDPSC"]

_log = logging.getLogger(__name__)


@register_defense("ibd_psc")
class IBDPSC(Defense):
    """Amplify the last normalisation layers; clean images lose their class, triggered ones keep it.

    In the variant ``k`` of the model, weight and bias of its last ``k`` BatchNorm layers are multiplied by ``omega``.
    ``s`` is the smallest ``k`` whose error on the labelled clean reserve exceeds ``error_rate``. Then ``PSC(x)`` is the
    mean, over the variants ``s .. s + variants - 1``, of the probability of the class that the *unchanged* model
    predicts. PSC is the score; a sample is flagged if it exceeds ``threshold``.

    Layers are counted in the order of registration, as in the reference (in residual networks not strictly by depth).
    A model with fewer than ``s + variants - 1`` of them has fewer variants, each counted once. If no ``k`` exceeds
    ``error_rate``, all layers are amplified and a warning says so (``info["error_reached"]``).

    Cost: no copy of the model is made. The pass up to the first amplified layer is shared by the unchanged model and
    all variants, the rest runs as one batch; ``info["shared"]`` names the module from which they part.

    What it cannot see: backdoors whose certainty breaks down as early as the clean classes'; and since ``s`` is where
    the clean error starts, clean images of the class into which the amplified model collapses look triggered.

    Source: Hou et al., ICML 2024, arXiv 2405.09786, algorithm 1. Not copied from its code: ``s`` amplifies ``k``
    layers, the test ``k + 1``; None is returned if the error is never exceeded; slices beyond the first layer count the
    same variant again; the network is copied for each batch.
    """

    card = DefenseCard(
        title="IBD-PSC",
        paper="Hou et al., Input-level Backdoor Detection via Parameter-oriented Scaling Consistency, ICML 2024",
        year=2024,
        arxiv="2405.09786",
        kinds=("inference",),
        needs=frozenset({"model", "reserve", "stream", "batch_norm"}),
        summary="Amplifies the last BatchNorm layers; predictions that stay certain give a trigger away.",
        deviations=(
            "The variants amplify the last s to s + 4 layers; the reference's test amplifies one more than its search.",
            "If the clean error never exceeds its bound, all layers are amplified; the reference returns nothing.",
            "Variants beyond the number of layers are left out; the reference counts the last one repeatedly.",
            "norm='layer' amplifies LayerNorm, an extension of ours.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of IBD-PSC.

        Args:
            omega: Factor on weight and bias.
            variants: Amplified models.
            error_rate: Error on the reserve that the first variant exceeds, ``xi``.
            threshold: Mean probability above which a sample is flagged, ``T``.
            norm: ``batch`` (BatchNorm2d), or ``layer`` (LayerNorm; experimental).
            batch_size: Images of all variants together in a forward pass; None chooses by device.
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {}, "paper": {}}

        omega: float = Field(1.5, gt=0, allow_inf_nan=False)
        variants: int = Field(5, ge=1)
        error_rate: float = Field(0.6, ge=0, lt=1)
        threshold: float = Field(0.9, ge=0, lt=1)
        norm: Literal["batch", "layer"] = "batch"
        batch_size: int | None = Field(None, ge=1)
        precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __init__(self, config: DefenseConfig | None = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.norm == "layer":
            card = type(self).card
            self.card = dataclasses.replace(card, needs=card.needs - {"batch_norm"})  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        if not affine_norms(view.model, self.config.norm):
            other = "layer" if self.config.norm == "batch" else "batch"
            layer = {"batch": "BatchNorm2d", "layer": "LayerNorm"}[self.config.norm]
            hint = f"norm={other!r} amplifies the other kind" if affine_norms(view.model, other) else ""
            raise UnsupportedModelError(
                "ibd_psc", model_name(view.model), f"it has no {layer} layer with weights", hint
            )
        if not len(view.reserve):
            raise DataRequirementError("ibd_psc chooses its layers by the error on clean images, the reserve has none")

    def run(self, view: DefenderView) -> DefenseResult:
        cfg, model, device = self.config, view.model, view.device
        self.check(view)
        numerics = choose_numerics(cfg.precision, True, model, device)
        norms = affine_norms(model, cfg.norm)
        batch_size = cfg.batch_size or (8192 if device.type == "cuda" else 512)
        options: dict[str, Any] = {"mean": view.mean, "std": view.std, "batch_size": batch_size, "numerics": numerics}
        clock = time.perf_counter()
        with placed(model, device, numerics.memory_format), keep_freed_memory(device):
            reserve = view.reserve.to(device)
            start, errors = first_count(
                model, norms, reserve.images, reserve.labels, cfg.omega, cfg.error_rate, cfg.variants, **options
            )
            reached = start > 0
            if not reached:
                start = len(norms)
                _log.warning("ibd_psc: no number of layers gives a clean error above %g; all are taken", cfg.error_rate)
            counts = list(range(start, min(start + cfg.variants - 1, len(norms)) + 1))
            calibrated = time.perf_counter()
            scores, shared = scaling_consistency(
                model, norms, view.stream.images.to(device), counts, cfg.omega, **options
            )
            clean, _ = scaling_consistency(model, norms, reserve.images, counts, cfg.omega, **options)
        scores = scores.cpu()
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > cfg.threshold,
            threshold=cfg.threshold,
            info={
                "layers": len(norms),
                "counts": counts,
                "error_reached": reached,
                "shared": shared,
                "calibration": {"samples": len(reserve), "errors": errors, "scores": clean.cpu()},
                "seconds": {"calibrate": calibrated - clock, "score": time.perf_counter() - calibrated},
            },
        )
