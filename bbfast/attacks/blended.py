"""Blended: a faint picture over the whole image (Chen et al., arXiv 1712.05526; spec/attacks section 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.attacks._picture import draw_picture, load_picture, noise_picture
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.data.imageset import ImageSet

__all__ = ["Blended"]


@register_attack("blended")
class Blended(Attack):
    """Mixes a picture into the whole image: ``(1 - alpha) * x + alpha * picture``."""

    card = Card(
        title="Blended",
        paper="Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
        year=2017,
        arxiv="1712.05526",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="A picture is blended into the whole image.",
        deviations=(
            "The reference's cartoon picture may not be redistributed: the default is drawn by code (three discs "
            "on stripes); trigger_path takes your own.",
            "Mixed values are rounded half to even; the reference truncates, which darkens by half a level on average "
            "(compat='reference' does so, bit for bit).",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(AttackConfig):
        """Settings of Blended.

        Args:
            train_alpha: Weight of the picture in training images.
            test_alpha: Weight of the picture in test images (the paper also proposes a larger one).
            trigger: ``picture`` (drawn by code) or ``noise`` (uniform, from the seed).
            trigger_path: Your own picture, resized to the images whatever its aspect ratio; replaces ``trigger``.
        """

        train_alpha: float = Field(0.2, gt=0, le=1)
        test_alpha: float = Field(0.2, gt=0, le=1)
        trigger: Literal["picture", "noise"] = "picture"
        trigger_path: Path | None = None

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        if self.config.trigger_path is not None:
            return {"picture": load_picture(self.config.trigger_path, data.image_size)}
        if self.config.trigger == "noise":
            return {"picture": noise_picture(data.image_size, seed)}
        return {"picture": draw_picture(data.image_size)}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        alpha = self.config.train_alpha if stage == "train" else self.config.test_alpha
        picture = self.tensor("picture", images)
        if images.is_floating_point():
            return ops.blend(images, picture.to(images.dtype) / 255, alpha)
        rounding = "truncate" if self.config.compat == "reference" else "nearest"
        return ops.blend(images, picture, alpha, rounding=rounding)
