"""Adaptive-Blend: parts of a picture in training, all of it at test time (Qi et al., 2023; spec/attacks section 18)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import ops
from bbfast.attacks._adaptive import LABEL_MODES, PAPER, AdaptiveAttack, AdaptiveConfig
from bbfast.attacks._picture import draw_picture, load_picture, noise_picture
from bbfast.attacks.base import AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.randomness import make_key, uniform
from bbfast.data.imageset import ImageSet

__all__ = ["AdaptiveBlend", "kept_pieces"]


@register_attack("adaptive_blend")
class AdaptiveBlend(AdaptiveAttack):
    """Blends a random half of a picture's pieces into training images and the whole picture into test images.

    As many cover samples carry pieces under their own label, so that no piece means the target by itself and poisoned
    samples do not stand apart in the latent space.
    """

    card = Card(
        title="Adaptive-Blend",
        paper=PAPER,
        year=2023,
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="Random pieces of a blended picture in training, with cover samples; the whole picture at test time.",
        deviations=(
            "The picture is drawn by code as in Blended (the authors' may not be redistributed); trigger_path takes "
            "your own.",
            "Mixed values are rounded half to even; the peer stores PNG files cut off by a cast.",
            "The standard recipe of the protocol trains the model; recipe='peer' takes the authors' settings.",
            "As many cover samples as poisoned ones unless cover_rate says otherwise; the peer sets both rates.",
            "all2all and one2one are offered too; the paper has all2one.",
            "BackdoorBench has no Adaptive-Blend: compat='reference' is the same as 'paper'.",
        ),
    )
    cover_per_poison = 1.0

    class Config(AdaptiveConfig):
        """Settings of Adaptive-Blend.

        Args:
            ratio: Share of the whole training set to poison.
            train_alpha: Weight of the picture's pieces in training images.
            test_alpha: Weight of the picture in test images.
            pieces: Number of pieces, a square number; the image's sides must be multiples of its root.
            mask_rate: Share of the pieces left out of a training image.
            trigger: ``picture`` (drawn by code) or ``noise`` (uniform, from the seed).
            trigger_path: Your own picture, resized to the images whatever its aspect ratio; replaces ``trigger``.
        """

        train_alpha: float = Field(0.15, gt=0, le=1)
        test_alpha: float = Field(0.2, gt=0, le=1)
        pieces: int = Field(16, ge=1)
        mask_rate: float = Field(0.5, ge=0, lt=1)
        trigger: Literal["picture", "noise"] = "picture"
        trigger_path: Path | None = None

        @model_validator(mode="after")
        def _check_pieces(self) -> AdaptiveBlend.Config:
            if math.isqrt(self.pieces) ** 2 != self.pieces:
                raise ValueError(f"pieces must be a square number such as 16, got {self.pieces}")
            if round(self.mask_rate * self.pieces) == self.pieces:
                raise ValueError(f"mask_rate {self.mask_rate} leaves none of {self.pieces} pieces")
            return self

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        side = math.isqrt(self.config.pieces)
        _, height, width = data.image_size
        if height % side or width % side:
            raise ValueError(
                f"{self.name}: {self.config.pieces} pieces need images whose sides are multiples of {side}, got "
                f"{height} x {width}"
            )
        if self.config.trigger_path is not None:
            return {"picture": load_picture(self.config.trigger_path, data.image_size)}
        if self.config.trigger == "noise":
            return {"picture": noise_picture(data.image_size, seed)}
        return {"picture": draw_picture(data.image_size)}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        c, picture = self.config, self.tensor("picture", images)
        if images.is_floating_point():
            picture = picture.to(images.dtype) / 255
        if stage == "test":
            return ops.blend(images, picture, c.test_alpha)
        kept = kept_pieces(make_key(self.name, self.seed, stage), index, c.pieces, round(c.mask_rate * c.pieces))
        rows, columns = (n // kept.shape[1] for n in images.shape[-2:])
        mask = kept.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]
        dtype = images.dtype if images.is_floating_point() else torch.float32
        return ops.patch(images, picture, mask.to(dtype) * c.train_alpha)


def kept_pieces(key: int, index: Tensor, pieces: int, left_out: int) -> Tensor:
    """Which pieces each sample carries, bool ``[B, k, k]`` with k squared = ``pieces``.

    Every choice of ``left_out`` pieces is equally likely.

    Args:
        key: From :func:`bbfast.attacks.randomness.make_key`.
        index: Sample numbers, int64 ``[B]``.
        pieces: Number of pieces.
        left_out: How many of them a sample lacks.
    """
    rank = uniform(key, index, (pieces,)).argsort(dim=1, stable=True).argsort(dim=1)
    side = math.isqrt(pieces)
    return (rank >= left_out).view(-1, side, side)
