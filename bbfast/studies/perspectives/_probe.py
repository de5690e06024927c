"""Gradients of clean and poisoned samples while a model trains, and how far the backdoor is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.data.normalize import normalize
from bbfast.training import EpochInfo, StartInfo, StepInfo
from bbfast.training.prediction import evaluating

__all__ = ["COLUMNS", "GradientProbe", "mean_gradient"]

COLUMNS = ("at", "norm_clean", "norm_poison", "cosine", "loss_clean", "loss_poison", "c_acc", "asr", "base")
"""Of a probe's rows; ``at`` in epochs; ``base``: share of the images of ``asr`` that have the wanted label without the
trigger as well."""

_BATCH = 256


def mean_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Gradient of the mean cross-entropy in all trainable parameters, flat, and the loss; ``.grad`` stays as it is.

    The model's mode counts: with BatchNorm in training mode samples would not have gradients of their own.

    Args:
        model: On the device of ``x``.
        x: Normalised images ``[n, C, H, W]``.
        y: int64 ``[n]``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    loss = 0.0
    for start in range(0, len(x), _BATCH):
        part = slice(start, start + _BATCH)
        with torch.enable_grad():
            value = F.cross_entropy(model(x[part]).float(), y[part], reduction="sum")
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            if grad is not None:
                sum_ += grad
        loss += float(value.detach())
    return torch.cat([g.flatten() for g in total]) / len(x), loss / len(x)


class GradientProbe:
    """Callback that measures a fixed probe of stored training images at every epoch's end, and in the first epochs
    every few steps as well.

    The two groups are the probe's clean and its poisoned samples. Of each the gradient of its mean loss counts, in eval
    mode and float32: its norm, and the cosine between the two; besides C-Acc and ASR on as many test images, and how
    many of these are taken for the target without the trigger: early in training often all are, which is an ASR of
    100 % and no backdoor. A measurement takes ``2 n`` gradients and ``3 n`` passes, and leaves the run as it is.

    Args:
        n: Samples of each group, at most what there are.
        fine_epochs: First epochs that are measured every ``every`` steps.
        every: Steps; None is an eighth of an epoch (at 50,000 images and batches of 128 every 48).
        seed: Of the choice of samples.
    """

    def __init__(self, n: int = 512, fine_epochs: int = 2, every: int | None = None, seed: int = 0) -> None:
        self.n, self.fine_epochs, self.every, self.seed = n, fine_epochs, every, seed
        self.poisoned: Tensor | None = None
        self.rows: list[list[float]] = []

    def on_poisoned(self, flags: Tensor) -> None:
        """Which samples are poisoned."""
        self.poisoned = flags

    def on_start(self, info: StartInfo) -> None:
        """Choose the samples."""
        assert self.poisoned is not None, "stands behind Truth, which refuses"
        self.rows = []
        self._steps = info.steps
        self._every = self.every or max(1, info.steps // 8)
        groups = [(~self.poisoned).nonzero().flatten(), self.poisoned.nonzero().flatten()]
        self._groups = [self._chosen(info.train, rows.cpu(), f"train {i}") for i, rows in enumerate(groups)]
        assert info.test is not None and info.backdoor_test is not None, "an attack measures both"
        bad, place = info.backdoor_test, {number: i for i, number in enumerate(info.test.ids.tolist())}
        twins = torch.tensor([place[number] for number in bad.ids.tolist()]).to(bad.device)
        without = dataclasses.replace(info.test.subset(twins), labels=bad.labels)
        # The same draw for both of them: they are as many.
        self._tests = [self._chosen(images, torch.arange(len(images)), "test") for images in (info.test, bad, without)]

    def on_step(self, info: StepInfo) -> None:
        """Measure in the first epochs; the last step of an epoch is measured at its end."""
        epoch, step = info.batch.epoch, info.batch.step + 1
        if epoch < self.fine_epochs and step % self._every == 0 and step < self._steps:
            self._measure(info.model, epoch + step / self._steps)

    def on_epoch_end(self, info: EpochInfo) -> None:
        """Measure."""
        self._measure(info.model, info.epoch + 1.0)

    def _measure(self, model: nn.Module, at: float) -> None:
        with evaluating(model):
            (clean, loss_clean), (poison, loss_poison) = (mean_gradient(model, x, y) for x, y in self._groups)
            with torch.no_grad():
                shares = [_share(model, *test) for test in self._tests]
        norms = float(clean.norm()), float(poison.norm())
        cosine = float(clean @ poison) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")
        self.rows.append([at, *norms, cosine, loss_clean, loss_poison, *shares])

    def _chosen(self, images: ImageSet, rows: Tensor, tag: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed("gradient probe", self.seed, tag))
        picked = rows[torch.randperm(len(rows), generator=generator)[: self.n]].to(images.device)
        x = normalize(images.images[picked], images.mean, images.std)
        return x, images.labels[picked]

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        own = {key: getattr(self, key) for key in ("n", "fine_epochs", "every", "seed")}
        return {**own, "columns": list(COLUMNS)}

    def state(self) -> dict[str, Tensor]:
        """``rows``, f64 ``[measurements, 9]`` (:data:`COLUMNS`)."""
        return {"rows": torch.tensor(self.rows, dtype=torch.float64).view(-1, len(COLUMNS))}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.rows = tensors["rows"].tolist()


def _share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    def right() -> Iterator[Tensor]:
        for start in range(0, len(x), _BATCH):
            yield (model(x[start : start + _BATCH]).argmax(1) == y[start : start + _BATCH]).sum()

    return float(sum(right())) / max(len(x), 1)
