"""Loss and accuracy of an epoch, summed on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.data.loader import Batch

__all__ = ["Tally"]

_ROLES = ("train_acc_clean", "train_asr", "train_cross_acc")


class Tally:
    """Sums over the batches of an epoch without making the host wait for the device.

    Args:
        device: Where the sums are.
    """

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._loss = torch.zeros((), dtype=wide, device=device)
        self._steps = 0
        # Rows: correct, seen; columns: roles 0 clean, 1 poison, 2 cross.
        self._counts = torch.zeros(2, len(_ROLES), dtype=torch.int64, device=device)
        self._scored = self._has_roles = False

    def add(self, loss: Tensor, logits: Tensor | None, batch: Batch) -> None:
        """Count a batch: scalar ``loss``, ``logits`` ``[B, K]`` or None."""
        self._loss += loss
        self._steps += 1
        if logits is None:
            return
        self._scored = True
        correct = logits.argmax(1) == batch.y
        if batch.role is None:
            self._counts[0, 0] += correct.sum()
            self._counts[1, 0] += len(batch)
            return
        self._has_roles = True
        members = batch.role[:, None] == torch.arange(len(_ROLES), dtype=torch.int8, device=batch.role.device)
        self._counts += torch.stack([(members & correct[:, None]).sum(0), members.sum(0)])

    def result(self) -> dict[str, float]:
        """``loss`` (mean over batches), ``train_acc`` if there were logits, accuracy of each role that occurred."""
        row = {"loss": float(self._loss) / max(self._steps, 1)}
        if not self._scored:
            return row
        correct, seen = self._counts.tolist()
        row["train_acc"] = sum(correct) / max(sum(seen), 1)
        if self._has_roles:
            row |= {name: c / s for name, c, s in zip(_ROLES, correct, seen, strict=True) if s}
        return row
