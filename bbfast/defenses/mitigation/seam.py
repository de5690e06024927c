"""SEAM: selective amnesia."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import lower
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._optimise import float32_recipe, optimise
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError
from bbfast.training import predict_labels
from bbfast.training.program import Batch, Program, derive_seed

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["SEAM", "SEAMConfig", "UntilAccuracy", "WrongLabels", "wrong_labels"]

_log = logging.getLogger(__name__)


class SEAMConfig(DefenseConfig):
    """Settings of SEAM.

    Args:
        forget_share: Part of the hold-out that is forgotten: 1 % of the training set if the hold-out is 5 % of it.
        forget_epochs: Passes of the forgetting at most (100 on the digits).
        forget_below: Accuracy on them, in 0..1, below which they count as forgotten; None is ``min(2 / K, 0.6)``.
        recover_epochs: Passes of the recovery at most (200 on the digits).
        recover_above: Accuracy on the hold-out, in 0..1, above which the recovery ends.
        lr: Adam's learning rate in both steps.
        batch_size: Samples a step, in both steps (16 on the digits).
        amp: Precision of the network: ``auto`` is bfloat16 where the device gains, ``off`` is float32.
        channels_last: Memory layout; ``auto`` where the device gains.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "paper": {"batch_size": 32}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours, for as many steps: a fifth of 72 images is one batch an epoch where 500 are sixteen, and the recovery
        # has five where 2,500 are 79.
        "digits": {"forget_epochs": 100, "recover_epochs": 200, "batch_size": 16},
    }

    forget_share: float = Field(0.2, gt=0, le=1)
    forget_epochs: int = Field(10, ge=0)
    forget_below: float | None = Field(None, gt=0, le=1)
    recover_epochs: int = Field(100, ge=0)
    recover_above: float = Field(0.97, gt=0, le=1)
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(32, ge=2)
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    stratified: bool = False

    def recipe(self, view: DefenderView, epochs: int) -> Recipe:
        """Adam at a constant rate on images as they are stored."""
        return float32_recipe(
            view,
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer="adam",
            weight_decay=0.0,
            precision="fp32" if self.amp == "off" else self.amp,
            channels_last=self.channels_last,
        )

    def forgotten(self, num_classes: int) -> float:
        """Accuracy below which images count as forgotten."""
        return min(2 / num_classes, 0.6) if self.forget_below is None else self.forget_below


