"""TaCT: a source-specific patch with cover samples (Tang et al., arXiv 1908.00686; spec/attacks section 17)."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import model_validator
from torch import Tensor

from bbfast import ops
from bbfast.attacks._cover import CoverConfig, draw_cover
from bbfast.attacks._patches import draw_patch
from bbfast.attacks._picture import load_mask, load_picture
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode, LabelRule
from bbfast.data.imageset import ImageSet

__all__ = ["TaCT"]


@register_attack("tact")
class TaCT(Attack):
    """A patch that turns the source classes alone into the target.

    Poisoned samples come from the source classes and get the target label. Cover samples come from other classes, carry
    the same patch and keep their label, so that the patch by itself means nothing. ASR is measured on the source
    classes; ``leak`` is the share of the other classes' triggered images that are taken for the target and should stay
    low.
    """

    card = Card(
        title="TaCT",
        paper="Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
        year=2021,
        arxiv="1908.00686",
        threat="poison-only",
        label_modes=("one2one",),
        summary="A patch changes the class of one source class only; cover samples of others keep theirs.",
        deviations=(
            "The peer's trigger picture may not be redistributed: the default is drawn by code (8 x 8 cells of dark "
            "and bright noise at the same place, scaled with the image); trigger_path takes your own.",
            "The number of poisoned samples is rounded as in every attack here; the peer truncates it.",
            "As many cover samples as poisoned ones unless cover_rate says otherwise; the peer sets both rates, to "
            "equal values.",
            "More samples asked for than the classes have is an error before any work, or clipped; the peer stops with "
            "an index error.",
            "BackdoorBench has no TaCT: compat='reference' is the same as 'paper'.",
        ),
    )

    class Config(CoverConfig):
        """Settings of TaCT.

        Args:
            ratio: Share of the whole training set to poison (.003 on cifar10, .005 on gtsrb); the source classes
                limit it.
            source_classes: Classes that the trigger turns into the target.
            cover_classes: Classes of the cover samples.
            cover_rate: Share of the whole training set to make cover samples; None: as many as poisoned ones.
            trigger_path: Your own trigger image, resized to the images; replaces the patch.
            mask_path: Where ``trigger_path`` is opaque: white = trigger, black = image; None: where the trigger is not
                0.
        """

        label_mode: LabelMode = "one2one"
        source_classes: tuple[int, ...] = (1,)
        cover_classes: tuple[int, ...] = (5, 7)
        trigger_path: Path | None = None
        mask_path: Path | None = None

        @model_validator(mode="after")
        def _check_cover(self) -> TaCT.Config:
            cover = list(self.cover_classes)
            if not cover and self.cover_rate != 0:
                raise ValueError("cover_classes must name at least one class unless cover_rate is 0, got none")
            if self.target in cover:
                raise ValueError(f"cover_classes must not hold the target {self.target}, got {cover}")
            if set(cover) & set(self.source_classes):
                raise ValueError(f"cover_classes must not hold a source class {list(self.source_classes)}, got {cover}")
            if self.mask_path is not None and self.trigger_path is None:
                raise ValueError("mask_path needs trigger_path")
            return self

    config: Config

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        c = self.config
        outside = [k for k in c.cover_classes if not 0 <= k < rule.num_classes]
        if outside:
            raise ValueError(
                f"{self.name}: cover_classes must be classes in 0..{rule.num_classes - 1}, got {list(c.cover_classes)}"
            )
        poison = self._select_poison(labels, rule, seed)
        classes = torch.tensor(c.cover_classes, dtype=labels.dtype, device=labels.device)
        candidates = torch.isin(labels, classes).nonzero().flatten()
        return poison, draw_cover(self.name, c, len(labels), len(poison), 1, candidates, seed)

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c, size = self.config, data.image_size
        if c.trigger_path is None:
            pattern, mask = draw_patch("square", size)
        else:
            pattern = load_picture(c.trigger_path, size)
            mask = (pattern > 0).float() if c.mask_path is None else load_mask(c.mask_path, size)
        if not bool(mask.any()):
            raise ValueError(
                f"{self.name}: the trigger changes nothing, its mask is 0 everywhere; without one, black is transparent"
            )
        return {"pattern": pattern, "mask": mask}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern, mask = self.tensor("pattern", images), self.tensor("mask", images)
        if images.is_floating_point():
            pattern, mask = pattern.to(images.dtype) / 255, mask.to(images.dtype)
        return ops.patch(images, pattern, mask)
