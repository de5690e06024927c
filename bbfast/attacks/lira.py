"""LIRA: an invisible perturbation that a generator learns (Doan et al., ICCV 2021; spec/attacks section 15)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.attacks._lira_nets import Autoencoder, UNet
from bbfast.attacks._lira_program import LiraProgram
from bbfast.attacks._networks import apply_network, initial
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.data.normalize import NORMALIZATION
from bbfast.training.recipe import Recipe

__all__ = ["Lira", "LiraProgram"]

_SMALLEST = 16
_CHUNK = 1024
_REFERENCE_RANGE = {
    "cifar10": (-1.9895, 2.1309),
    "cifar100": (-1.8974, 2.0243),
    "gtsrb": (0.0, 1.0),
    "tiny_imagenet": (-2.1179, 2.64),
}


@register_attack("lira")
class Lira(Attack):
    """A generator learns a perturbation of at most ``eps`` for each image, the classifier learns to obey it.

    Stage 1 alternates: the generator takes a step against the classifier, which takes one on clean and triggered
    images, the latter made by the generator of an epoch before. Stage 2 tunes the classifier with the generator fixed.
    ``ratio`` says how much of the set that data-based defenses are given is poisoned; training mixes two losses.
    """

    card = Card(
        title="LIRA",
        paper="LIRA: Learnable, Imperceptible and Robust Backdoor Attacks",
        year=2021,
        arxiv="",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="A generator learns an imperceptible perturbation of each image.",
        deviations=(
            "Triggered images are clipped to each channel's own range; the reference clips all channels to the widest "
            "one, and values beyond wrap around when stored (compat='reference' does so).",
            "The classifier's gradients from the generator's step are dropped; the reference adds them to its next "
            "ones (compat='reference' does so).",
            "The result is the classifier after both stages; the reference stores the one after stage 1 "
            "(compat='reference' does so).",
            "ASR is measured on float images (store_float), because 8 bits leave little of the perturbation; the "
            "reference measures on 8 bits (compat='reference' does so).",
            "Stage 1 gets a sixth of the recipe's epochs, the published share, unless both_train_epochs is given.",
            "Training runs in float32 whatever the recipe's precision: bf16 rounds the perturbation away.",
            "Augmentation is drawn for each sample; the reference draws it once a batch (compat='reference' does so).",
            "A set of ratio poisoned samples is exported for data-based defenses; the reference exports none.",
        ),
    )

    class Config(AttackConfig):
        """Settings of LIRA.

        Args:
            eps: Largest change in stage 1 and in training images.
            test_eps: The same in stage 2 and in test images; None: ``eps``.
            eps_space: What these are measured in: ``norm``, normalised images (of which 0.01 is 0.6 grey levels on
                cifar10); ``unit``, 0..1.
            alpha: Weight of the clean loss in stage 1, the triggered one has the rest.
            test_alpha: The same in stage 2.
            generator: ``autoencoder`` or ``unet``.
            lr_generator: Learning rate of Adam for the generator.
            both_train_epochs: Epochs of stage 1, at the start of the recipe's; None: a sixth.
            fix_generator_epoch: The classifier's generator is renewed every so many epochs.
            store_float: Keep the float test images for the evaluation; None: yes, no in reference mode.
            joint_forward: Run clean and triggered images through the classifier together, which changes BatchNorm's
                statistics.
            random_crop: Zero padding of the crop, in pixels.
            random_rotation: Largest rotation, in degrees.
        """

        eps: float = Field(0.01, gt=0)
        test_eps: float | None = Field(None, gt=0)
        eps_space: Literal["norm", "unit"] = "norm"
        alpha: float = Field(0.5, ge=0, lt=1)
        test_alpha: float = Field(0.5, ge=0, lt=1)
        generator: Literal["autoencoder", "unet"] = "autoencoder"
        lr_generator: float = Field(1e-4, gt=0)
        both_train_epochs: int | None = Field(None, ge=1)
        fix_generator_epoch: int = Field(1, ge=1)
        store_float: bool | None = None
        joint_forward: bool = False
        random_crop: int = Field(5, ge=0)
        random_rotation: float = Field(10.0, ge=0, le=180)

    config: Config
    learns_trigger = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        """An untrained generator; the training puts the trained one in its place."""
        channels, height, width = data.image_size
        if min(height, width) < _SMALLEST:
            raise ValueError(f"{self.name}: images must be at least 16 x 16, got {height} x {width}")
        net = initial(self.network(channels), self.name, seed)
        mean, std = (torch.tensor(v).view(channels, 1, 1) for v in (data.mean, data.std))
        low, high = self._range(data.mean, data.std)
        own = {f"generator.{key}": value for key, value in net.state_dict().items()}
        return {**own, "mean": mean, "std": std, "low": low, "high": high}

    def network(self, channels: int) -> Callable[[], nn.Module]:
        """How the generator is built for images of C channels."""
        return partial(Autoencoder if self.config.generator == "autoencoder" else UNet, channels)

    def strength(self, stage: Stage) -> float:
        """Largest change, in ``eps_space``."""
        c = self.config
        return c.eps if stage == "train" or c.test_eps is None else c.test_eps

    def perturbed(self, x: Tensor, direction: Tensor, eps: float) -> Tensor:
        """Normalised images moved by ``eps`` times the generator's output and clipped, float ``[B, C, H, W]``."""
        scale = eps / self.tensor("std", x) if self.config.eps_space == "unit" else eps
        return (x + scale * direction).clamp(self.tensor("low", x), self.tensor("high", x))

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        mean, std, exact = self.tensor("mean", images), self.tensor("std", images), images.is_floating_point()
        x = ((images.float() if exact else images.float() / 255) - mean) / std
        direction = apply_network(self.network(images.shape[1]), self.tensors, "generator", x)
        out = self.perturbed(x, direction, self.strength(stage)) * std + mean
        if exact:
            return out.to(images.dtype)
        if self.config.compat == "reference":
            return (out * 255).to(torch.int32).to(torch.uint8)  # cut off, and wrapped around where out of range
        return (out * 255).round().clamp(0, 255).to(torch.uint8)

    def program(self, rule: LabelRule) -> LiraProgram:
        return LiraProgram(self, rule)

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        """Three times the protocol's epochs (300, 150, 600), of which stage 1 is a sixth; MultiStep in stage 2."""
        milestones = (50, 100, 150, 200)
        return {"epochs": 3 * recipe.epochs, "schedule": "multistep", "milestones": milestones, "gamma": 0.1}

    def first_stage(self, recipe: Recipe) -> int:
        """Epochs of stage 1.

        Raises:
            ValueError: if the recipe has fewer.
        """
        given = self.config.both_train_epochs
        epochs = max(1, round(recipe.epochs / 6)) if given is None else given
        if epochs > recipe.epochs:
            raise ValueError(
                f"{self.name}: the recipe must have at least the {epochs} epochs of stage 1 (both_train_epochs), got "
                f"{recipe.epochs}"
            )
        return epochs

    def _range(self, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Smallest and largest normalised value, ``[C, 1, 1]``."""
        shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        low, high = -shift / scale, (1 - shift) / scale
        if self.config.compat == "paper":
            return low, high
        for name, (known, _) in NORMALIZATION.items():
            if known == tuple(mean) and name in _REFERENCE_RANGE:
                low, high = (torch.tensor(v).view(1, 1, 1) for v in _REFERENCE_RANGE[name])
        return low.min().expand_as(shift).clone(), high.max().expand_as(shift).clone()

    def _triggered(self, test: ImageSet, keep: Tensor, rule: LabelRule) -> BackdoorSet:
        made = super()._triggered(test, keep, rule)
        wanted = self.config.store_float
        if not (self.config.compat == "paper" if wanted is None else wanted):
            return made
        parts = [self.trigger(test.images[part].float() / 255, test.ids[part], "test") for part in keep.split(_CHUNK)]
        return dataclasses.replace(made, exact=torch.cat(parts))
