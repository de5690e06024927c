"""Fine-tuning on a small clean hold-out: settings and the one call that several methods share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses.base import DefenseConfig
from bbfast.defenses.view import DefenderView

if TYPE_CHECKING:
    from bbfast.training import Program, Recipe

__all__ = ["DIGITS_LR", "REFERENCE", "TINY", "FinetuneConfig", "batch_size_for", "finetune", "trainable"]

REFERENCE: dict[str, Any] = {"batch_size": 256, "t_max": 100}
"""BackdoorBench's fine-tuning numbers where they differ from ours: batches of 256 however small the hold-out, and a
cosine of half period 100 whatever the number of epochs."""

TINY: dict[str, Any] = {"scheduler": "plateau"}
"""BackdoorBench's schedule on Tiny ImageNet (with 200 epochs)."""

DIGITS_LR = 0.02
"""Learning rate on the digits, for which nothing is published. Five per cent are 72 images: five steps of the smallest
batch an epoch, half as many as on the paper's hold-outs, so at twice the paper's rate the weights can move as far."""

_BATCH, _STEPS = 256, 8


class FinetuneConfig(DefenseConfig):
    """Settings of the SGD fine-tuning that FT, FP, NC and others end with.

    Args:
        batch_size: Samples a step. None is 256 on hold-outs of the paper's sizes and a smaller power of two on smaller
            ones (:func:`batch_size_for`), so that an epoch has about as many steps as the paper's.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        scheduler: Course of the learning rate, see :class:`bbfast.Recipe`.
        t_max: Half period of the cosine in epochs; None is the number of epochs.
        amp: Precision of the network: ``auto`` is bfloat16 where the device gains, ``off`` is float32.
        channels_last: Memory layout; ``auto`` where the device gains.
        cuda_graphs: Capture the step in a CUDA graph; None where it pays.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "reference": REFERENCE, "paper": {}}

    batch_size: int | None = Field(None, ge=2)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    scheduler: Literal["cosine", "plateau", "constant", "multistep"] = "cosine"
    t_max: int | None = Field(None, ge=1)
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | None = None
    stratified: bool = False

    def recipe(self, view: DefenderView, size: int, epochs: int, lr: float) -> Recipe:
        """The recipe for ``size`` images, with the crops and flips that the model was trained with."""
        from bbfast.training import Recipe

        trained = view.recipe
        return Recipe(
            epochs=epochs,
            batch_size=self.batch_size or batch_size_for(size),
            lr=lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.scheduler,
            t_max=self.t_max,
            augment=trained.augment if trained is not None else True,
            padding=trained.padding if trained is not None else view.padding,
            flip=trained.flip if trained is not None else view.flip,
            precision="fp32" if self.amp == "off" else self.amp,
            channels_last=self.channels_last,
            cuda_graphs=self.cuda_graphs,
            deterministic=trained is not None and trained.deterministic,
            eval_every=0,
        )


def batch_size_for(size: int) -> int:
    """The power of two nearest to an eighth of ``size``, in 16..256: 256 on every hold-out of the paper (1,960 and
    more).

    The paper's hold-outs give 8 to 20 steps an epoch. Batches of 256 on a hold-out of 71 images would give one: a
    hundredth of the paper's steps for the same number of epochs, and the trigger would outlive the fine-tuning.
    """
    if size <= 0:
        return 16
    return min(_BATCH, max(16, 2 ** round(math.log2(max(size / _STEPS, 1)))))


def finetune(
    model: nn.Module,
    images: ImageSet,
    view: DefenderView,
    config: FinetuneConfig,
    *,
    epochs: int,
    lr: float,
    tag: str,
    slower: Sequence[str] = ("lr",),
    program: Program | None = None,
    callbacks: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Train ``model`` in place on ``images`` with every parameter free; with 0 epochs not one bit of it changes.

    Args:
        model: On the view's device; in eval mode afterwards, its ``requires_grad`` as before.
        images: Images to train on.
        view: For the device, the seed and the data set's transform.
        config: Settings.
        epochs: Passes over ``images``.
        lr: Learning rate.
        tag: Name of this training: of its seed, its checkpoint and its progress bar.
        slower: Names of the settings to lower when the loss stops being finite.
        program: Hooks into the training step.
        callbacks: As in :func:`bbfast.train`.

    Returns:
        One dict an epoch.

    Raises:
        DivergedError: if the loss stops being finite.
    """
    from bbfast.training import train

    if epochs == 0:
        return []
    with trainable(model), naming(view.method, tag, lower(config, *slower)):
        trained = train(
            model,
            images,
            config.recipe(view, len(images), epochs, lr),
            seed=view.derive_seed(tag),
            device=view.device,
            program=program,
            callbacks=callbacks,
            checkpoint=view.checkpoint / tag if view.checkpoint is not None else None,
            progress=view.progress,
            description=f"{view.method}: {tag}",
        )
    return list(trained.history)


@contextlib.contextmanager
def trainable(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Set every parameter's ``requires_grad`` for the block, and put it back as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(on)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
