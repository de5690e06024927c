"""Input-Aware: a trigger made for each image (Nguyen and Tran, arXiv 2010.08138; spec/attacks section 12)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast.attacks._batches import BatchAttack, BatchConfig, other_rows, poisoned_of, truncated
from bbfast.attacks._input_aware_nets import Generator, blend_in, threshold, widths_for
from bbfast.attacks._input_aware_program import InputAwareProgram
from bbfast.attacks._networks import apply_network, initial
from bbfast.attacks.base import AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.attacks.randomness import make_key
from bbfast.data.imageset import ImageSet
from bbfast.training.recipe import Recipe

__all__ = ["InputAware", "InputAwareProgram"]

_SMALLEST = 16


@register_attack("input_aware")
class InputAware(BatchAttack):
    """A network makes a pattern and another a mask for each image; the pattern replaces the image under the mask.

    First the mask network alone is trained (sparse, different masks), then frozen; the classifier and the pattern
    network are trained together. Cross samples carry another image's pattern and mask and keep their label, so that a
    trigger works on its own image only.
    """

    card = Card(
        title="Input-Aware",
        paper="Input-Aware Dynamic Backdoor Attack",
        year=2020,
        arxiv="2010.08138",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="A network makes another pattern for each image.",
        deviations=(
            "The pattern network's gradients are cleared after each step; the reference never clears them, so that its "
            "Adam sees their sum (compat='reference' does so).",
            "lambda_div weighs the diversity of masks once; the reference applies it twice (compat='reference' does "
            "so).",
            "Networks squash their output by two tanh, as the reference does; double_tanh=False is the paper's one.",
            "The classifier's schedule spans the epochs after the masks' (compat='reference' too).",
            "The mask network gets 25 epochs, as published, or a quarter of a recipe of less than 50; its learning "
            "rate falls after two and four fifths of them.",
            "Other images of cross samples are drawn, never the image itself; the reference pairs two loaders.",
            "A batch without poisoned samples has no diversity term; the reference's is not a number, without effect.",
            "Stored images are rounded from the triggered pixels; the reference normalises, denormalises and truncates "
            "(compat='reference' does so).",
            "The exported training set is drawn by the rules of poison-only attacks; the reference takes the first "
            "samples of every batch of an unshuffled pass (compat='reference' does so).",
            "Images whose sides do not halve evenly are taken too.",
        ),
    )

    class Config(BatchConfig):
        """Settings of Input-Aware.

        Args:
            cross_ratio: Cross samples for each poisoned one.
            clean_train_epochs: Epochs of the mask network at the start of the recipe's; None: 25, or a quarter of the
                recipe's if those are less than 50.
            mask_density: Mean of a mask that is not punished.
            lambda_norm: Weight of masks denser than that.
            lambda_div: Weight of the diversity of masks and of patterns.
            lr_generator: Learning rate of Adam for both networks.
            double_tanh: Squash the networks' output twice.
        """

        cross_ratio: float = Field(1.0, ge=0)
        clean_train_epochs: int | None = Field(None, ge=1)
        mask_density: float = Field(0.032, ge=0, le=1)
        lambda_norm: float = Field(100.0, ge=0)
        lambda_div: float = Field(1.0, ge=0)
        lr_generator: float = Field(0.01, gt=0)
        double_tanh: bool = True

        @model_validator(mode="after")
        def _check_shares(self) -> InputAware.Config:
            if self.ratio is not None and self.ratio * (1 + self.cross_ratio) > 1 + 1e-9:
                raise ValueError(
                    f"ratio * (1 + cross_ratio) must be at most 1, got {self.ratio * (1 + self.cross_ratio):.4g}"
                )
            return self

    config: Config
    learns_trigger = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        """Untrained networks; the training puts the trained ones in their place."""
        channels, height, width = data.image_size
        if min(height, width) < _SMALLEST:
            raise ValueError(f"{self.name}: images must be at least 16 x 16, got {height} x {width}")
        nets = {name: initial(build, self.name, name, seed) for name, build in self.networks(channels).items()}
        return {
            **{f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()},
            "mean": torch.tensor(data.mean).view(channels, 1, 1),
            "std": torch.tensor(data.std).view(channels, 1, 1),
        }

    def networks(self, channels: int) -> dict[str, Callable[[], nn.Module]]:
        """How the pattern network ``pattern`` and the mask network ``mask`` are built for images of C channels."""
        make = partial(Generator, channels, widths=widths_for(channels), double_tanh=self.config.double_tanh)
        return {"pattern": partial(make, outputs=channels), "mask": partial(make, outputs=1)}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        return self._put(images, images)

    def cover_rows(self, data: ImageSet, rows: Tensor, stage: Stage) -> Tensor:
        """Cross samples: each image under the pattern and the mask of another one of the set."""
        others = other_rows(rows, len(data), make_key("input_aware", self.seed, stage), data.ids[rows])
        return self._put(data.images[rows], data.images[others])

    def counts(self, batch: int, draw: float) -> tuple[int, int]:
        assert self.config.ratio is not None
        poison = poisoned_of(self.config.ratio, batch, draw)
        return poison, min(int(poison * self.config.cross_ratio), batch - poison)

    def cross_count(self, poison: int, total: int) -> int:
        return int(poison * self.config.cross_ratio)

    def program(self, rule: LabelRule) -> InputAwareProgram:
        return InputAwareProgram(self, rule)

    def mask_epochs(self, recipe: Recipe) -> int:
        """Epochs of the mask network.

        Raises:
            ValueError: if they leave none of the recipe's epochs for the classifier.
        """
        given = self.config.clean_train_epochs
        epochs = (25 if recipe.epochs >= 50 else max(1, round(recipe.epochs / 4))) if given is None else given
        if epochs >= recipe.epochs:
            raise ValueError(
                f"{self.name}: the recipe must have more epochs than the {epochs} of the mask network "
                f"(clean_train_epochs), got {recipe.epochs}"
            )
        return epochs

    def _put(self, images: Tensor, carriers: Tensor) -> Tensor:
        """``images`` under the patterns and masks of ``carriers``, both uint8 or both float."""
        mean, std = self.tensor("mean", images), self.tensor("std", images)
        exact = images.is_floating_point()
        x, other = (v.float() if exact else v.float() / 255 for v in (images, carriers))
        build = self.networks(images.shape[1])
        normalised = (other - mean) / std
        pattern = apply_network(build["pattern"], self.tensors, "pattern", normalised)
        mask = threshold(apply_network(build["mask"], self.tensors, "mask", normalised))
        if self.config.compat == "reference" and not exact:
            return truncated(blend_in((x - mean) / std, (pattern - mean) / std, mask), mean, std)
        out = blend_in(x, pattern, mask)
        return out.to(images.dtype) if exact else (out * 255).round().clamp(0, 255).to(torch.uint8)
