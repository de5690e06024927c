"""The training of Input-Aware: mask network first, then classifier and pattern network together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import keep_layout
from bbfast.attacks._batches import BatchProgram
from bbfast.attacks._input_aware_nets import blend_in, distance, threshold
from bbfast.attacks._networks import TrainedNetwork, initial, refuse_fp16
from bbfast.attacks.randomness import integers, make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.training.recipe import Recipe

if TYPE_CHECKING:
    from bbfast.attacks.input_aware import InputAware

__all__ = ["InputAwareProgram"]

_TINY = 1e-7


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
