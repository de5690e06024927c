"""What fine-tuning on clean data does to the labels of the training samples, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.store import Content
from bbfast.studies.perspectives._recorded import STAGE, Recorded
from bbfast.training import EpochInfo, StartInfo, predict_labels

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.studies.results import Results

__all__ = ["SIDES", "Relabelled", "finetuned", "shares"]

SIDES = ("relabelled", "restored", "clean")


def shares(predicted: Tensor, given: Tensor, original: Tensor, poisoned: Tensor) -> list[float]:
    """Shares of poisoned samples that do not get their given label and that get their true class, and of clean samples
    that do not get their label; NaN of an empty group.

    Of the poisoned those count whose label was changed: one of the target class would be both. An attack with clean
    labels has none; then all poisoned samples count, and the second share is NaN.

    Args:
        predicted: What the model says, int64 ``[n]``.
        given: Labels that the learner was given, int64 ``[n]``.
        original: True classes, int64 ``[n]``.
        poisoned: bool ``[n]``.
    """
    changed = poisoned & (given != original)
    bad = changed if bool(changed.any()) else poisoned
    parts = (
        predicted[bad] != given[bad],
        predicted[changed] == original[changed],
        predicted[~poisoned] != given[~poisoned],
    )
    return [float(part.double().mean()) if len(part) else float("nan") for part in parts]


class Relabelled:
    """Callback that measures :func:`shares` before the first and after each epoch.

    Args:
        images: Training samples under their given labels.
        original: True labels.
        poisoned: Which are poisoned.
    """

    def __init__(self, images: ImageSet, original: Tensor, poisoned: Tensor) -> None:
        self._images, self._original, self._poisoned = images, original, poisoned
        self.rows: list[list[float]] = []

    def on_start(self, info: StartInfo) -> None:
        """Before the first epoch; a resumed run is given its rows afterwards."""
        self._device = info.device
        self.rows = [self._measured(info.model)]

    def on_epoch_end(self, info: EpochInfo) -> None:
        """After an epoch."""
        self.rows.append(self._measured(info.model))

    def _measured(self, model: nn.Module) -> list[float]:
        predicted = predict_labels(model, self._images, device=self._device)
        return shares(predicted, self._images.labels.cpu(), self._original.cpu(), self._poisoned.cpu())

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {"class": "Relabelled", "counts": "changed labels", "n": len(self._images)}

    def state(self) -> dict[str, Tensor]:
        """``rows``, f64 ``[epochs + 1, 3]``."""
        return {"rows": torch.tensor(self.rows, dtype=torch.float64).view(-1, len(SIDES))}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.rows = tensors["rows"].tolist()


def finetuned(cell: Recorded, results: Results, config: Any) -> NDArray[np.float64]:
    """:func:`shares` before and after each epoch of the defense ft, f64 ``[epochs + 1, 3]``; found in the store or made
    now.

    Args:
        cell: Whose model is fine-tuned.
        results: For the store and the device.
        config: ``finetune_settings``, ``clean_fraction`` and ``watched`` of the study.
    """
    from bbfast import defenses

    seed = cell.cell.seed
    defense = defenses.create("ft", **config.finetune_settings).for_dataset(cell.cell.dataset)
    own = {"defense": defense.config.model_dump(mode="json"), "clean_fraction": config.clean_fraction}

    def make(work: Path) -> Content:
        attack = cell.attack()
        watch = Relabelled(*_watched(attack, config.watched, seed))
        _finetune(defense, attack, watch, config.clean_fraction, seed, results.device, work)
        return Content(STAGE, settings, tensors={"watch": watch.state()})

    settings = {"attack": cell.folder.name, **own, "watched": config.watched, "counts": "changed labels"}
    kept = results.store.get_or_make(STAGE, "ft", settings, make, seed=seed, kind=STAGE)
    found: NDArray[np.float64] = kept.tensors("watch")["rows"].numpy()
    return found


def _finetune(
    defense: Any, attack: AttackResult, watch: Relabelled, fraction: float, seed: int, device: torch.device, work: Path
) -> None:
    """What :class:`bbfast.defenses.mitigation.ft.FT` does, with a callback."""
    from bbfast.defenses.mitigation._finetune import finetune
    from bbfast.defenses.run import build_view

    view, _ = build_view(defense, attack, fraction, seed, device, checkpoint=work, progress=False)
    c = defense.config
    finetune(view.model, view.clean, view, c, epochs=c.epochs, lr=c.lr, tag="fine-tuning", callbacks=[watch])


def _watched(attack: AttackResult, most: int, seed: int) -> Sequence[Any]:
    """Up to ``most`` poisoned and as many clean training samples, their true labels and which are which."""
    generator = torch.Generator().manual_seed(derive_seed("relabelled", seed))
    parts = []
    for group in (~attack.poisoned, attack.poisoned):
        rows = group.nonzero().flatten()
        parts.append(rows[torch.randperm(len(rows), generator=generator)[:most]])
    rows = torch.cat(parts)
    return attack.train.subset(rows), attack.original_labels[rows], attack.poisoned[rows]
