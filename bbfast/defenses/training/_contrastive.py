"""Contrastive training of a network without its classifier: losses, projection heads, and the program they share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import naming
from bbfast.defenses.training._views import Views
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError
from bbfast.models import features, roles
from bbfast.training import Batch, Program, Recipe, TrainResult, train

__all__ = ["Contrast", "Encoder", "SimClr", "SupCon", "classifier", "nt_xent", "pretrain", "supcon"]

_WIDTH = 128


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """How badly the other view of an image is told from all other views, in nats.

    Anchors are the first views, positives the second ones; the denominator has both views of all but the anchor itself.

    Args:
        first: Unit vectors float32 ``[B, d]``.
        second: The same images' other views.
        temperature: Divides the cosines.

    Source: Chen et al., SimCLR, ICML 2020, eq. 1, one direction of it, as Huang et al. (ICLR 2022) code it.
    """
    alike = (first @ torch.cat([first, second]).T) / temperature
    alike = alike.masked_fill(_self(len(first), len(second), alike), -torch.inf)
    positive = (first * second).sum(dim=1) / temperature
    return (alike.logsumexp(dim=1) - positive).mean()


def supcon(
    both: Tensor, labels: Tensor, clean: Tensor, temperature: float, base_temperature: float, strict: bool = False
) -> Tensor:
    """Supervised contrast among the samples held to be clean; the others have only their own other view.

    Positives of a clean anchor are its other view and all views of samples with its label, of suspicious ones too
    unless ``strict``.

    Args:
        both: Unit vectors float32 ``[2 B, d]``, all first views, then all second ones.
        labels: int64 ``[B]``.
        clean: bool ``[B]``.
        temperature: Divides the cosines.
        base_temperature: The loss is multiplied by ``temperature / base_temperature``.
        strict: Only clean samples are positives of a clean one.

    Source: Khosla et al., NeurIPS 2020, eq. 2; Chen, Wu and Wang, NeurIPS 2022, section 4.2.
    """
    n = len(labels)
    positive = (labels[:, None] == labels) & clean[:, None]
    if strict:
        positive &= clean
    positive |= torch.eye(n, dtype=torch.bool, device=labels.device)
    own = _self(2 * n, 0, both)
    positive = positive.repeat(2, 2) & ~own
    alike = (both @ both.T) / temperature
    rest = alike.masked_fill(own, -torch.inf).logsumexp(dim=1)
    mean = alike.masked_fill(~positive, 0.0).sum(dim=1) / positive.sum(dim=1)
    return (rest - mean).mean() * (temperature / base_temperature)


def _self(anchors: int, others: int, like: Tensor) -> Tensor:
    """bool ``[anchors, anchors + others]``: where an anchor meets itself."""
    return torch.eye(anchors, anchors + others, dtype=torch.bool, device=like.device)


def classifier(model: nn.Module, method: str) -> nn.Linear:
    """The last layer, whose input is the feature.

    Raises:
        UnsupportedModelError: if the model has none, or it is not linear.
    """
    found = roles(model)
    layer = found.module("classifier")
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(method, found.label, "its classifier is not one linear layer")
    return layer


class Encoder(nn.Module):
    """A network up to its classifier, and a projection to unit vectors of 128 numbers.

    Args:
        model: The network; trained in place.
        norm: Whether the projection normalises its hidden layer (BatchNorm), as DBD's does and D-ST's does not.
        seed: Of the projection's first weights.
        method: Who asks, for messages.
    """

    def __init__(self, model: nn.Module, norm: bool, seed: int, method: str) -> None:
        super().__init__()
        layer = classifier(model, method)
        self.model = model
        width = layer.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
            self.head = nn.Sequential(*hidden, nn.Linear(width, _WIDTH)).to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[B, C, H, W]`` to unit vectors float32 ``[B, 128]``."""
        read = features(self.model, x, "penultimate").flatten(1)
        return F.normalize(self.head(read).float(), dim=1)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Learning rate: a line from ``warmup_from`` over ``warmup_epochs``, then a cosine from ``lr`` to ``end``.

    Args:
        lr: First rate of the cosine.
        end: Its last.
        t_max: Its half period, in epochs.
        warmup_epochs: Epochs of the line, changed every step; it ends where the cosine is by then. 0 for none.
        warmup_from: First rate of the line.
    """

    lr: float
    t_max: int
    end: float = 0.0
    warmup_epochs: int = 0
    warmup_from: float = 0.0

    def __call__(self, epoch: int, share: float) -> float:
        """Of a step ``share`` of the way through ``epoch``."""
        if epoch < self.warmup_epochs:
            top = self._cosine(self.warmup_epochs)
            return self.warmup_from + (epoch + share) / self.warmup_epochs * (top - self.warmup_from)
        return self._cosine(epoch)

    def _cosine(self, epoch: int) -> float:
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * epoch / self.t_max)) / 2


class Contrast(Program):
    """Two random views of each image go through an :class:`Encoder` in one pass; a subclass compares them.

    Args:
        views: Makes a view.
        rate: Learning rate.
    """

    augments_itself: ClassVar[bool] = True
    classifies: ClassVar[bool] = False

    def __init__(self, views: Views, rate: Rate) -> None:
        self._views, self._rate = views, rate

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "views": dataclasses.asdict(self._views), "rate": dataclasses.asdict(self._rate)}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._steps = steps

    def make_batch(self, batch: Batch) -> Batch:
        # Not of batch.x: the views are of pixels.
        images = self.train.images[batch.index]
        x = torch.cat([self._views(images), self._views(images)])
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.train.mean, self.train.std))
        self._lr = self._rate(batch.epoch, batch.step / self._steps)
        x = (x - mean) / std
        if batch.x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return batch.replace(x=x)

    def after_backward(self, model: nn.Module) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr


class SimClr(Contrast):
    """:func:`nt_xent`; labels play no part.

    Args:
        views: Makes a view.
        rate: Learning rate.
        temperature: See :func:`nt_xent`.
    """

    def __init__(self, views: Views, rate: Rate, temperature: float) -> None:
        super().__init__(views, rate)
        self._temperature = temperature

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "temperature": self._temperature}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        first, second = model(batch.x).chunk(2)
        return nt_xent(first, second, self._temperature), None


class SupCon(Contrast):
    """:func:`supcon` with the given labels.

    Args:
        views: Makes a view.
        rate: Learning rate.
        clean: bool ``[N]``, which training samples are held to be clean.
        temperature: See :func:`supcon`.
        base_temperature: Likewise.
        strict: Likewise.
    """

    def __init__(
        self, views: Views, rate: Rate, clean: Tensor, temperature: float, base_temperature: float, strict: bool
    ) -> None:
        super().__init__(views, rate)
        self._clean, self._settings = clean, (temperature, base_temperature, strict)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "clean": content_hash({"clean": self._clean}), "settings": self._settings}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._clean = self._clean.to(device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        return supcon(model(batch.x), batch.y, self._clean[batch.index], *self._settings), None


def pretrain(
    view: DefenderView, encoder: Encoder, data: ImageSet, recipe: Recipe, program: Contrast, folder: Any, remedy: str
) -> TrainResult:
    """Train ``encoder`` in place by ``program``.

    Args:
        view: For seed, device and progress.
        encoder: What to train.
        data: In an order that storage has no part in.
        recipe: How to train; the rate is the program's.
        program: Makes views and compares them.
        folder: For the checkpoint, which stays there when the training is done; None keeps none.
        remedy: What to do when the loss stops being finite.

    Raises:
        DivergedError: if it does.
    """
    with naming(view.method, "contrast", remedy):
        return train(
            encoder,
            data,
            recipe,
            seed=view.derive_seed("ssl"),
            device=view.device,
            program=program,
            checkpoint=folder,
            progress=view.progress,
            description=f"{view.method} contrast",
        )
