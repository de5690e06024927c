"""TUAP: a universal adversarial perturbation as trigger (Zhao et al., arXiv 2003.03030; spec/attacks section 23)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import _progress, ops
from bbfast.attacks._deepfool import targeted_deepfool
from bbfast.attacks._rows import add_changes, changes
from bbfast.attacks._units import class_sample, draw_rows, unit_images
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode, LabelRule
from bbfast.attacks.surrogate import Classifier, SurrogateConfig, clean_surrogate, linf_pgd, set_hash
from bbfast.data.imageset import ImageSet
from bbfast.errors import BBFastError

__all__ = ["TUAP", "project", "targeted_rate"]

_EVALUATED_PER_CLASS = 100
_BATCH = 256
_ADV_STEP = 1.5 / 255


@register_attack("tuap")
class TUAP(Attack):
    """Adds one small pattern that by itself moves a clean model's predictions towards the target class."""

    card = Card(
        title="TUAP",
        paper="Clean-Label Backdoor Attacks on Video Recognition Models",
        year=2020,
        arxiv="2003.03030",
        threat="poison-only",
        label_modes=("clean_label", "all2one", "one2one"),
        needs=("surrogate",),
        summary="A targeted universal adversarial perturbation is added to the image.",
        deviations=(
            "The paper poisons videos; this is its image version.",
            "ratio is a share of the whole set, as for all attacks; ratio_of_class is the peer's share of the class.",
            "Sums are clipped and the poisoned samples drawn; a peer implementation casts without clipping, so that "
            "values wrap around, and takes the first samples (compat='reference' does both).",
            "The search ends by the share of other classes' images taken for the target, which is what the trigger is "
            "for; the peer counts every changed prediction (compat='reference' does so).",
            "An image is worked on while it is not taken for the target; the peer leaves it once any other class is "
            "predicted (compat='reference' does so).",
            "DeepFool works on chunk images at once with the pattern held; the peer takes one at a time (chunk=1 does "
            "so).",
            "Dirty labels (all2one, one2one) are offered too.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of TUAP.

        Args:
            label_mode: ``clean_label``, ``all2one`` or ``one2one``.
            norm: Of ``eps``: ``linf`` or ``l2``.
            eps: Bound of the pattern in 0..1 units; None is 10/255, or 76/255 for images of one channel. ``l2`` needs
                one.
            images_ratio: Share of the training images that the pattern is made with, plus one image.
            passes: Largest number of passes over them.
            delta: The search ends when ``1 - delta`` of the images it is measured on are fooled.
            deepfool_steps: Largest number of DeepFool steps of an image.
            overshoot: By which share DeepFool crosses the boundary.
            extra_step: Added to every step's length, in 0..1 units.
            chunk: Images whose steps are computed at once; 1 is the sequential algorithm.
            ratio_of_class: Share of the poisonable samples (the target class for clean labels) to poison; replaces
                ``ratio``.
            adv_first: Also perturb each poisoned image by untargeted PGD before the pattern, as the paper does; clean
                labels only.
            adv_eps: Largest change of a pixel by that.
            adv_steps: Its steps.
        """

        label_mode: LabelMode = "clean_label"
        norm: Literal["linf", "l2"] = "linf"
        eps: float | None = Field(None, gt=0)
        images_ratio: float = Field(0.01, ge=0, le=1)
        passes: int = Field(20, ge=1)
        delta: float = Field(0.2, ge=0, lt=1)
        deepfool_steps: int = Field(50, ge=2)
        overshoot: float = Field(0.02, ge=0)
        extra_step: float = Field(1e-4, ge=0)
        chunk: int = Field(16, ge=1)
        ratio_of_class: float | None = Field(None, gt=0, le=1)
        adv_first: bool = False
        adv_eps: float = Field(16 / 255, gt=0, le=1)
        adv_steps: int = Field(100, ge=1)

        @model_validator(mode="after")
        def _check_bounds(self) -> TUAP.Config:
            if self.norm == "l2" and self.eps is None:
                raise ValueError("norm 'l2' needs eps")
            if self.norm == "linf" and self.eps is not None and self.eps > 1:
                raise ValueError("eps must be at most 1 with norm 'linf': it is in 0..1 units, 10/255 by default")
            if self.adv_first and self.label_mode != "clean_label":
                raise ValueError(f"adv_first is for label_mode 'clean_label', got {self.label_mode!r}")
            return self

        def bound(self, channels: int) -> float:
            """The largest norm of the pattern, for images of so many channels."""
            return (76 / 255 if channels == 1 else 10 / 255) if self.eps is None else self.eps

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        c = self.config
        surrogate = clean_surrogate(context, data, num_classes, c, seed)
        candidates = (data.labels.cpu() != c.target).nonzero().flatten()
        drawn = draw_rows(len(candidates), int(c.images_ratio * len(data)) + 1, "tuap", seed)
        made_with = data.subset(candidates[drawn].sort().values)
        judged = class_sample(context.test or data, num_classes, _EVALUATED_PER_CLASS, seed)
        judged_on = judged.subset(judged.labels != c.target)
        identity: dict[str, Any] = {
            "surrogate": surrogate.describe(),
            "images": [set_hash(made_with), set_hash(judged_on)],
            "target": c.target,
            "bound": [c.norm, c.bound(data.image_size[0])],
            "settings": c.model_dump(
                include={"passes", "delta", "deepfool_steps", "overshoot", "extra_step", "chunk", "compat"}
            ),
        }

        def make(_: Path) -> dict[str, Tensor]:
            return {"pattern": self._search(surrogate, made_with, judged_on, seed, context.progress)}

        state = dict(context.obtain("tuap_pattern", identity, make, seed=seed))
        return state | (self._attacked(surrogate, data, context) if c.adv_first else {})

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        if self.config.adv_first and stage == "train":
            images = add_changes(images, index, self.tensor("ids", images), self.tensors["change"])
        pattern = self.tensor("pattern", images)
        if images.is_floating_point():
            return ops.add(images, pattern.to(images.dtype))
        if self.config.compat == "reference":
            # float to byte without clipping: the fraction is cut off, and what leaves 0..255 comes in at the other end.
            return (images.float() + 255 * pattern).to(torch.int16).remainder(256).to(torch.uint8)
        return ops.add(images, 255 * pattern)

    def _select_poison(self, labels: Tensor, rule: LabelRule, seed: int) -> Tensor:
        c = self.config
        if c.ratio_of_class is not None:
            available = int(rule.trainable(labels).sum())
            count = round(c.ratio_of_class * available)
            if not count:
                raise ValueError(f"{self.name}: ratio_of_class {c.ratio_of_class} of {available} samples poisons none")
            counted = type(self)(c.model_copy(update={"ratio_of_class": None, "count": count}))
            return counted._select_poison(labels, rule, seed)
        chosen = super()._select_poison(labels, rule, seed)
        return rule.trainable(labels).nonzero().flatten()[: len(chosen)] if c.compat == "reference" else chosen

    def _search(
        self, surrogate: Classifier, made_with: ImageSet, judged_on: ImageSet, seed: int, progress: bool | None
    ) -> Tensor:
        """The pattern ``[C, H, W]`` in 0..1 units: DeepFool steps to the target summed up, within the bound."""
        c = self.config
        images, judged = (unit_images(part.images, surrogate.device) for part in (made_with, judged_on))
        with torch.no_grad():
            first, before = surrogate(images).argmax(1), _predictions(surrogate, judged)
        pattern = torch.zeros_like(images[0])
        bound = c.bound(pattern.shape[0])
        with _progress.bar("trigger of TUAP", c.passes, progress) as bar:
            for number in range(c.passes):
                order = draw_rows(len(images), len(images), "tuap pass", seed, number).to(images.device)
                for rows in order.split(c.chunk):
                    with torch.no_grad():
                        now = surrogate(images[rows] + pattern).argmax(1)
                    rows = rows[now == first[rows] if c.compat == "reference" else now != c.target]
                    steps_to, taken = targeted_deepfool(
                        surrogate,
                        images[rows] + pattern,
                        c.target,
                        c.deepfool_steps,
                        overshoot=c.overshoot,
                        extra_step=c.extra_step,
                    )
                    for change in steps_to[taken < c.deepfool_steps - 1]:
                        pattern = project(pattern + change, c.norm, bound)
                if c.compat == "reference":
                    fooled = float((_predictions(surrogate, judged + pattern) != before).double().mean())
                else:
                    fooled = targeted_rate(surrogate, judged, pattern, c.target)
                bar.advance()
                if fooled >= 1 - c.delta:
                    break
        if not bool(pattern.any()):
            raise BBFastError(
                f"tuap: DeepFool moved none of {len(images)} images to class {c.target} in {c.deepfool_steps} steps; "
                f"is the surrogate trained? Raise deepfool_steps or images_ratio"
            )
        return pattern

    def _attacked(self, surrogate: Classifier, data: ImageSet, context: AttackContext) -> dict[str, Tensor]:
        """The target class after untargeted PGD."""
        c = self.config
        rows = data.subset((data.labels == c.target).nonzero().flatten())
        identity = {"surrogate": surrogate.describe(), "rows": set_hash(rows), "ascent": [c.adv_eps, c.adv_steps]}

        def make(_: Path) -> dict[str, Tensor]:
            parts = []
            for part in torch.arange(len(rows), device=rows.device).split(_BATCH):
                images = unit_images(rows.images[part], surrogate.device)
                labels = rows.labels[part].to(images.device)
                moved = linf_pgd(surrogate, images, labels, c.adv_eps, _ADV_STEP, c.adv_steps)
                parts.append((moved.cpu() * 255).round().to(torch.uint8))
            return {"images": torch.cat(parts)}

        return changes(rows, context.obtain("tuap_images", identity, make)["images"])


def project(pattern: Tensor, norm: str, bound: float) -> Tensor:
    """The nearest pattern within the bound: clamped (``linf``) or scaled (``l2``)."""
    if norm == "linf":
        return pattern.clamp(-bound, bound)
    return pattern * (bound / pattern.norm().clamp_min(1e-12)).clamp_max(1)


def targeted_rate(surrogate: Classifier, images: Tensor, pattern: Tensor, target: int) -> float:
    """Share of images ``[N, C, H, W]`` in 0..1 that the surrogate takes for the target with the pattern on them."""
    triggered = (images + pattern.to(images.device)).clamp(0, 1)
    return float((_predictions(surrogate, triggered) == target).double().mean())


def _predictions(surrogate: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([surrogate(part).argmax(1) for part in images.split(_BATCH)])
