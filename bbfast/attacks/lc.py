"""LC: images made hard to recognise, and corners that are easy (Turner et al., arXiv 1912.02771; spec/attacks 3)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import ops
from bbfast.attacks._lc_gan import WganSettings, interpolated
from bbfast.attacks._rows import add_changes, changes
from bbfast.attacks._units import unit_images
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode
from bbfast.attacks.surrogate import (
    SurrogateConfig,
    clean_surrogate,
    l2_pgd,
    linf_pgd,
    robust_surrogate,
    set_hash,
)
from bbfast.data.imageset import ImageSet
from bbfast.training import Recipe
from bbfast.training.device import placed

__all__ = ["LabelConsistent", "corner_signs"]

_SIDE = 32
_RIGHT = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))
_QUICK_EPOCHS, _EPOCHS = 30, 100
_BATCH = 256


@register_attack("lc")
class LabelConsistent(Attack):
    """Perturbs images of the target class so that they say little of it, and marks their corners.

    Training images carry perturbation and corners, test images the corners alone. All images of the target class are
    perturbed once and kept by sample number; a training image of another number gets the corners alone.
    """

    card = Card(
        title="Label-Consistent",
        paper="Label-Consistent Backdoor Attacks",
        year=2019,
        arxiv="1912.02771",
        threat="poison-only",
        label_modes=("clean_label",),
        needs=("surrogate",),
        summary="Four patterned corners; training images are adversarially perturbed too, under their true label.",
        deviations=(
            "The perturbed images are made with a surrogate that the library trains; the reference reads arrays that "
            "its authors made, one named 16 although the script says 8; the default is eps 8/255.",
            "The surrogate is of the victim's architecture unless another is named; the reference has ResNet-18.",
            "Perturbed and triggered values are rounded; the reference truncates (compat='reference' does so, bit for "
            "bit).",
            "Below 32 pixels the corners stay 3 pixels wide; the reference shrinks them with nearest neighbours, which "
            "loses cells (compat='reference' does so).",
            "GAN mode takes source images from all other classes unless one is named, and its search steps shrink.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of LC.

        Args:
            label_mode: ``clean_label`` only.
            perturbation: ``linf`` or ``l2`` (projected gradient ascent on a surrogate) or ``gan`` (images between
                classes, no surrogate).
            eps: Largest change in 0..1 units: of a pixel for ``linf`` (None: 8/255), in norm for ``l2`` (600/255).
            step: Size of a step; None is 1.5/255 for ``linf`` and ``1.5 * eps / steps`` for ``l2``.
            steps: Number of steps, without a random start.
            surrogate_kind: ``robust`` (adversarially trained, SGD 0.1, times 0.1 at 75 % and 90 % of the epochs) or
                ``standard`` (weaker poison). Unless ``surrogate_epochs`` says otherwise a robust one is trained for 100
                epochs, or 30 where the preset of the surrogate (or, without one, a victim's recipe of at most 30
                epochs) is quick. Batches and augmentation are the victim's.
            amplitude: Strength of the corners in training images, in 0..1; 1 sets them to 0 and 255.
            test_amplitude: Strength in test images; None is ``amplitude``.
            corners: ``all`` four, or ``bottom_right``.
            tau: Share of the source image in ``gan`` mode.
            gan_iterations: Steps of the generator.
            gan_encode_steps: Steps of the search for an image's code.
            gan_source: Class of the source images; None takes all other classes.
        """

        label_mode: LabelMode = "clean_label"
        perturbation: Literal["linf", "l2", "gan"] = "linf"
        eps: float | None = Field(None, gt=0)
        step: float | None = Field(None, gt=0)
        steps: int = Field(100, ge=1)
        surrogate_kind: Literal["robust", "standard"] = "robust"
        amplitude: float = Field(1.0, gt=0, le=1)
        test_amplitude: float | None = Field(None, gt=0, le=1)
        corners: Literal["all", "bottom_right"] = "all"
        tau: float = Field(0.2, ge=0, le=1)
        gan_iterations: int = Field(1000, ge=1)
        gan_encode_steps: int = Field(500, ge=1)
        gan_source: int | None = Field(None, ge=0)

        @model_validator(mode="after")
        def _check_perturbation(self) -> LabelConsistent.Config:
            if self.perturbation == "linf" and self.eps is not None and self.eps > 1:
                raise ValueError(
                    "eps must be at most 1 with perturbation 'linf': it is in 0..1 units, 8/255 by default"
                )
            if self.gan_source == self.target:
                raise ValueError(f"gan_source must not be the target {self.target}")
            return self

        @property
        def bounds(self) -> tuple[float, float]:
            """Radius and step of the ascent."""
            if self.perturbation == "l2":
                eps = 600 / 255 if self.eps is None else self.eps
                return eps, 1.5 * eps / self.steps if self.step is None else self.step
            return 8 / 255 if self.eps is None else self.eps, 1.5 / 255 if self.step is None else self.step

        def robust_recipe(self, context: AttackContext) -> Recipe:
            """How the robust surrogate is trained."""
            short = context.recipe.epochs <= _QUICK_EPOCHS
            quick = short if self.surrogate_preset is None else self.surrogate_preset == "quick"
            epochs = self.surrogate_epochs or (_QUICK_EPOCHS if quick else _EPOCHS)
            return self.surrogate_recipe(
                context,
                epochs=epochs,
                optimizer="sgd",
                lr=0.1,
                momentum=0.9,
                nesterov=False,
                weight_decay=5e-4,
                schedule="multistep",
                milestones=tuple(sorted({round(0.75 * epochs), round(0.9 * epochs)})),
                gamma=0.1,
                label_smoothing=0.0,
                flooding=0.0,
            )

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        c = self.config
        signs = corner_signs(data.image_size, c.corners, exact=c.compat == "reference")
        rows = data.subset((data.labels == c.target).nonzero().flatten())
        make = self._gan if c.perturbation == "gan" else self._ascent
        return {"signs": signs, **changes(rows, make(data, rows, num_classes, seed, context))}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        c = self.config
        amplitude = c.amplitude if stage == "train" or c.test_amplitude is None else c.test_amplitude
        if stage == "train":
            images = add_changes(images, index, self.tensor("ids", images), self.tensors["change"])
        signs = self.tensor("signs", images)
        if images.is_floating_point():
            return ops.add(images, amplitude * signs.to(images.dtype))
        return ops.add(images, amplitude * 255 * signs, rounding="truncate" if c.compat == "reference" else "nearest")

    def _ascent(self, data: ImageSet, rows: ImageSet, num_classes: int, seed: int, context: AttackContext) -> Tensor:
        """The rows after projected gradient ascent, uint8."""
        c = self.config
        if c.surrogate_kind == "robust":
            surrogate = robust_surrogate(context, data, num_classes, c, c.robust_recipe(context), seed)
        else:
            surrogate = clean_surrogate(context, data, num_classes, c, seed)
        (eps, step), ascend = c.bounds, l2_pgd if c.perturbation == "l2" else linf_pgd
        identity: dict[str, Any] = {
            "surrogate": surrogate.describe(),
            "rows": set_hash(rows),
            "ascent": [c.perturbation, eps, step, c.steps],
            "compat": c.compat,
        }

        def make(_: Path) -> dict[str, Tensor]:
            parts = []
            with placed(surrogate.network, surrogate.device, torch.channels_last):
                for part in torch.arange(len(rows), device=rows.device).split(_BATCH):
                    images = unit_images(rows.images[part], surrogate.device).contiguous(
                        memory_format=torch.channels_last
                    )
                    labels = rows.labels[part].to(surrogate.device)
                    parts.append(self._bytes(ascend(surrogate, images, labels, eps, step, c.steps)))
            return {"images": torch.cat(parts)}

        return context.obtain("lc_images", identity, make, seed=seed)["images"]

    def _gan(self, data: ImageSet, rows: ImageSet, num_classes: int, seed: int, context: AttackContext) -> Tensor:
        """What lies between the rows and images of other classes, uint8."""
        c = self.config
        source = data.labels != c.target if c.gan_source is None else data.labels == c.gan_source
        sources = data.subset(source.nonzero().flatten())
        if not len(sources):
            raise ValueError(f"{self.name}: gan_source {c.gan_source} has no training image")
        settings = WganSettings(c.gan_iterations, c.gan_encode_steps, c.tau)
        identity: dict[str, Any] = {
            "rows": set_hash(rows),
            "ids": rows.ids.tolist(),
            "sources": set_hash(sources),
            "settings": dataclasses.asdict(settings),
            "compat": c.compat,
        }

        def make(_: Path) -> dict[str, Tensor]:
            made = interpolated(rows, sources, settings, seed, context.device, _BATCH, context.progress)
            return {"images": self._bytes(made)}

        return context.obtain("lc_gan_images", identity, make, seed=seed)["images"]

    def _bytes(self, images: Tensor) -> Tensor:
        levels = images.cpu() * 255
        return (levels.floor() if self.config.compat == "reference" else levels.round()).to(torch.uint8).contiguous()


def corner_signs(image_size: tuple[int, int, int], corners: str = "all", exact: bool = False) -> Tensor:
    """Where the corners add (1), subtract (-1) or leave the image (0), float ``[C, H, W]``.

    3 x 3 cells in each corner of a 32-pixel image, enlarged by nearest neighbours with the image.

    Args:
        image_size: ``(C, H, W)``.
        corners: ``all`` or ``bottom_right``.
        exact: Resize smaller images in the same way, although cells are lost; else they get 3-pixel corners.

    Raises:
        ValueError: if the corners would overlap.
    """
    channels, height, width = image_size
    if min(height, width) < 6:
        raise ValueError(f"lc: the corners need images of at least 6 x 6 pixels, got {height} x {width}")
    drawn = (_SIDE, _SIDE) if exact else (min(height, _SIDE), min(width, _SIDE))
    right = torch.tensor(_RIGHT, dtype=torch.float32)
    signs = torch.zeros(drawn)
    signs[-3:, -3:] = right
    if corners == "all":
        signs[:3, -3:] = right
        signs[:3, :3] = signs[-3:, :3] = right.flip(1)
    resized = F.interpolate(signs[None, None], size=(height, width), mode="nearest")[0]
    return resized.expand(channels, -1, -1).contiguous()