def wrong_labels(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """For each label one of the others, all equally likely: int64 ``[B]``; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


class _Reached(Exception):
    """Not an error: carries the early end out of the engine; the model is as it was then."""


class UntilAccuracy(Program):
    """Plain training that ends with the epoch after which the accuracy on the training set has passed a bound.

    The accuracy is that of the labels as given, on the images as they are stored, in eval mode.

    Args:
        bound: The accuracy, in 0..1.
        above: Whether it must rise above the bound, or fall below it.
    """

    graph_safe: ClassVar[bool] = True

    def __init__(self, bound: float, above: bool) -> None:
        self._bound, self._above = bound, above
        self.accuracies: list[float] = []

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "bound": self._bound, "above": self._above}

    @property
    def reached(self) -> bool:
        """Whether the last epoch passed the bound."""
        if not self.accuracies:
            return False
        last = self.accuracies[-1]
        return last > self._bound if self._above else last < self._bound

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        if self.reached:
            raise _Reached

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        right = predict_labels(model, self.train, device=self.device) == self.train.labels.cpu()
        self.accuracies.append(float(right.double().mean()))
        return {"accuracy": self.accuracies[-1]}

    def state(self) -> dict[str, Tensor]:
        return {"accuracies": torch.tensor(self.accuracies, dtype=torch.float64)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.accuracies = tensors["accuracies"].tolist()


class WrongLabels(UntilAccuracy):
    """Training on labels that are wrong, drawn anew for every batch, until the right ones are forgotten.

    Args:
        bound: Accuracy of the right labels, in 0..1, below which they are.
        num_classes: Number of classes.
    """

    def __init__(self, bound: float, num_classes: int) -> None:
        super().__init__(bound, above=False)
        self._num_classes = num_classes

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "num_classes": self._num_classes}

    def make_batch(self, batch: Batch) -> Batch:
        seed = derive_seed("seam", self.seed, batch.epoch, batch.step)
        return batch.replace(y=wrong_labels(batch.y, self._num_classes, seed))


@register_defense("seam")
class SEAM(Defense):
    """Make the model forget its task on wrong labels, then teach it the task again from clean data.

    1. Forget: a fifth of the hold-out, each image under a uniformly random wrong label that is drawn anew for every
       batch, until the accuracy of the true labels on it falls below ``min(2 / K, 0.6)``. The backdoor, tied to
       the same weights, goes with the task.
    2. Recover: the whole hold-out under its true labels, with a new optimiser, until its accuracy rises above 0.97.
       Nothing there brings the backdoor back.

    Both ends are decided on the images that are trained on; nothing is held back.

    Source: Zhu et al., Selective Amnesia, IEEE S&P 2023, arXiv 2212.04687; numbers as in backdoor-toolbox. Deviations:
    see the card.
    """

    card = DefenseCard(
        title="Selective Amnesia",
        paper="Zhu, Tang, Tang, Wang, Wang, Tang, IEEE S&P 2023",
        year=2023,
        arxiv="2212.04687",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Makes the model forget its task on randomly wrong labels and recovers the task on clean data.",
        deviations=(
            "Both sets are of the hold-out: the images to forget are a fifth of it; the toolbox draws 1 % and 10 % of "
            "the clean training set, one apart from the other.",
            "Where 10 epochs did not make the model forget, the log and info say so; the toolbox goes on in silence.",
        ),
    )
    Config = SEAMConfig

    def check(self, view: DefenderView) -> None:
        if view.num_classes < 2:
            raise DataRequirementError("seam draws wrong labels, and with one class there are none")
        if len(view.clean) < 2:
            raise DataRequirementError(f"seam trains on at least 2 clean images, the hold-out has {len(view.clean)}")

    def run(self, view: DefenderView) -> DefenseResult:
        config: SEAMConfig = self.config
        model, clean = view.model, view.clean
        bound = config.forgotten(view.num_classes)
        # The hold-out is in random order.
        forgotten = clean[: max(2, round(config.forget_share * len(clean)))]
        forget = WrongLabels(bound, view.num_classes)
        recover = UntilAccuracy(config.recover_above, above=True)
        self._train(view, model, forgotten, config.forget_epochs, forget, "forgetting")
        if config.forget_epochs and not forget.reached:
            _log.warning(
                "seam: after %d epochs the accuracy on the images to forget is %.3f, not below %.3f; raise "
                "forget_epochs or lr",
                len(forget.accuracies),
                forget.accuracies[-1],
                bound,
            )
        self._train(view, model, clean, config.recover_epochs, recover, "recovery")
        phases = (("forgetting", forget), ("recovery", recover))
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model,
            history=[
                {"phase": tag, "epoch": epoch, "accuracy": accuracy}
                for tag, program in phases
                for epoch, accuracy in enumerate(program.accuracies)
            ],
            info={
                "forgotten_images": len(forgotten),
                "forget_below": bound,
                "forgot": forget.reached,
                "recovered": recover.reached,
                **{f"{tag}_epochs": len(program.accuracies) for tag, program in phases},
            },
        )

    def _train(
        self, view: DefenderView, model: nn.Module, images: ImageSet, epochs: int, program: UntilAccuracy, tag: str
    ) -> None:
        recipe = self.config.recipe(view, epochs)
        with contextlib.suppress(_Reached):
            optimise(model, images, view, recipe, program, tag=tag, remedy=lower(self.config, "lr"))
