"""BppAttack: fewer levels a channel (Wang, Zhai and Ma, arXiv 2205.13383; spec/attacks section 14)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import TensorAugment, keep_layout
from bbfast.attacks._batches import BatchAttack, BatchConfig, BatchProgram, other_rows, poisoned_of, truncated
from bbfast.attacks.base import AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.attacks.randomness import make_key
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.training.recipe import Recipe

__all__ = ["Bpp", "BppProgram"]

_CHUNK = 4096


@register_attack("bpp")
class Bpp(BatchAttack):
    """Squeezes images to a few levels a channel; each batch holds squeezed, negative and clean samples.

    A negative carries the quantisation residual of *another* image and keeps its label, so that the model learns an
    image's own quantisation and not "any such noise" (contrastive adversarial training, section 3.3 of the paper).
    """

    card = Card(
        title="BppAttack",
        paper="BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization "
        "and Contrastive Adversarial Learning",
        year=2022,
        arxiv="2205.13383",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="Colour depth is squeezed, with dithering.",
        deviations=(
            "Dithering is on, as in the paper; the reference's configuration switches it off (compat='reference' does "
            "so unless dithering is given).",
            "Training sees the rounded levels that stored images have; the reference trains on fractional ones without "
            "dithering and truncates what it stores (compat='reference' does so).",
            "Residuals of negatives are taken from the stored images; the reference's lose up to a level by truncation "
            "(compat='reference' does so).",
            "The negative test set adds the residual, clipped, as training does; the reference subtracts it and wraps "
            "around (compat='reference' does so).",
            "The other image of a negative is never the image itself.",
            "Crop, rotation and flip after poisoning are drawn for each sample; the reference draws them once a batch "
            "(compat='reference' does so).",
            "The exported training set is drawn by the rules of poison-only attacks; the reference takes the first "
            "samples of every batch of an unshuffled pass (compat='reference' does so).",
        ),
    )

    class Config(BatchConfig):
        """Settings of BppAttack; the authors' own: ``ratio=0.2, neg_ratio=0.2``.

        Args:
            squeeze_num: Levels of a channel.
            dithering: Floyd-Steinberg error diffusion; None: on, off in reference mode.
            neg_ratio: Share of negatives in a batch that holds a poisoned sample.
            random_crop: Zero padding of the crop after poisoning, in pixels.
            random_rotation: Largest rotation after poisoning, in degrees.
        """

        squeeze_num: int = Field(8, ge=2, le=256)
        dithering: bool | None = None
        neg_ratio: float = Field(0.1, ge=0, lt=1)
        random_crop: int = Field(5, ge=0)
        random_rotation: float = Field(10.0, ge=0, le=180)

        @model_validator(mode="after")
        def _check_shares(self) -> Bpp.Config:
            if self.ratio is not None and self.ratio + self.neg_ratio > 1 + 1e-9:
                raise ValueError(f"ratio + neg_ratio must be at most 1, got {self.ratio + self.neg_ratio:.4g}")
            return self

    config: Config

    @property
    def dithers(self) -> bool:
        """Whether errors are diffused."""
        return self.config.compat == "paper" if self.config.dithering is None else self.config.dithering

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        """As :meth:`Attack.apply`; a step has no gradient, so for float images it is passed straight through."""
        levels, dither = self.config.squeeze_num, self.dithers
        if images.is_floating_point():
            squeezed = ops.quantize(images, levels, dither)
            return images + (squeezed - images).detach() if images.requires_grad else squeezed
        # The reference rounds what it has dithered and truncates what it has not.
        truncate = self.config.compat == "reference" and not dither
        return ops.quantize(images, levels, dither, rounding="truncate" if truncate else "nearest")

    def cover_rows(self, data: ImageSet, rows: Tensor, stage: Stage) -> Tensor:
        """Negatives: each image plus the quantisation residual of another one of the set."""
        others = other_rows(rows, len(data), make_key("bpp", self.seed, stage), data.ids[rows])
        clean, own = data.images[others], data.images[rows].short()
        residual = self.apply(clean, others, stage).short() - self._stored(clean, data).short()
        if self.config.compat == "reference" and stage == "test":
            return (own - residual).to(torch.uint8)
        return (own + residual).clamp(0, 255).to(torch.uint8)

    def counts(self, batch: int, draw: float) -> tuple[int, int]:
        assert self.config.ratio is not None
        poison = poisoned_of(self.config.ratio, batch, draw)
        return poison, min(int(batch * self.config.neg_ratio), batch - poison) if poison else 0

    def cross_count(self, poison: int, total: int) -> int:
        return round(self.config.neg_ratio * total)

    def program(self, rule: LabelRule) -> BppProgram:
        return BppProgram(self, rule)

    def _stored(self, clean: Tensor, data: ImageSet) -> Tensor:
        """Clean images as residuals are taken from, uint8."""
        if self.config.compat == "paper":
            return clean
        mean, std = (torch.tensor(v, device=clean.device).view(-1, 1, 1) for v in (data.mean, data.std))
        return truncated((clean.float() / 255 - mean) / std, mean, std)


class BppProgram(BatchProgram):
    """Makes BPP's batches: the first samples of a shuffled batch squeezed and relabelled, the next negative.

    Augmentation follows the poison (spec/attacks 0.6), so the loader's is off, every image is met as it is stored, and
    the whole set is squeezed once.
    """

    augments_itself = True
    attack: Bpp

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        self.augment = TensorAugment(c.random_crop, c.random_rotation, recipe.flip, per_sample=c.compat == "paper")
        parts = zip(train.images.split(_CHUNK), train.ids.split(_CHUNK), strict=True)
        self.squeezed = torch.cat([self.attack.apply(images, ids, "train") for images, ids in parts])
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (train.mean, train.std))

    def make_batch(self, batch: Batch) -> Batch:
        poison, cross, labels, role = self.roles(batch)
        x = batch.x
        if poison:
            own = batch.index[poison : poison + cross]
            others = other_rows(own, len(self.train), make_key("bpp", self.seed, "epoch", batch.epoch), own)
            make = self._from_stored if self.attack.config.compat == "paper" else self._from_batch
            x = torch.cat([make(batch, poison, own, others), x[poison + cross :]])
        if self.recipe.augment:
            x = self.augment(x, batch.index, seed=self.seed, epoch=batch.epoch, step=batch.step)
        return batch.replace(x=keep_layout(x, batch.x), y=labels, role=role)

    def _from_stored(self, batch: Batch, poison: int, own: Tensor, others: Tensor) -> Tensor:
        """Squeezed and negative samples, normalised, from uint8 pixels: what the stored images would give."""
        images = self.train.images
        negative = images[own].short() + self.squeezed[others].short() - images[others].short()
        changed = torch.cat([self.squeezed[batch.index[:poison]], negative.clamp(0, 255).to(torch.uint8)])
        rows = torch.arange(len(changed), device=changed.device)
        return ops.gather_augment(changed, rows, mean=self.train.mean, std=self.train.std, dtype=batch.x.dtype)

    def _from_batch(self, batch: Batch, poison: int, own: Tensor, others: Tensor) -> Tensor:
        """The same as the reference has it: fractional levels without dithering, truncated clean images."""
        pixels = (batch.x[: poison + len(own)] * self.std + self.mean) * 255
        squeezed = ops.quantize(pixels[:poison] / 255, self.attack.config.squeeze_num, self.attack.dithers) * 255
        squeezed = squeezed.round() if self.attack.dithers else squeezed
        clean = self.attack._stored(self.train.images[others], self.train)
        negative = (pixels[poison:] + self.squeezed[others].float() - clean.float()).clamp(0, 255)
        return (torch.cat([squeezed, negative]) / 255 - self.mean) / self.std
