"""What a training run does with each sample: loss, correctness and forgetting, without another forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.training.callbacks import EpochInfo, StartInfo, StepInfo
from bbfast.training.device import Numerics
from bbfast.training.prediction import outputs

__all__ = ["NEVER", "Forgetting", "SampleRecorder"]

NEVER = 65535
"""``learned_at`` of a sample that was never right."""

_HELD = 1 << 22
"""Logits that are held before they are counted: 16 MiB."""
_BATCH = 512


@dataclasses.dataclass(eq=False)
class Forgetting:
    """Counters of N samples over their presentations.

    Args:
        last: Whether the last presentation was right, bool ``[N]``.
        events: Times that a sample was right and at its next presentation wrong, int32 ``[N]``, at most 65535.
        learned_at: Epoch of the first right presentation, int32 ``[N]``; 65535 (:data:`NEVER`): never.

    Source: Toneva et al., ICLR 2019, arXiv 1812.05159, section 3.
    """

    last: Tensor
    events: Tensor
    learned_at: Tensor

    @classmethod
    def of(cls, count: int, device: torch.device | str = "cpu") -> Forgetting:
        """Counters of ``count`` samples that have not been seen."""
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        return cls(zeros.bool(), zeros, torch.full_like(zeros, NEVER))

    def add(self, index: Tensor, correct: Tensor, epoch: int) -> None:
        """Count presentations, in place.

        Args:
            index: Samples in the order of their presentation, int64 ``[M]``; may repeat.
            correct: Whether each was right, bool ``[M]``.
            epoch: Their epoch.
        """
        for part in _rounds(index):
            where, now = index[part], correct[part]
            before = self.last[where]
            self.events[where] = (self.events[where] + (before & ~now)).clamp(max=NEVER)
            first = self.learned_at[where]
            learned = torch.full_like(first, min(epoch, NEVER - 1))
            self.learned_at[where] = torch.where((first == NEVER) & now, learned, first)
            self.last[where] = now


def _rounds(index: Tensor) -> Iterator[Tensor]:
    """Positions of the first occurrence of every value of ``index``, then those of the second, and so on."""
    order = index.argsort(stable=True)
    own = index[order]
    begins = torch.ones_like(own, dtype=torch.bool)
    begins[1:] = own[1:] != own[:-1]
    place = torch.arange(len(own), device=own.device)
    rank = place - torch.where(begins, place, 0).cummax(0).values if len(own) else place
    for turn in range(int(rank.max()) + 1 if len(own) else 0):
        yield order[rank == turn]


class SampleRecorder:
    """Keeps loss and correctness of every training sample in every epoch, and the counters of forgetting.

    A callback of :func:`bbfast.train` and :func:`bbfast.attack`. In mode ``train`` it reads the logits that the
    training has computed anyway, of the augmented images and before the step; they are held for up to an epoch and
    counted in one go, so a step costs one copy of its logits. Correct means: the label that the learner was given. What
    it keeps is part of a checkpoint, so a run that was killed goes on with it.

    A sample that an epoch does not present (``drop_last``) keeps its last bit, and its loss is NaN.

    Args:
        mode: ``train``; or ``eval``: one pass over the training set, without augmentation, at the end of each epoch,
            which is less noisy and gives other counts.
        fine_epochs: First epochs of which the step of each presentation is kept as well (mode ``train``).

    Raises:
        ValueError: if ``mode`` is neither, or ``fine_epochs`` < 0.

    Attributes:
        forgetting: The counters.
        loss: Cross-entropy with the given label, float32 ``[epochs, N]`` on the CPU; of several presentations the last.
        correct: bool ``[epochs, N]`` on the CPU.
        steps: Step of the presentation within its epoch, int32 ``[fine epochs, N]``; -1: none.
    """

    def __init__(self, mode: Literal["train", "eval"] = "train", fine_epochs: int = 0) -> None:
        if mode not in ("train", "eval"):
            raise ValueError(f"mode must be 'train' or 'eval', got {mode!r}")
        if fine_epochs < 0:
            raise ValueError(f"fine_epochs must be at least 0, got {fine_epochs}")
        self.mode, self.fine_epochs = mode, fine_epochs
        self.forgetting = Forgetting.of(0)
        self._rows: dict[str, list[Tensor]] = {"loss": [], "correct": [], "steps": []}
        self._held: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._held_values = 0

    @property
    def loss(self) -> Tensor:
        return self._stacked("loss", torch.float32)

    @property
    def correct(self) -> Tensor:
        return self._stacked("correct", torch.bool)

    @property
    def steps(self) -> Tensor:
        return self._stacked("steps", torch.int32)

    # Events of the run ------------------------------------------------------------------------------------------------

    def on_start(self, info: StartInfo) -> None:
        """The run begins: forget what an earlier one left here."""
        self._train: ImageSet = info.train
        self._device, self._epoch = info.device, 0
        self.forgetting = Forgetting.of(len(info.train), info.device)
        self._rows = {name: [] for name in self._rows}
        self._held, self._held_values = [], 0
        self._begin_epoch()

    def on_step(self, info: StepInfo) -> None:
        """Hold a step's logits."""
        if self.mode != "train" or info.logits is None:
            return
        logits, batch = info.logits, info.batch
        # A copy: a captured step writes its next logits into the same memory.
        self._held.append((logits.clone(), batch.y, batch.index, batch.step))
        self._held_values += logits.numel()
        if self._held_values >= _HELD:
            self._count()

    def on_epoch_end(self, info: EpochInfo) -> None:
        """Count what is held and close the epoch's row."""
        if self.mode == "eval":
            self._evaluate(info.model)
        self._count()
        self._rows["loss"].append(self._loss.cpu())
        self._rows["correct"].append(self.forgetting.last.to("cpu", copy=True))
        if info.epoch < self.fine_epochs:
            self._rows["steps"].append(self._steps.cpu())
        self._epoch = info.epoch + 1
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        n = len(self._train)
        self._loss = torch.full((n,), torch.nan, device=self._device)
        self._steps = torch.full((n,), -1, dtype=torch.int32, device=self._device)

    def _count(self) -> None:
        if not self._held:
            return
        logits, y, index = (torch.cat([held[i] for held in self._held]) for i in range(3))  # type: ignore[misc]
        sizes = torch.tensor([len(held[1]) for held in self._held])
        steps = torch.tensor([held[3] for held in self._held], dtype=torch.int32).repeat_interleave(sizes)
        self._held, self._held_values = [], 0
        loss, correct = F.cross_entropy(logits.float(), y, reduction="none"), logits.argmax(1) == y
        self.forgetting.add(index, correct, self._epoch)
        steps = steps.to(self._device)
        for part in _rounds(index):
            self._loss[index[part]] = loss[part]
            self._steps[index[part]] = steps[part]

    def _evaluate(self, model: nn.Module) -> None:
        # Weights stay where they are: another memory layout would leave captured graphs with the old ones.
        plain = Numerics(torch.float32, channels_last=False)
        logits = torch.cat(list(outputs(model, self._train, _BATCH, self._device, plain)))
        self._held = [(logits, self._train.labels, torch.arange(len(self._train), device=self._device), -1)]

    def _stacked(self, name: str, dtype: torch.dtype) -> Tensor:
        rows = self._rows[name]
        return torch.stack(rows) if rows else torch.zeros(0, len(self.forgetting.last), dtype=dtype)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {"class": "SampleRecorder", "mode": self.mode, "fine_epochs": self.fine_epochs}

    def state(self) -> dict[str, Tensor]:
        """All of it, one bit a sample and epoch for correctness."""
        bits = np.packbits(self.correct.numpy(), axis=1)
        counters = {name: getattr(self.forgetting, name).cpu() for name in ("last", "events", "learned_at")}
        return {"loss": self.loss, "correct": torch.from_numpy(bits), "steps": self.steps, **counters}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        n = len(self._train)
        bits = np.unpackbits(tensors["correct"].numpy(), axis=1, count=n).astype(bool)
        rows = {"loss": tensors["loss"], "correct": torch.from_numpy(bits), "steps": tensors["steps"]}
        self._rows = {name: list(value.unbind()) for name, value in rows.items()}
        counters = (tensors[name].to(self._device) for name in ("last", "events", "learned_at"))
        self.forgetting = Forgetting(*counters)
        self._epoch = len(bits)
        self._begin_epoch()
