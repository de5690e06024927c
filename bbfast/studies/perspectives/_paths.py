"""Paths in weight space from an attacked model to a defended one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader, derive_seed
from bbfast.defenses.holdout import draw_holdout
from bbfast.defenses.mitigation._curve import Curve, CurveProgram, reestimate_batch_norm
from bbfast.defenses.mitigation._finetune import batch_size_for, trainable
from bbfast.defenses.view import private_copy
from bbfast.store import Content
from bbfast.studies.perspectives._recorded import STAGE
from bbfast.training import Recipe, train

if TYPE_CHECKING:
    from bbfast.analysis.subject import Subject
    from bbfast.attacks import AttackResult
    from bbfast.studies.results import Results

__all__ = ["PATHS", "along", "kept_path", "measured"]

PATHS: tuple[Literal["line", "bezier"], ...] = ("line", "bezier")
_BATCH = 128
_SETTINGS = ("n", "clean_fraction", "path_points", "path_epochs", "path_lr")


def along(
    near: nn.Module,
    far: nn.Module,
    clean: ImageSet,
    sets: Sequence[ImageSet],
    *,
    points: int,
    epochs: int,
    lr: float,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
) -> NDArray[np.float64]:
    """Loss and accuracy on the straight line between two models and on a quadratic Bezier curve between them.

    The curve's middle is trained on ``clean`` for places drawn from U(0, 1), as mode connectivity repair does; it
    starts on the line. BatchNorm statistics are taken anew over ``clean`` at every point of both, the ends included:
    between two models neither's statistics fit.

    Args:
        near: Model at t = 0.
        far: Model of the same architecture, at t = 1.
        clean: Images that the curve is trained on.
        sets: What is measured.
        points: Places along each path, ends included.
        epochs: Of the curve.
        lr: Of the curve.
        seed: Of the training.
        device: Where to compute.
        checkpoint: Folder for the curve's checkpoint.

    Returns:
        f64 ``[2 paths, points, 2 * len(sets)]``: the sets' losses, then their accuracies.
    """
    model = private_copy(near, device)
    curve = Curve(model, private_copy(far, device)).to(device)
    size = min(_BATCH, batch_size_for(len(clean)))
    loader = BatchLoader(clean, min(_BATCH, len(clean)), seed=seed, device=device, augment=False, merge_single=True)
    found = []
    for path in PATHS:
        if path == "bezier":
            recipe = Recipe(
                epochs=epochs, batch_size=size, lr=lr, schedule="constant", precision="fp32", padding=0, eval_every=0
            )
            with trainable(curve):
                train(
                    curve,
                    clean,
                    recipe,
                    seed=seed,
                    device=device,
                    program=CurveProgram(max(epochs, 1)),
                    progress=False,
                    checkpoint=checkpoint,
                )
        for t in np.linspace(0, 1, points).tolist():
            curve.put(model, t)
            reestimate_batch_norm(model, loader)
            model.eval()
            found.append(measured(model, sets, device))
    return np.array(found).reshape(len(PATHS), points, 2 * len(sets))


@torch.no_grad()
def measured(model: nn.Module, sets: Sequence[ImageSet], device: torch.device) -> list[float]:
    """Mean cross-entropies of the sets, then their accuracies; the model is in eval mode, on ``device``."""
    from bbfast.analysis.tools.loss_landscape import loss_and_share

    pairs = []
    for images in sets:
        loader = BatchLoader(images, 256, device=device, augment=False, shuffle=False)
        pairs.append(loss_and_share(model, [batch.x for batch in loader.epoch(0)], images.labels.to(device)))
    return [value for column in zip(*pairs, strict=True) for value in column]


def kept_path(
    attack: AttackResult, model: nn.Module, subject: Subject, cell: Mapping[str, Any], results: Results, config: Any
) -> NDArray[np.float64]:
    """:func:`along` from an attack's model to a defended one, on test images without and with the trigger; found in the
    store or made now.

    Args:
        attack: The attack's result.
        model: The defended model.
        subject: For the images.
        cell: Of the defense: ``key`` and ``seed``.
        results: For the store and the device.
        config: ``n``, ``clean_fraction`` and ``path_*`` of the study.
    """
    seed = int(cell["seed"])
    settings = {"cell": cell["key"], **{key: getattr(config, key) for key in _SETTINGS}}

    def make(work: Path) -> Content:
        clean, test = attack.clean_train, attack.test
        clean = clean.subset(draw_holdout(clean.labels, config.clean_fraction, attack.num_classes, seed, False))
        pairs = subject.pairs(config.n)
        sides = (pairs.clean, pairs.labels), (pairs.triggered, pairs.targets)
        found = along(
            attack.model,
            model,
            clean,
            [ImageSet(images, labels, mean=test.mean, std=test.std) for images, labels in sides],
            points=config.path_points,
            epochs=config.path_epochs,
            lr=config.path_lr,
            seed=derive_seed("path", seed),
            device=results.device,
            checkpoint=work,
        )
        return Content(STAGE, settings, tensors={"path": {"values": torch.from_numpy(found)}})

    kept = results.store.get_or_make(STAGE, "path", settings, make, seed=seed, kind=STAGE)
    values: NDArray[np.float64] = kept.tensors("path")["values"].numpy()
    return values
