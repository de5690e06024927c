"""SIG: a sine wave along the columns (Barni, Kallas and Tondi, arXiv 1902.11237; spec/attacks section 4)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode
from bbfast.data.imageset import ImageSet

__all__ = ["SIG"]

_LEAST = 0.5
"""Height in levels below which a wave may vanish in rounding."""


@register_attack("sig")
class SIG(Attack):
    """Adds ``delta * sin(2 pi j f / W)`` to column ``j`` of every row and channel.

    Clean-label: images of the target class get the wave and keep their label, so the model must come to prefer the wave
    to the object. The ratio counts over the whole training set: a class may have fewer images than it asks for
    (``clip_to_class``).
    """

    card = Card(
        title="SIG",
        paper="A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning",
        year=2019,
        arxiv="1902.11237",
        threat="poison-only",
        label_modes=("clean_label", "all2one", "all2all", "one2one"),
        summary="A horizontal sine wave over the whole image.",
        deviations=(
            "Sums are rounded half to even; the reference truncates them, also where the wave is zero up to the "
            "round-off of the sine, which darkens by half a level on average (compat='reference' does so, bit for "
            "bit).",
            "Dirty-label modes are offered too; the reference has clean labels only.",
        ),
    )

    class Config(AttackConfig):
        """Settings of SIG.

        Args:
            delta_train: Height of the wave in training images, in levels of 0..255.
            delta_test: Height in test images (the paper also raises it there).
            frequency: Waves across the image.
        """

        label_mode: LabelMode = "clean_label"
        delta_train: float = Field(40.0, gt=0, le=255)
        delta_test: float = Field(40.0, gt=0, le=255)
        frequency: float = Field(6.0, gt=0)

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c, width = self.config, data.image_size[2]
        middle = torch.full((1, 1, 1, width), 0.5, dtype=torch.float64)
        for delta in (c.delta_train, c.delta_test):
            height = float((ops.sinusoid(middle, delta, c.frequency) - middle).abs().max() * 255)
            if height < _LEAST:
                raise ValueError(
                    f"{self.name}: a wave of height {delta:g} and frequency {c.frequency:g} changes no pixel of images "
                    f"{width} wide by more than {height:.2g} levels; choose another frequency or height"
                )
        return {}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        c = self.config
        delta = c.delta_train if stage == "train" else c.delta_test
        rounding = "truncate" if c.compat == "reference" else "nearest"
        return ops.sinusoid(images, delta, c.frequency, rounding=rounding)
