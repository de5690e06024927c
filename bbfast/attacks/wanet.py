"""WaNet: a smooth warp of the whole image (Nguyen and Tran, arXiv 2102.10369; spec/attacks section 13)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import TensorAugment, keep_layout
from bbfast.attacks._batches import BatchAttack, BatchProgram, poisoned_of
from bbfast.attacks.base import AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule, PoisonedSet
from bbfast.attacks.randomness import make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.training.recipe import Recipe

__all__ = ["WaNet", "WaNetProgram", "batch_counts", "noisy_grid"]


@register_attack("wanet")
class WaNet(BatchAttack):
    """Warps images by a fixed smooth field; each training batch holds warped, noisily warped (cross) and clean samples.

    The cross samples carry the field plus noise and keep their label, so that the model learns this one field and not
    "anything warped". That takes many steps: after a few passes over a small set a model has no backdoor yet, which
    ``train_asr`` in the result's history shows.
    """

    card = Card(
        title="WaNet",
        paper="WaNet - Imperceptible Warping-based Backdoor Attack",
        year=2021,
        arxiv="2102.10369",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="A smooth elastic warp of the whole image.",
        deviations=(
            "Crop, rotation and flip after poisoning are drawn for each sample; the reference draws them once a batch "
            "(compat='reference' does so).",
            "Stored test images are rounded from the warped pixels; the reference normalises, denormalises and "
            "truncates, which loses up to one level (compat='reference' does so).",
            "The exported training set is drawn by the rules of poison-only attacks; the reference takes the first "
            "samples of every batch of an unshuffled pass (compat='reference' does so).",
            "The warping field is stored with the result; the reference keeps it in optional checkpoints only.",
            "mode='data' poisons the data alone, without control of the training, as a peer implementation does.",
        ),
    )

    class Config(AttackConfig):
        """Settings of WaNet.

        Args:
            mode: ``training`` poisons batches as they are made, ``ratio`` of each; ``data`` poisons the set once.
            cross_ratio: Cross samples for each poisoned one.
            k: Control points of the field along a side.
            s: Strength of the warp.
            grid_rescale: Factor on the sampling grid.
            random_crop: Zero padding of the crop after poisoning, in pixels.
            random_rotation: Largest rotation after poisoning, in degrees.
        """

        mode: Literal["training", "data"] = "training"
        cross_ratio: float = Field(2.0, ge=0)
        k: int = Field(4, ge=2)
        s: float = Field(0.5, gt=0)
        grid_rescale: float = Field(1.0, gt=0)
        random_crop: int = Field(5, ge=0)
        random_rotation: float = Field(10.0, ge=0, le=180)

        @model_validator(mode="after")
        def _check_shares(self) -> WaNet.Config:
            if self.mode == "training" and (self.count is not None or self.ratio is None):
                raise ValueError("mode 'training' poisons a share of each batch: give ratio, not count")
            if self.ratio is not None and self.count is None and self.ratio * (1 + self.cross_ratio) > 1 + 1e-9:
                raise ValueError(
                    f"ratio * (1 + cross_ratio) must be at most 1, got {self.ratio * (1 + self.cross_ratio):.4g}"
                )
            return self

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        channels, height, width = data.image_size
        if height != width:
            raise ValueError(f"{self.name}: images must be square, got {height} x {width}")
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        return {
            "grid": ops.wanet_grid(height, c.k, c.s, c.grid_rescale, generator=generator),
            "mean": torch.tensor(data.mean).view(channels, 1, 1),
            "std": torch.tensor(data.std).view(channels, 1, 1),
        }

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        return self._warp(images, self.tensor("grid", images))

    def cover(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        return self._warp(images, noisy_grid(self.tensor("grid", images), make_key("wanet", self.seed, stage), index))

    def counts(self, batch: int, draw: float) -> tuple[int, int]:
        assert self.config.ratio is not None
        return batch_counts(self.config.ratio, self.config.cross_ratio, batch, draw)

    def cross_count(self, poison: int, total: int) -> int:
        return int(poison * self.config.cross_ratio)

    def program(self, rule: LabelRule) -> WaNetProgram | None:
        return WaNetProgram(self, rule) if self.config.mode == "training" else None

    def export_train(self, train: ImageSet, seed: int, num_classes: int, batch_size: int) -> PoisonedSet:
        if self.config.mode == "data":
            return self.poison(train, seed, num_classes)
        return super().export_train(train, seed, num_classes, batch_size)

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        """As of the other attacks that control the training; ``mode='data'`` keeps the protocol's."""
        return {} if self.config.mode == "data" else super().recipe_overrides(recipe)

    def _warp(self, images: Tensor, grid: Tensor) -> Tensor:
        if images.is_floating_point() or self.config.compat == "paper":
            return ops.warp(images, grid.to(images.dtype) if images.is_floating_point() else grid)
        mean, std = self.tensor("mean", images), self.tensor("std", images)
        warped = ops.warp((images.float() / 255 - mean) / std, grid)
        return ((warped * std + mean) * 255).clamp(0, 255).to(torch.uint8)


class WaNetProgram(BatchProgram):
    """Makes WaNet's batches: the first samples of a shuffled batch warped and relabelled, the next noisily warped.

    Augmentation follows the poison (spec/attacks 0.6), so the loader's is off; images are warped after normalisation,
    which is the same as before it, because bilinear weights add up to 1 and the grid never leaves the image.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    augments_itself = True
    attack: WaNet

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        self.grid = self.attack.tensors["grid"].to(device)
        self.augment = TensorAugment(c.random_crop, c.random_rotation, recipe.flip, per_sample=c.compat == "paper")

    def make_batch(self, batch: Batch) -> Batch:
        poison, cross, labels, role = self.roles(batch)
        changed, x = poison + cross, batch.x
        if changed:
            key = make_key("wanet", self.seed, "epoch", batch.epoch)
            noisy = noisy_grid(self.grid, key, batch.index[poison:changed])
            grids = torch.cat([self.grid.expand(poison, -1, -1, -1), noisy])
            x = torch.cat([ops.warp(x[:changed], grids), x[changed:]])
        if self.recipe.augment:
            x = self.augment(x, batch.index, seed=self.seed, epoch=batch.epoch, step=batch.step)
        return batch.replace(x=keep_layout(x, batch.x), y=labels, role=role)


def batch_counts(ratio: float, cross_ratio: float, batch: int, draw: float) -> tuple[int, int]:
    """Poisoned and cross samples of a batch, see :func:`bbfast.attacks._batches.poisoned_of`.

    Args:
        ratio: Share of poisoned samples.
        cross_ratio: Cross samples for each poisoned one.
        batch: Size of the batch.
        draw: Uniform number in [0, 1) of this step.
    """
    poison = poisoned_of(ratio, batch, draw)
    return poison, min(int(poison * cross_ratio), batch - poison)


def noisy_grid(grid: Tensor, key: int, index: Tensor) -> Tensor:
    """The field plus noise of up to one pixel's share for each sample, float32 ``[B, H, W, 2]``, within -1..1.

    Args:
        grid: Field, float32 ``[H, W, 2]``.
        key: From :func:`bbfast.attacks.randomness.make_key`.
        index: Sample numbers, int64 ``[B]``.

    Source: the paper, section 3.3 (noise mode): ``grid + U(-1, 1) / H``.
    """
    height, width = grid.shape[:2]
    noise = uniform(key, index, (height, width, 2), -1.0, 1.0)
    return (grid + noise / height).clamp(-1, 1)
