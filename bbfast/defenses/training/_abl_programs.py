"""The losses of Anti-Backdoor Learning, as programs of the training engine."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.training import Batch, EpochInfo, Program, predict

__all__ = ["Ascent", "AscentLimit", "AscentStopped", "Isolation", "isolation_loss", "sample_losses"]

_TRACED_EPOCHS = 5


def isolation_loss(
    each: Tensor, kind: str, *, flood: float = 0.5, gamma: float = 0.5, per_sample: bool = False
) -> Tensor:
    """The loss that keeps clean samples from being learned.

    Args:
        each: Cross-entropy of each sample, float ``[B]``.
        kind: ``flooding``: ``|l - flood| + flood``; ``lga``: ``sign(l - gamma) l``; ``l`` is the batch mean.
        flood: Flood level.
        gamma: Level of local gradient ascent.
        per_sample: ``lga`` on each sample's loss, then averaged.

    Source: Ishida et al., ICML 2020 (flooding); Li et al., NeurIPS 2021, eq. 4 (LGA).
    """
    if kind == "flooding":
        return (each.mean() - flood).abs() + flood
    value = each if per_sample else each.mean()
    return (torch.sign(value - gamma) * value).mean()


@torch.no_grad()
def sample_losses(model: nn.Module, data: ImageSet, device: torch.device | str) -> Tensor:
    """Cross-entropy of each sample with its given label: eval mode, no augmentation; float64 ``[N]`` on the CPU."""
    logits = predict(model, data, device=device)
    return F.cross_entropy(logits.double(), data.labels.to(logits.device), reduction="none")


class Isolation(Program):
    """Training under :func:`isolation_loss`.

    Args:
        settings: The settings of ABL.
    """

    graph_safe: ClassVar[bool] = True

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._losses: Tensor | None = None
        self._epochs = 0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.x)
        each = F.cross_entropy(logits.float(), batch.y, reduction="none")
        s = self._settings
        return isolation_loss(each, s.loss, flood=s.flood, gamma=s.gamma, per_sample=s.per_sample), logits

    def describe(self) -> dict[str, Any]:
        names = ("loss", "flood", "gamma", "per_sample", "loss_trace")
        return {**super().describe(), **{name: getattr(self._settings, name) for name in names}}

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        if self._settings.loss_trace and epoch >= self.recipe.epochs - _TRACED_EPOCHS:
            losses = sample_losses(model, self.train, self.device)
            self._losses = losses if self._losses is None else self._losses + losses
            self._epochs += 1
        return {}

    def traced(self) -> Tensor:
        """Mean loss of each sample over the last epochs, float64 ``[N]``."""
        assert self._losses is not None, "traced() is for a program that has run with loss_trace"
        return self._losses / self._epochs

    def state(self) -> dict[str, Tensor]:
        if self._losses is None:
            return {}
        return {"losses": self._losses, "epochs": torch.tensor(self._epochs)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self._losses, self._epochs = tensors["losses"].cpu(), int(tensors["epochs"])


class Ascent(Program):
    """Gradient ascent on the cross-entropy."""

    graph_safe: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.x)
        return -F.cross_entropy(logits.float(), batch.y), logits


class AscentStopped(Exception):
    """Not an error: carries the early end of the ascent out of the engine; the model is as it was then."""

    def __init__(self, epochs: int, rows: list[dict[str, Any]]) -> None:
        super().__init__(f"unlearned after {epochs} epochs")
        self.epochs, self.rows = epochs, rows


class AscentLimit:
    """Training callback that ends the ascent once the samples are forgotten.

    Args:
        data: The isolated samples.
        largest_loss: Mean cross-entropy above which they count as forgotten.
        num_classes: They also do when their accuracy falls below ``1 / num_classes``.
        device: Where to measure.
    """

    def __init__(self, data: ImageSet, largest_loss: float, num_classes: int, device: torch.device) -> None:
        self._data, self._largest, self._chance, self._device = data, largest_loss, 1 / num_classes, device
        self._rows: list[dict[str, Any]] = []

    def on_epoch_end(self, info: EpochInfo) -> None:
        """Raises :class:`AscentStopped` after the epoch in which the samples were forgotten."""
        logits = predict(info.model, self._data, device=self._device)
        labels = self._data.labels.cpu()
        accuracy = float((logits.argmax(dim=1) == labels).double().mean())
        loss = float(F.cross_entropy(logits.double(), labels))
        self._rows.append({**info.metrics, "isolated_acc": accuracy, "isolated_loss": loss})
        if accuracy < self._chance or loss > self._largest:
            raise AscentStopped(info.epoch + 1, self._rows)
