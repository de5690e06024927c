"""FIBA: the low-frequency Fourier amplitude of a picture (Feng et al., arXiv 2112.01148; spec/attacks section 20)."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import ops
from bbfast.attacks._picture import draw_picture, load_picture
from bbfast.attacks._pool import digests, draw_textures, load_folder
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES, LabelRule, draw_index
from bbfast.attacks.randomness import integers, make_key
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed

__all__ = ["FIBA"]

_MOST_PICTURES = 256


@register_attack("fiba")
class FIBA(Attack):
    """Mixes the low-frequency amplitude of a picture into each channel's spectrum and keeps the phase, the objects.

    With ``cross`` further samples carry the amplitude of other pictures under their true label, so that the model
    learns this one picture and not "some other picture's amplitude".
    """

    card = Card(
        title="FIBA",
        paper="FIBA: Frequency-Injection Based Backdoor Attack in Medical Image Analysis",
        year=2022,
        arxiv="2112.01148",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="The low-frequency Fourier amplitude of a picture is mixed into the image's.",
        deviations=(
            "The data are poisoned once, without control of the training; in the paper batches are poisoned as they "
            "are made, with cross samples (cross=True poisons data with them).",
            "The default picture is drawn by code (three discs on stripes), and the cross pictures are noise with "
            "1/f spectrum and a triangle; trigger_path and cross_path take your own.",
            "alpha .15 and beta .1 are the values of the specification; the paper's exact pair could not be verified.",
            "all2all is measured against the shifted label; the official evaluation measures it against the true one.",
            "Clean-label and source-specific modes are offered too.",
            "Both values of compat do the same.",
        ),
    )

    class Config(AttackConfig):
        """Settings of FIBA.

        Args:
            alpha: Weight of the picture's amplitude.
            beta: Half side of the window of low frequencies, as a part of the images' shorter side.
            trigger_path: Your own picture, resized to the images whatever its aspect ratio.
            cross: Whether cross samples are made.
            cross_ratio: Cross samples for each poisoned one.
            cross_path: Folder of pictures that cross samples draw from, at most 256 of them; None: made by code.
            cross_pictures: How many pictures are made by code.
        """

        alpha: float = Field(0.15, gt=0, le=1)
        beta: float = Field(0.1, ge=0, lt=0.5)
        trigger_path: Path | None = None
        cross: bool = False
        cross_ratio: float = Field(2.0, gt=0)
        cross_path: Path | None = None
        cross_pictures: int = Field(64, ge=1, le=_MOST_PICTURES)

        @model_validator(mode="after")
        def _check_cross(self) -> FIBA.Config:
            if self.cross_path is not None and not self.cross:
                raise ValueError("cross_path needs cross=True")
            if self.cross and self.ratio is not None and self.count is None:
                share = self.ratio * (1 + self.cross_ratio)
                if share > 1 + 1e-9:
                    raise ValueError(f"ratio * (1 + cross_ratio) must be at most 1, got {share:.4g}")
            return self

    config: Config

    def files(self) -> dict[str, str]:
        """Besides the picture, those of the cross folder."""
        return super().files() | digests(self.config.cross_path)

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c, size = self.config, data.image_size
        picture = draw_picture(size) if c.trigger_path is None else load_picture(c.trigger_path, size)
        tensors = {"picture": picture}
        if c.cross:
            tensors["cross"] = (
                draw_textures(size, c.cross_pictures, seed)
                if c.cross_path is None
                else load_folder(c.cross_path, size, _MOST_PICTURES, seed)
            )
        return tensors

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        return self._mix(images, self.tensor("picture", images))

    def cover(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        """The amplitude of a picture drawn for each sample; without ``cross`` the trigger."""
        if not self.config.cross:
            return self.apply(images, index, stage)
        pool = self.tensor("cross", images)
        which = integers(make_key("fiba", self.seed, stage), index, (), 0, len(pool) - 1)
        return self._mix(images, pool[which])

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        poison = self._select_poison(labels, rule, seed)
        if not self.config.cross:
            return poison, labels.new_empty(0)
        free = torch.ones_like(labels, dtype=torch.bool)
        free[poison] = False
        candidates = free.nonzero().flatten()
        wanted = int(len(poison) * self.config.cross_ratio)
        if self.config.count is None:
            # The shares were checked to fit; what can be too much by then is the rounding of the first.
            wanted = min(wanted, len(candidates))
        elif wanted > len(candidates):
            raise ValueError(
                f"{self.name}: {len(poison)} poisoned samples with cross_ratio {self.config.cross_ratio} ask for "
                f"{wanted} cross samples, but {len(candidates)} are left"
            )
        return poison, draw_index(candidates, wanted, derive_seed("cross", seed) % 2**32, self.config.index_rng)

    def extra_tests(self, test: ImageSet, seed: int = 0, num_classes: int | None = None) -> dict[str, ImageSet]:
        """With ``cross`` also ``cross_acc``: every test image as a cross sample, true labels."""
        tests = super().extra_tests(test, seed, num_classes)
        if not self.config.cross:
            return tests
        parts = [self.cover(test.images[p], test.ids[p], "test") for p in torch.arange(len(test)).split(4096)]
        cross = ImageSet(torch.cat(parts), test.labels, mean=test.mean, std=test.std, ids=test.ids)
        return {**tests, "cross_acc": cross}

    def _mix(self, images: Tensor, pictures: Tensor) -> Tensor:
        c = self.config
        if images.is_floating_point():
            return ops.amplitude_mix(images, pictures.to(images.dtype) / 255, c.alpha, c.beta).clamp(0, 1)
        return ops.amplitude_mix(images, pictures, c.alpha, c.beta)
