"""Input-Aware: a trigger made for each image (Nguyen and Tran, arXiv 2010.08138; spec/attacks section 12)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import keep_layout
from bbfast.attacks._batches import BatchAttack, BatchConfig, BatchProgram, other_rows, poisoned_of, truncated
from bbfast.attacks._input_aware_nets import Generator, threshold, widths_for
from bbfast.attacks._networks import TrainedNetwork, apply_network, initial, refuse_fp16
from bbfast.attacks.base import AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.attacks.randomness import integers, make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.training.recipe import Recipe

__all__ = ["InputAware", "InputAwareProgram", "blend_in", "distance"]

_SMALLEST = 16
_TINY = 1e-7


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


class InputAwareProgram(BatchProgram):
    """Trains the mask network, then classifier and pattern network together.

    Images are augmented before they are poisoned (the trigger is never cropped). A second image of each sample, for the
    masks' diversity and for cross samples, comes from an order and an augmentation of its own.
    """

    attack: InputAware

    def schedule_start(self, recipe: Recipe) -> int:
        return self.attack.mask_epochs(recipe)

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        refuse_fp16(recipe, self.attack.name)
        self.mask_epochs = self.attack.mask_epochs(recipe)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (train.mean, train.std))
        # New ones, whatever the attack holds: a run is a function of its seed.
        nets = {
            name: initial(build, self.attack.name, name, seed).to(device)
            for name, build in self.attack.networks(train.image_size[0]).items()
        }
        self.pattern, self.mask = (
            TrainedNetwork(
                name,
                net,
                torch.optim.Adam(net.parameters(), lr=c.lr_generator, betas=(0.5, 0.9)),
                accumulate=c.compat == "reference" and name == "pattern",
            )
            for name, net in nets.items()
        )
        self.attack.tensors = {**self.attack.tensors, **self.pattern.tensors(), **self.mask.tensors()}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        super().epoch_start(epoch, steps, batch_size)
        self.masking = epoch < self.mask_epochs
        self.mask.network.train(self.masking)
        self.pattern.network.train(not self.masking)
        # As published: after 10 and 20 of 25 epochs.
        self.mask.set_lr(self.attack.config.lr_generator * 0.1 ** int(5 * epoch / (2 * self.mask_epochs)))
        self.batch_size, self.density, self.steps = batch_size, torch.zeros((), device=self.device), steps
        generator = torch.Generator().manual_seed(derive_seed("input_aware order", self.seed, epoch))
        self.order = torch.randperm(len(self.train), generator=generator).to(self.device)

    def make_batch(self, batch: Batch) -> Batch:
        if self.masking:
            self.other = self._second(batch, slice(None))
            return batch
        self.poison, self.cross, labels, role = self.roles(batch)
        self.other = self._second(batch, slice(self.poison, self.poison + self.cross))
        return batch.replace(y=labels, role=role)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return (self._mask_loss(batch.x), None) if self.masking else self._joint_loss(model, batch)

    def after_step(self, model: nn.Module) -> None:
        (self.mask if self.masking else self.pattern).step()

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        return {"mask_density": float(self.density) / self.steps} if self.masking else {}

    def state(self) -> dict[str, Tensor]:
        return {**self.pattern.state(), **self.mask.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for network in (self.pattern, self.mask):
            network.load_state(tensors)

    def _mask_loss(self, x: Tensor) -> Tensor:
        c = self.attack.config
        masks, others = (threshold(self.mask.network(v)) for v in (x, self.other))
        diversity = (distance(x, self.other) / (distance(masks, others) + _TINY)).mean()
        dense = (masks - c.mask_density).relu().mean()
        self.density += masks.detach().mean()
        weight = c.lambda_div**2 if c.compat == "reference" else c.lambda_div
        return c.lambda_norm * dense + weight * diversity

    def _joint_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        x, end = batch.x, self.poison + self.cross
        if not end:
            return super().loss(model, batch)
        own, receiving = x[: self.poison], x[self.poison : end]
        pattern, changed = self._trigger(own, own)
        parts, diversity = [changed], None
        if self.cross:
            other_pattern, crossed = self._trigger(receiving, self.other)
            parts.append(crossed)
            n = min(self.poison, self.cross)
            apart = distance(pattern[:n], other_pattern[:n]) + _TINY
            diversity = (distance(own[:n], self.other[:n]) / apart).mean()
        made = keep_layout(torch.cat([*parts, x[end:]]), x)
        loss, logits = super().loss(model, batch.replace(x=made))
        return (loss if diversity is None else loss + self.attack.config.lambda_div * diversity), logits

    def _trigger(self, images: Tensor, carriers: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised patterns of the carriers, and the images under them."""
        pattern = (self.pattern.network(carriers) - self.mean) / self.std
        with torch.no_grad():
            mask = threshold(self.mask.network(carriers))
        return pattern, blend_in(images, pattern, mask)

    def _second(self, batch: Batch, part: slice) -> Tensor:
        """The second images of some of a batch's positions, normalised."""
        start = batch.step * self.batch_size
        index = self.order[start : start + len(batch)][part]
        key, r = ("input_aware second", self.seed, batch.epoch), self.recipe
        offset = flip = None
        if r.augment and r.padding:
            offset = integers(make_key(*key, "crop"), index, (2,), 0, 2 * r.padding)
        if r.augment and r.flip:
            flip = uniform(make_key(*key, "flip"), index) < 0.5
        return ops.gather_augment(
            self.train.images,
            index,
            offset=offset,
            flip=flip,
            padding=r.padding if offset is not None else 0,
            mean=self.train.mean,
            std=self.train.std,
            dtype=batch.x.dtype,
            channels_last=keep_layout(batch.x[:1], batch.x).is_contiguous(memory_format=torch.channels_last),
        )


def blend_in(x: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """``x + (pattern - x) * mask``, ``[B, C, H, W]`` and mask ``[B, 1, H, W]``."""
    return x + (pattern - x) * mask


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root of the mean squared difference of each pair, ``[B]``; without gradient where it vanishes."""
    return (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-12).sqrt()
