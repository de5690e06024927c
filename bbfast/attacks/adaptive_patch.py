"""Adaptive-Patch: four faint patches in training, two solid ones at test time (Qi et al., 2023; spec/attacks 19)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast import ops
from bbfast.attacks._adaptive import LABEL_MODES, PAPER, AdaptiveAttack, AdaptiveConfig
from bbfast.attacks._patches import draw_patch
from bbfast.attacks._picture import file_digest, load_mask, load_picture
from bbfast.attacks.base import AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule, PoisonedSet
from bbfast.attacks.randomness import integers, make_key
from bbfast.data.imageset import ImageSet

__all__ = ["AdaptivePatch"]

PatchName = Literal["corner", "corners", "logo", "checkers", "square"]


@register_attack("adaptive_patch")
class AdaptivePatch(AdaptiveAttack):
    """Each training sample carries one of several faint patches; test images carry two others, solid, at once.

    Twice as many cover samples carry a patch under their own label.
    """

    card = Card(
        title="Adaptive-Patch",
        paper=PAPER,
        year=2023,
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="One of four faint patches in training, with cover samples; two solid ones together at test time.",
        deviations=(
            "The authors' trigger pictures may not be redistributed: patches of the same places and sizes are drawn by "
            "code, scaled with the image; pattern_paths takes your own.",
            "Masks are explicit, so that black trigger pixels count; the peer takes for a mask what is not black.",
            "Samples are given their patch in the order of a hash of seed and sample number; assign='sorted' cuts the "
            "ascending numbers into equal parts as the peer does.",
            "The two solid patches are those of cifar10 for every data set; the peer's of gtsrb are "
            "test_triggers=('logo', 'square').",
            "Mixed values are rounded half to even; the peer stores PNG files cut off by a cast.",
            "The standard recipe of the protocol trains the model; recipe='peer' takes the authors' settings.",
            "Twice as many cover samples as poisoned ones unless cover_rate says otherwise; the peer sets both rates.",
            "all2all and one2one are offered too; the paper has all2one.",
            "BackdoorBench has no Adaptive-Patch: compat='reference' is the same as 'paper'.",
        ),
    )
    cover_per_poison = 2.0

    class Config(AdaptiveConfig):
        """Settings of Adaptive-Patch.

        Args:
            ratio: Share of the whole training set to poison (.003 on cifar10, .005 on gtsrb).
            train_triggers: The patches of training images, see :func:`bbfast.attacks._patches.draw_patch`.
            opacities: Opacity of each of them.
            test_triggers: The patches that a test image carries, one over the other.
            test_opacity: Opacity of these.
            assign: Which sample carries which patch: ``hash`` (at random) or ``sorted`` (by sample number).
            pattern_paths: Your own trigger images by the name of the patch that they replace.
            mask_paths: Where these are opaque, by the same names: white = trigger, black = image; none: where the
                trigger is not black.
        """

        train_triggers: tuple[PatchName, ...] = Field(("corner", "logo", "checkers", "square"), min_length=1)
        opacities: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
        test_triggers: tuple[PatchName, ...] = Field(("corners", "checkers"), min_length=1)
        test_opacity: float = Field(1.0, gt=0, le=1)
        assign: Literal["hash", "sorted"] = "hash"
        pattern_paths: dict[PatchName, Path] = Field(default_factory=dict)
        mask_paths: dict[PatchName, Path] = Field(default_factory=dict)

        @model_validator(mode="after")
        def _check_triggers(self) -> AdaptivePatch.Config:
            if len(self.opacities) != len(self.train_triggers):
                raise ValueError(
                    f"opacities must have one value for each of {len(self.train_triggers)} train_triggers, got "
                    f"{len(self.opacities)}"
                )
            if not all(0 < opacity <= 1 for opacity in self.opacities):
                raise ValueError(f"opacities must be above 0 and at most 1, got {list(self.opacities)}")
            without = sorted(set(self.mask_paths) - set(self.pattern_paths))
            if without:
                raise ValueError(f"mask_paths need pattern_paths of the same names, got masks alone for {without}")
            return self

    config: Config

    def files(self) -> dict[str, str]:
        paths = [*self.config.pattern_paths.values(), *self.config.mask_paths.values()]
        return super().files() | {str(path): file_digest(path) for path in paths if path.is_file()}

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        c, size = self.config, data.image_size
        train = [
            self._trigger(name, size, opacity) for name, opacity in zip(c.train_triggers, c.opacities, strict=True)
        ]
        test = [self._trigger(name, size, c.test_opacity) for name in c.test_triggers]
        stacked: dict[str, Tensor] = {}
        for stage, triggers in (("train", train), ("test", test)):
            stacked[f"{stage}_patterns"] = torch.stack([pattern for pattern, _ in triggers])
            stacked[f"{stage}_masks"] = torch.stack([mask for _, mask in triggers])
        # Filled when a set is poisoned: its samples in ascending order, and which patch each carries.
        empty = torch.empty(0, dtype=torch.int64)
        return {**stacked, "assigned_ids": empty, "assigned": empty.clone()}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        patterns, masks = self.tensor(f"{stage}_patterns", images), self.tensor(f"{stage}_masks", images)
        if images.is_floating_point():
            patterns, masks = patterns.to(images.dtype) / 255, masks.to(images.dtype)
        if stage == "train":
            part = self._parts(index)
            return ops.patch(images, patterns[part], masks[part])
        for pattern, mask in zip(patterns, masks, strict=True):
            images = ops.patch(images, pattern, mask)
        return images

    def _trigger(self, name: PatchName, size: tuple[int, int, int], opacity: float) -> tuple[Tensor, Tensor]:
        """Pattern uint8 ``[C, H, W]`` and mask float32 ``[C, H, W]`` times the opacity."""
        c = self.config
        if name in c.pattern_paths:
            pattern = load_picture(c.pattern_paths[name], size)
            mask = (pattern > 0).any(0, keepdim=True).float()
            if name in c.mask_paths:
                mask = load_mask(c.mask_paths[name], size)
        else:
            pattern, mask = draw_patch(name, size)
        if not bool(mask.any()):
            raise ValueError(
                f"{self.name}: the patch {name!r} changes nothing, its mask is 0 everywhere; without one, black is "
                "transparent"
            )
        return pattern, mask * opacity

    def _parts(self, index: Tensor) -> Tensor:
        """Which patch each sample carries: as assigned, or at random for a sample that was not poisoned."""
        last = len(self.config.train_triggers) - 1
        drawn = integers(make_key(self.name, self.seed, "part"), index, (), 0, last)
        ids, assigned = self.tensor("assigned_ids", index), self.tensor("assigned", index)
        if not len(ids):
            return drawn
        place = torch.searchsorted(ids, index).clamp(max=len(ids) - 1)
        return torch.where(ids[place] == index, assigned[place], drawn)

    def _materialise(self, train: ImageSet, rule: LabelRule, poison: Tensor, cross: Tensor) -> PoisonedSet:
        # Equal parts cannot be drawn sample by sample: who carries what is settled for the set, and kept.
        ids = torch.cat([train.ids[poison], train.ids[cross]])
        parts = torch.cat([self._deal(train.ids[poison]), self._deal(train.ids[cross])])
        ids, order = ids.sort()
        self.tensors = {**self.tensors, "assigned_ids": ids, "assigned": parts[order]}
        return super()._materialise(train, rule, poison, cross)

    def _deal(self, ids: Tensor) -> Tensor:
        """Equal parts, one a patch, of the samples in the order of ``assign``; int64 in the order of ``ids``."""
        key = make_key(self.name, self.seed, "deal")
        by = ids if self.config.assign == "sorted" else integers(key, ids, (), 0, 2**31 - 1)
        rank = by.argsort(stable=True).argsort()
        return rank * len(self.config.train_triggers) // max(1, len(ids))
