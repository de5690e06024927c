"""ASSET: a network taught to be indecisive about clean images, and to be wrong where a batch is unlike them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bbfast._progress import bar
from bbfast.data.imageset import ImageSet
from bbfast.defenses._content import content_order
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._frozen import Precision
from bbfast.defenses.detection._inspected import demand_role, finite_features
from bbfast.defenses.detection._outlyingness import adjusted_outlyingness, discriminate
from bbfast.defenses.features import FeatureReader, Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training._abl_programs import sample_losses
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, DivergedError
from bbfast.ops import gather_augment
from bbfast.training.device import choose_numerics, placed
from bbfast.training.runtime import deterministic, keep_freed_memory

__all__ = ["Asset", "Draw", "tail_threshold"]

_GROUP_VALUES = 1 << 26


@register_defense("asset")
class Asset(Defense):
    """Train a fresh network with two opposite aims, and read the loss off it.

    For each batch of the training set, beside a random batch of clean images:

    1. *Offset*: the variance over classes of the network's logits on the clean batch goes down (Adam).
    2. *Suspects*: a small network learns to tell the batch's features, by the suspected model, from the clean batch's;
       those of its outputs that lie beyond twice the whisker of a skew-adjusted boxplot are suspects.
    3. *Push*: if there are two suspects or more, their cross-entropy goes *up* (Adam of its own).

    Score: the cross-entropy of each sample with its given label in the end, eval mode. Clean samples, for which steps 1
    and 3 cancel, stay at about ``ln K``; poisoned ones are pushed up. Flagged above the point at which a normal density
    fitted to the lower half of the scores has fallen to ``density``.

    Step 2 depends on the suspected model alone, so its features come from one pass (``view.features``) and the small
    networks of many batches are trained as one stack. Batches, order and initial weights are drawn from the view's seed
    over an order of the images' pixels: storage order plays no part.

    **What it can see.** Poison whose features stand far out from the rest of a random batch, whatever the label; it is
    made for clean-label attacks too. Where they form a tail instead, or a tenth of the batch, the boxplot adjusts to
    that skew and step 2 suspects nobody: ``history`` has the number of suspects of each step, and scores without any
    are those of a network that has only forgotten.

    Source: Pan et al., USENIX Security 2023, arXiv 2302.11408; constants of BackdoorBench. Not copied from it: a
    misplaced parenthesis in the threshold (a product where the logarithm of a product belongs), features made anew 200
    times a batch in train mode (which also moves the suspected model's BatchNorm), true labels of poison in the
    scoring.
    """

    card = DefenseCard(
        title="ASSET",
        paper="Pan et al., ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep Learning Paradigms, "
        "USENIX Security 2023",
        year=2023,
        arxiv="2302.11408",
        kinds=("detection",),
        needs=frozenset({"model", "reserve", "poisoned_train", "fresh_model"}),
        summary="Trains a network to be indecisive about clean images and wrong about suspects, whose loss rises.",
        deviations=(
            "Features come from one pass in eval mode; the reference makes them anew in train mode at every step.",
            "The threshold is the paper's formula; the reference has a parenthesis in the wrong place.",
            "Clean images are test images that the evaluation does not use, as many for each class.",
            "A clean batch holds at most the whole reserve, without repetition.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of ASSET.

        Args:
            epochs: Passes over the training set.
            batch_size: Samples, and clean images, a step.
            lr: Learning rate of both optimisers of the network.
            discriminator_steps: Steps of the small network of each batch.
            discriminator_lr: Its learning rate.
            outlyingness: Adjusted outlyingness above which a sample is a suspect.
            density: Where the fitted normal density ends.
            reserve_per_class: Clean images of each class (2 % of CIFAR-10, CIFAR-100 and GTSRB, 1 % of Tiny ImageNet).
            precision: ``fp32``, ``bf16`` (autocast) or ``auto``: bf16 where the device and the model gain from it.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": {}}
        dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
            "cifar10": {"reserve_per_class": 100},
            "gtsrb": {"reserve_per_class": 18},
            "tiny_imagenet": {"reserve_per_class": 5},
            # Ours: six steps an epoch; 192 are about the 196 of CIFAR-10.
            "digits": {"epochs": 32},
        }

        epochs: int = Field(1, ge=1)
        batch_size: int = Field(256, ge=4)
        lr: float = Field(1e-4, gt=0)
        discriminator_steps: int = Field(100, ge=1)
        discriminator_lr: float = Field(1e-4, gt=0)
        outlyingness: float = Field(2.0, gt=0, allow_inf_nan=False)
        density: float = Field(1e-6, gt=0, allow_inf_nan=False)
        reserve_per_class: int = Field(10, ge=1)
        precision: Precision = "auto"

    def check(self, view: DefenderView) -> None:
        if len(view.reserve) < 2:
            raise DataRequirementError(f"asset takes at least 2 clean images, the reserve has {len(view.reserve)}")
        if len(view.poisoned_train) < 4:
            raise DataRequirementError(
                f"asset compares samples within a batch of at least 4, there are {len(view.poisoned_train)}"
            )
        demand_role(view)

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        return [FeatureReader("penultimate")] if source in ("poisoned_train", "reserve") else ()

    def run(self, view: DefenderView) -> DefenseResult:
        self.check(view)
        clock = time.perf_counter()
        given = view.poisoned_train
        order = content_order(given.images, given.labels)
        data, reserve = given.subset(order), view.reserve
        inner = content_order(reserve.images, reserve.labels)
        features = finite_features(view, "poisoned_train")[order]
        clean_features = finite_features(view, "reserve")[inner]
        read = time.perf_counter()
        model = view.fresh_model()
        history = self._train(view, model, data, reserve.subset(inner), features, clean_features)
        trained = time.perf_counter()
        losses = sample_losses(model, data, view.device)
        broken = int((~losses.isfinite()).sum())
        if broken:
            raise DivergedError(
                f"asset: the losses of {broken} of {len(data)} samples are NaN or infinite after {len(history)} steps; "
                "lower lr"
            )
        scores = torch.empty(len(data))
        scores[order.cpu()] = losses.float()
        limit, mean, deviation = tail_threshold(scores, self.config.density)
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores,
            flags=scores > limit,
            threshold=limit,
            history=history,
            info={
                "calibration": {
                    "rule": "normal tail of the lower half",
                    "density": self.config.density,
                    "mean": mean,
                    "deviation": deviation,
                    "clean": len(reserve),
                },
                "seconds": {
                    "features": read - clock,
                    "train": trained - read,
                    "score": time.perf_counter() - trained,
                },
            },
        )

    def _train(
        self,
        view: DefenderView,
        model: nn.Module,
        data: ImageSet,
        reserve: ImageSet,
        features: Tensor,
        clean_features: Tensor,
    ) -> list[dict[str, Any]]:
        cfg, device = self.config, view.device
        numerics = choose_numerics(cfg.precision, "auto", model, device)
        fixed = view.recipe is not None and view.recipe.deterministic
        offset, push = (torch.optim.Adam(model.parameters(), lr=cfg.lr) for _ in range(2))

        def logits(images: ImageSet, index: Tensor) -> Tensor:
            x = gather_augment(images.images, index, mean=view.mean, std=view.std, channels_last=numerics.channels_last)
            with numerics.autocast(device):
                return model(x).float()

        rows: list[dict[str, Any]] = []
        total = cfg.epochs * math.ceil(len(data) / cfg.batch_size)
        with (
            deterministic(fixed),
            placed(model, device, numerics.memory_format),
            keep_freed_memory(device),
            bar(view.method, total, view.progress) as shown,
        ):
            model.train()
            for draw, suspects in self._draws(view, features, clean_features):
                variance = logits(reserve, draw.clean).var(dim=1, correction=0).mean()
                _step(offset, variance)
                chosen = draw.index[suspects]
                if len(chosen) > 1:
                    _step(push, -F.cross_entropy(logits(data, chosen), data.labels[chosen]))
                rows.append({"step": len(rows), "clean_variance": float(variance.detach()), "suspects": len(chosen)})
                shown.advance()
        model.eval()
        return rows

    def _draws(self, view: DefenderView, features: Tensor, clean_features: Tensor) -> Iterator[tuple[Draw, Tensor]]:
        """Every batch of every epoch, and which of its samples are suspects: bool ``[B]``."""
        cfg, device = self.config, view.device
        generator = view.generator("asset discriminators")
        draws = _batches(
            len(features), len(clean_features), cfg.batch_size, cfg.epochs, view.generator("asset batches")
        )
        size = max(1, _GROUP_VALUES // (cfg.batch_size * (cfg.batch_size + 2 * features.shape[1])))
        for group in _alike(draws, size):
            moved = [Draw(draw.index.to(device), draw.clean.to(device)) for draw in group]
            said = discriminate(
                torch.stack([features[draw.index] for draw in moved]),
                torch.stack([clean_features[draw.clean] for draw in moved]),
                steps=cfg.discriminator_steps,
                lr=cfg.discriminator_lr,
                generator=generator,
            )
            yield from zip(moved, adjusted_outlyingness(said) > cfg.outlyingness, strict=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """One batch: positions in the training set and in the reserve, int64."""

    index: Tensor
    clean: Tensor


def _batches(n: int, clean: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Draw]:
    for _ in range(epochs):
        for index in torch.randperm(n, generator=generator).split(size):
            yield Draw(index, torch.randperm(clean, generator=generator)[:size])


def _alike(draws: Iterator[Draw], size: int) -> Iterator[list[Draw]]:
    """Runs of batches of one length, at most ``size`` at a time: what can be stacked."""
    group: list[Draw] = []
    for draw in draws:
        if group and (len(group) == size or len(draw.index) != len(group[0].index)):
            yield group
            group = []
        group.append(draw)
    if group:
        yield group


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def tail_threshold(scores: Tensor, density: float) -> tuple[float, float, float]:
    """Where a normal density, fitted to the lower half of the scores, has fallen to ``density``.

    Args:
        scores: ``[N]``, N >= 2, finite.
        density: In reciprocal units of the scores.

    Returns:
        Threshold, mean and standard deviation of the lower half. The mean is the threshold where the density is lower
        than ``density`` everywhere, or the deviation 0.
    """
    low = scores.double().sort().values[: (len(scores) + 1) // 2]
    mean, deviation = float(low.mean()), float(low.std(correction=0))
    scale = density * deviation * math.sqrt(2 * math.pi)
    if deviation == 0 or scale >= 1:
        return mean, mean, deviation
    return mean + deviation * math.sqrt(-2 * math.log(scale)), mean, deviation
