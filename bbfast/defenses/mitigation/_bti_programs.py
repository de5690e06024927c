"""The trainings of BTI-DBF: generators against a frozen model, and the model against a generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses.mitigation._split import Split
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.program import Batch, Program, derive_seed

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["Identity", "Inversion", "Purification", "Unlearning", "with_triggers"]


class _Phase(Program):
    """One of several trainings of the same network, whose optimiser goes on where the last one left it.

    Args:
        adam: What :meth:`kept` of the last one gave.
        **others: Networks it works with, by name.
    """

    classifies: ClassVar[bool] = False

    def __init__(self, adam: dict[str, Tensor], **others: nn.Module) -> None:
        self._adam, self._others = adam, others

    def describe(self) -> dict[str, Any]:
        hashes = {name: content_hash(dict(net.state_dict())) for name, net in self._others.items()}
        return {**super().describe(), "networks": hashes, "adam": content_hash(self._adam)}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        if self._adam:
            load_optimizer_state(self.optimizer, self._adam)

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._tally: dict[str, Tensor] = {}
        self._steps = steps

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        return {name: float(total) / self._steps for name, total in self._tally.items()}

    def kept(self) -> dict[str, Tensor]:
        """The optimiser's state after the training; that of before if there was none."""
        return optimizer_state(self.optimizer) if hasattr(self, "optimizer") else self._adam

    def _note(self, **parts: Tensor) -> None:
        for name, value in parts.items():
            self._tally[name] = self._tally.get(name, 0) + value.detach()


class Identity(_Phase):
    """A generator learns to give its images back, as the model sees them.

    Args:
        split: The frozen model.
    """

    def __init__(self, split: Split) -> None:
        super().__init__({}, model=split.model)
        self._split = split

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        made = model(batch.x)
        with torch.no_grad():
            z, logits = self._split.both(batch.x)
        z_made, logits_made = self._split.both(made)
        prediction = F.cross_entropy(logits_made.float(), logits.float().softmax(dim=1))
        feature, image = F.mse_loss(z_made.float(), z.float()), F.mse_loss(made.float(), batch.x)
        self._note(image_mse=image, feature_mse=feature)
        return prediction + feature + torch.where(image > 0.1, 100.0, 0.01) * image, None


class Inversion(_Phase):
    """A generator learns to move the features that are not benign, within bounds of the images and the benign ones.

    Args:
        split: The frozen model.
        mask: Weights of the benign features, ``[1, ...]``.
        target: Class that the images must be taken for; None asks for none.
        purifier: Network that its images go through before the model sees them; None is none.
        image_bound: Mean squared change of normalised images above which nothing but that change counts.
        feature_bound: The same for the benign features.
        adam: See :class:`_Phase`.
    """

    def __init__(
        self,
        split: Split,
        mask: Tensor,
        target: int | None,
        purifier: nn.Module | None,
        *,
        image_bound: float,
        feature_bound: float,
        adam: dict[str, Tensor],
    ) -> None:
        super().__init__(adam, model=split.model, **({} if purifier is None else {"purifier": purifier}))
        self._split, self._mask, self._target, self._purifier = split, mask, target, purifier
        self._bounds = (image_bound, feature_bound)

    def describe(self) -> dict[str, Any]:
        mask = content_hash({"mask": self._mask})
        return {**super().describe(), "mask": mask, "target": self._target, "bounds": list(self._bounds)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        made = model(batch.x)
        if self._purifier is not None:
            made = self._purifier(made)
        with torch.no_grad():
            z = self._split.features(batch.x).float()
        z_made, logits = self._split.both(made)
        change = z_made.float() - z
        benign = (self._mask * change).square().mean()
        other = ((1 - self._mask) * change).square().mean()
        image = F.mse_loss(made.float(), batch.x)
        outside = (image > self._bounds[0]) | (benign > self._bounds[1])
        value = torch.where(outside, image, 0.01 * benign - other)
        if self._target is not None:
            value = value + F.cross_entropy(logits.float(), torch.full_like(batch.y, self._target))
        self._note(image_mse=image, benign_mse=benign, other_mse=other)
        return value, None


@torch.no_grad()
def with_triggers(batch: Batch, generator: nn.Module, share: float, seed: int) -> Tensor:
    """The images of a batch, ``int(share * B) + 1`` of them replaced by the generator's."""
    n = len(batch)
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(derive_seed("carriers", seed, batch.epoch, batch.step))
    )
    chosen = order[: min(int(share * n) + 1, n)].to(batch.x.device)
    x = batch.x.clone()
    x[chosen] = generator(batch.x[chosen]).to(x.dtype)
    return x


class Unlearning(_Phase):
    """The model learns the true labels of images some of which carry the trigger, with the features of clean ones.

    Args:
        layer: Where the model is split.
        generator: Puts the trigger on images.
        share: Part of a batch that carries it.
        adam: See :class:`_Phase`.
    """

    classifies: ClassVar[bool] = True

    def __init__(self, layer: str, generator: nn.Module, share: float, adam: dict[str, Tensor]) -> None:
        super().__init__(adam, generator=generator)
        self._layer, self._generator, self._share = layer, generator, share

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "layer": self._layer, "share": self._share}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        mixed = with_triggers(batch, self._generator, self._share, self.seed)
        split = Split(model, self._layer)
        z = split.features(batch.x).float()
        z_mixed, logits = split.both(mixed)
        feature = F.mse_loss(z, z_mixed.float())
        self._note(feature_mse=feature)
        return F.cross_entropy(logits.float(), batch.y) + feature, logits


class Purification(_Phase):
    """A purifier learns to give clean images back, of images with noise some of which carry the trigger.

    Args:
        split: The frozen model.
        generator: Puts the trigger on images.
        share: Part of a batch that carries it.
        noise: Deviation of the noise on normalised images.
        image_bound: Mean squared change of normalised images above which it weighs a hundred times as much.
        adam: See :class:`_Phase`.
    """

    def __init__(
        self,
        split: Split,
        generator: nn.Module,
        *,
        share: float,
        noise: float,
        image_bound: float,
        adam: dict[str, Tensor],
    ) -> None:
        super().__init__(adam, model=split.model, generator=generator)
        self._split, self._generator = split, generator
        self._share, self._noise, self._bound = share, noise, image_bound

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": [self._share, self._noise, self._bound]}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        mixed = with_triggers(batch, self._generator, self._share, self.seed)
        drawn = torch.Generator().manual_seed(derive_seed("noise", self.seed, batch.epoch, batch.step))
        noise = torch.randn(mixed.shape, generator=drawn).to(mixed)
        made = model(mixed + self._noise * noise)
        with torch.no_grad():
            z = self._split.features(batch.x).float()
        z_made, logits = self._split.both(made)
        image, feature = F.mse_loss(made.float(), batch.x), F.mse_loss(z_made.float(), z)
        self._note(image_mse=image, feature_mse=feature)
        value = F.cross_entropy(logits.float(), batch.y) + feature
        return value + torch.where(image > self._bound, 100.0, 1.0) * image, None
