"""Sample sensitivity of D-BR and D-ST: how far an image's features move when it is turned and shifted."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses._content import content_keys, content_order
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses._draws import Draws
from bbfast.defenses._rows import pack, unpack
from bbfast.defenses.base import DefenseConfig
from bbfast.defenses.features import extract_features
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, DivergedError
from bbfast.models import features, roles
from bbfast.models.state import model_state
from bbfast.training import Batch, Program, train

__all__ = ["FctConfig", "Sensitivity", "Separation", "check_fct", "sensitivity", "separation_loss", "turned"]

_CHUNK = 4096


class FctConfig(DefenseConfig):
    """Settings of the sample distinguishment that D-BR and D-ST share.

    Args:
        train_epochs: Epochs of cross-entropy on the poisoned set.
        sep_epochs: Epochs of :func:`separation_loss` after them.
        sd_lr: Learning rate of both.
        sd_weight_decay: L2 penalty of both.
        batch_size: Samples a step.
        rotate: Largest angle of the random rotation, in degrees, either way.
        translate: Largest shift, as part of each side.
        views: Random turns of each image whose changes are averaged; 1 as in the paper.
        alpha_clean: Part of the set, the least sensitive, that counts as clean.
        alpha_poison: Part of the set, the most sensitive, that counts as poisoned.
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: 1,442 images are 11 steps an epoch, after two of which a fifth to two fifths of the set are fitted. As
        # abl's row; 460 steps, where two epochs of CIFAR-10 have 782.
        "digits": {"batch_size": 64, "train_epochs": 20},
    }

    train_epochs: int = Field(2, ge=0)
    sep_epochs: int = Field(10, ge=0)
    sd_lr: float = Field(0.01, gt=0)
    sd_weight_decay: float = Field(5e-4, ge=0)
    batch_size: int = Field(128, ge=2)
    rotate: float = Field(180.0, ge=0, le=180)
    translate: float = Field(0.2, ge=0, le=1)
    views: int = Field(4, ge=1)
    alpha_clean: float = Field(0.20, gt=0, lt=1)
    alpha_poison: float = Field(0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _disjoint(self) -> FctConfig:
        if self.alpha_clean + self.alpha_poison > 1:
            raise ValueError(
                f"alpha_clean + alpha_poison must be at most 1, got {self.alpha_clean} + {self.alpha_poison}"
            )
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """What sample distinguishment gives, in the order of the training set and on the CPU.

    Args:
        scores: float32 ``[N]``, mean squared change of the features; higher is more suspicious.
        clean: bool ``[N]``, the ``int(alpha_clean N)`` lowest.
        poisoned: bool ``[N]``, the ``int(alpha_poison N)`` highest; the rest is uncertain.
        history: One dict an epoch.
        seconds: Of all that, or of finding it in the run's store.
    """

    scores: Tensor
    clean: Tensor
    poisoned: Tensor
    history: list[dict[str, Any]]
    seconds: float


def check_fct(view: DefenderView, config: FctConfig) -> None:
    """For ``check``.

    Raises:
        DataRequirementError: if no sample would be called clean or poisoned.
        UnsupportedModelError: if the model cannot be built anew or has no penultimate layer.
    """
    n = len(view.poisoned_train)
    short = min(config.alpha_clean, config.alpha_poison)
    if int(short * n) < 1:
        raise DataRequirementError(
            f"{view.method} sets apart at least 1 sample, but {short} (alpha_clean, alpha_poison) of {n} training "
            "samples is none"
        )
    roles(view.fresh_model(empty=True)).names("penultimate")


def sensitivity(view: DefenderView, config: FctConfig) -> Sensitivity:
    """Train a model whose poisoned samples are sensitive, and measure how sensitive each sample is.

    1. A fresh model, without augmentation: ``train_epochs`` of cross-entropy, then ``sep_epochs`` of
       :func:`separation_loss` on the penultimate features; one optimiser throughout.
    2. ``FCT(x)``: mean over ``views`` random turns ``tau`` and over features of ``(f(x) - f(tau(x)))^2``, eval mode.
       ``tau`` turns the image by up to ``rotate`` degrees, then shifts it by whole pixels; nearest pixel, black ground.

    ``tau`` is a function of the image's pixels and the seed, drawn once: thresholds and split are of the same scores.
    Training goes through the images in an order of their pixels. The result does not depend on storage order. What
    D-BR has made on the same data with the same settings D-ST finds in the run's store, and the other way round.

    Args:
        view: Grants ``poisoned_train`` and ``fresh_model``.
        config: Settings.

    Raises:
        DivergedError: if the training fails, or a feature is NaN after it.

    Source: Chen, Wu and Wang, NeurIPS 2022, section 4.1; the loss as the authors code it. Not copied from
    BackdoorBench: scores drawn anew for the split, in shuffled order; constants in place of the settings; other
    normalisation than the model's; one sample at a time.
    """
    given = view.poisoned_train
    order = content_order(given.images, given.labels)
    data, start = given.subset(order), time.perf_counter()
    recipe = sgd_recipe(view, config.batch_size, config.sd_weight_decay).replace(
        epochs=config.train_epochs + config.sep_epochs, lr=config.sd_lr, augment=False, compile=False
    )
    remedy = lower(config, "sd_lr")
    model = view.fresh_model()
    program = Separation(config.train_epochs, view.num_classes)

    def make(folder: Path) -> dict[str, Tensor]:
        with naming(view.method, "sensitivity", remedy):
            done = train(
                model,
                data,
                recipe,
                seed=view.seed,
                device=view.device,
                program=program,
                checkpoint=folder,
                progress=view.progress,
                description=f"{view.method} sensitivity",
            )
        changes = feature_changes(done.model, data, view, config)
        broken = int((~changes.isfinite()).sum())
        if broken:
            raise DivergedError(
                f"{view.method}, sensitivity: the features of {broken} of {len(data)} samples are NaN or infinite "
                f"after {recipe.epochs} epochs",
                remedy,
            )
        return {"changes": changes, **pack(done.history)}

    settings = {
        "data": content_hash({"images": data.images, "labels": data.labels}),
        "normalisation": [data.mean, data.std],
        # Two architectures may have the same weights.
        "model": roles(model).label,
        "start": content_hash(model_state(model)),
        "recipe": recipe.model_dump(mode="json"),
        "program": program.describe(),
        "turns": [config.views, config.rotate, config.translate],
    }
    history, found = unpack(view.obtain("fct", settings, make, seed=view.seed))
    changes = found["changes"]
    n = len(data)
    rank = changes.argsort(stable=True)
    clean, poisoned = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
    clean[rank[: int(config.alpha_clean * n)]] = True
    poisoned[rank[n - int(config.alpha_poison * n) :]] = True
    back = order.cpu().argsort()
    return Sensitivity(
        changes[back],
        clean[back],
        poisoned[back],
        history,
        time.perf_counter() - start,
    )


def feature_changes(model: nn.Module, data: ImageSet, view: DefenderView, config: FctConfig) -> Tensor:
    """FCT of each sample, float32 ``[N]`` on the CPU."""

    def read(images: Tensor) -> Tensor:
        return extract_features(model, images, "penultimate", view.mean, view.std, view.device)

    found = []
    for images in data.images.to(view.device).split(_CHUNK):
        draws = Draws(content_keys(images), view.derive_seed("fct"))
        plain = read(images)
        # Summed in a fixed order: more views add to fewer, and draw nothing anew.
        total = torch.zeros(len(images), device=plain.device)
        for i in range(config.views):
            total += (
                (plain - read(turned(images, draws, f"view {i}", config.rotate, config.translate))).square().mean(1)
            )
        found.append((total / config.views).cpu())
    return torch.cat(found)


def turned(images: Tensor, draws: Draws, tag: str, rotate: float, translate: float) -> Tensor:
    """Each image turned about its centre, then shifted; nearest pixel, black where there is none.

    What leaves the image in the turn does not come back in the shift, as with torchvision's RandomRotation and
    RandomAffine one after the other.

    Args:
        images: uint8 ``[N, C, H, W]``.
        draws: Random numbers of the images.
        tag: Name of the stream.
        rotate: Largest angle, in degrees, either way.
        translate: Largest shift, as part of each side; whole pixels are shifted.

    Returns:
        uint8 ``[N, C, H, W]``, new memory.
    """
    n, c, height, width = images.shape
    u = draws.uniform(tag, 3).double().mul_(2).sub_(1)
    angle = (u[:, 0] * (rotate * math.pi / 180))[:, None, None]
    dx, dy = (u[:, 1, None] * (translate * width)).round(), (u[:, 2, None] * (translate * height)).round()
    column = torch.arange(width, device=images.device) - dx
    row = torch.arange(height, device=images.device) - dy
    x, y = (column - (width - 1) / 2)[:, None], (row - (height - 1) / 2)[:, :, None]
    source_x = (angle.cos() * x - angle.sin() * y + (width - 1) / 2).round().long()
    source_y = (angle.sin() * x + angle.cos() * y + (height - 1) / 2).round().long()
    inside = ((column >= 0) & (column < width))[:, None] & ((row >= 0) & (row < height))[:, :, None]
    inside = inside & (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    place = (source_y * width + source_x).where(inside, 0).view(n, 1, -1).expand(-1, c, -1)
    return images.flatten(2).gather(2, place).mul_(inside.view(n, 1, -1)).view_as(images)


class Separation(Program):
    """Cross-entropy for some epochs, then :func:`separation_loss`; the classifier rests in the latter.

    Args:
        train_epochs: Epochs of cross-entropy.
        num_classes: Number of classes K.
    """

    def __init__(self, train_epochs: int, num_classes: int) -> None:
        self._train_epochs, self._num_classes = train_epochs, num_classes

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "train_epochs": self._train_epochs}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if batch.epoch < self._train_epochs:
            return super().loss(model, batch)
        read = features(model, batch.x, "penultimate")
        return separation_loss(read.flatten(1).float(), batch.y, self._num_classes), None


def separation_loss(read: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How alike the classes' centres are: the mean over the matrix of their cosines, its diagonal set to 0.

    Called intra-class by the paper; it is between classes, in the authors' code too.

    Args:
        read: Features float32 ``[B, d]``.
        labels: int64 ``[B]``.
        num_classes: Number of classes; those without a sample in the batch do not count.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    sums = read.new_zeros(num_classes, read.shape[1]).index_add(0, labels, read)
    # A class without samples keeps a centre of 0: no cosine, no gradient.
    centres = F.normalize(sums / counts.clamp(min=1)[:, None], dim=1)
    alike = centres @ centres.T
    return (alike.sum() - alike.diagonal().sum()) / (counts > 0).sum().square()
