"""FP: Fine-Pruning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation import _head
from bbfast.defenses.mitigation._finetune import DIGITS_LR, TINY, FinetuneConfig, finetune
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.training.program import Program

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["FP", "FPConfig", "last_acceptable"]


class FPConfig(FinetuneConfig):
    """Settings of Fine-Pruning.

    Args:
        once_prune_ratio: Part of the channels pruned at a time.
        acc_ratio: Pruning stops before the relative loss of accuracy on the held-back part reaches this.
        score: Order of pruning: by the mean activation, or by the mean absolute activation (for layers whose
            activations are signed, as behind a LayerNorm).
        val_fraction: Part of the hold-out held back to stop by; 0 needs ``prune_ratio``.
        prune_ratio: Prune this part of the channels and do not look for a stopping point; None looks.
        epochs: Passes of the fine-tuning that follows (200 on Tiny ImageNet).
        lr: Its learning rate (0.02 on the digits).
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"epochs": 200, **TINY},
        "digits": {"lr": DIGITS_LR},
    }

    once_prune_ratio: float = Field(0.01, gt=0, le=1)
    acc_ratio: float = Field(0.1, gt=0, lt=1)
    score: Literal["mean", "mean_abs"] = "mean"
    val_fraction: float = Field(0.2, ge=0, le=0.5)
    prune_ratio: float | None = Field(None, ge=0, lt=1)
    epochs: int = Field(100, ge=0)
    lr: float = Field(0.01, gt=0)

    @model_validator(mode="after")
    def _check(self) -> FPConfig:
        if self.val_fraction == 0 and self.prune_ratio is None:
            raise ValueError("val_fraction=0 leaves nothing to stop by; give prune_ratio, or val_fraction > 0")
        return self


@register_defense("fp")
class FP(Defense):
    """Prune the channels that clean images do not excite, then fine-tune.

    1. Mean activation of every channel of the last convolutional stage over the fitting part of the hold-out, test
    transform.
    2. Channels in ascending order are cut from the layer behind it, a hundredth at a time, up to the last number at
       which the accuracy on the held-back part has lost less than ``acc_ratio`` of its value.
    3. Fine-tuning on the whole hold-out; the cut columns stay zero.

    The result is a plain model: zeros in the weight of one Linear layer, the same state-dict keys.

    Source: Liu, Dolan-Gavitt, Garg, RAID 2018, arXiv 1805.12185, section 4. Deviations: see the card.
    """

    card = DefenseCard(
        title="Fine-Pruning",
        paper="Liu, Dolan-Gavitt, Garg, RAID 2018",
        year=2018,
        arxiv="1805.12185",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Prunes the channels that clean images do not excite, then fine-tunes.",
        deviations=(
            "Pruning stops by accuracy on a held-back fifth of the hold-out; the reference looks at the test set.",
            "The mask that is kept is the last acceptable one; the reference fine-tunes with the one that violated the "
            "bound.",
            "At step c exactly c channels are cut; the reference cuts c - 1.",
            "Only a loss of accuracy stops the pruning; in the reference a gain of acc_ratio does too.",
            "Activations are measured without random crops and flips.",
            "The hold-out is drawn once; without an index file the reference draws twice and stores the indices it did "
            "not use.",
            "The state dict has the plain keys; the reference stores weight_orig and weight_mask.",
            "VGG is pruned by the channels of its last convolution, 49 columns each; the reference prunes the 25,088 "
            "columns one by one.",
        ),
    )
    Config = FPConfig

    def check(self, view: DefenderView) -> None:
        _head.find_head(view.model, self.name)
        if self.config.prune_ratio is None:
            view.split_clean(self.config.val_fraction)

    def run(self, view: DefenderView) -> DefenseResult:
        config: FPConfig = self.config
        model = view.model
        head = _head.find_head(model, self.name)
        inputs = _inputs(head, view)
        if config.prune_ratio is None:
            fit, val = (part.ids for part in view.split_clean(config.val_fraction))
        else:
            fit, val = view.clean.ids, view.clean.ids[:0]
        means = _head.channel_means(inputs[fit], head.channels, config.score == "mean_abs")
        order = torch.argsort(means, stable=True)
        count, selection = self._choose(head, inputs[val], view.clean.labels[val], order)
        columns = _head.channel_columns(order[:count], head.width)
        with torch.no_grad():
            head.linear.weight[:, columns] = 0
        program = PrunedColumns(head.name, columns)
        history = finetune(
            model, view.clean, view, config, epochs=config.epochs, lr=config.lr, tag="fine-tuning", program=program
        )
        info = {
            "pruned": columns.numel(),
            "pruned_channels": order[:count].tolist(),
            "channels": head.channels,
            "layer": head.name,
        }
        return DefenseResult(kind=self.card.kinds[0], model=model, history=history, selection=selection, info=info)

    def _choose(self, head: _head.Head, inputs: Tensor, labels: Tensor, order: Tensor) -> tuple[int, dict[str, Any]]:
        """How many channels to prune, and how that was decided."""
        config: FPConfig = self.config
        if config.prune_ratio is not None:
            return int(config.prune_ratio * head.channels), {"criterion": "fixed", "prune_ratio": config.prune_ratio}
        step = math.ceil(head.channels * config.once_prune_ratio)
        accuracy = _head.sweep(head, inputs, labels, order, step)
        kept = last_acceptable(accuracy, config.acc_ratio)
        return kept * step, {
            "criterion": f"last number of channels with less than {config.acc_ratio:g} of the accuracy lost",
            "data": "held-back part of the clean hold-out",
            "samples": len(labels),
            "step": step,
            "accuracy": accuracy.tolist(),
            "chosen": kept,
        }


def last_acceptable(accuracy: Tensor, acc_ratio: float) -> int:
    """The last step before the first whose relative loss of accuracy against step 0 reaches ``acc_ratio``.

    A gain of accuracy never stops. Where nothing is right from the start there is nothing to lose, nor to judge by:
    step 0.

    Args:
        accuracy: ``[S]``, after 0, 1, 2, ... steps of pruning.
        acc_ratio: Bound of the relative loss, in (0, 1).
    """
    start = float(accuracy[0])
    if start == 0:
        return 0
    # Accuracies are fractions with few digits; the slack keeps a loss of exactly acc_ratio a violation.
    violated = accuracy <= start * (1 - acc_ratio) + 1e-9
    return int(violated.nonzero()[0]) - 1 if violated.any() else accuracy.numel() - 1


class PrunedColumns(Program):
    """Plain training that puts the pruned columns of one Linear layer back to zero after every step."""

    def __init__(self, layer: str, columns: Tensor) -> None:
        self._layer, self._columns = layer, columns

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "layer": self._layer, "columns": self._columns.tolist()}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._weight = model.get_submodule(self._layer).get_parameter("weight")
        self._columns = self._columns.to(device)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        self._weight.index_fill_(1, self._columns, 0.0)


def _inputs(head: _head.Head, view: DefenderView) -> Tensor:
    """What the pruned layer receives for the hold-out: ``[n_H, channels * width]``."""
    if head.is_classifier:
        return view.features("penultimate", "clean")
    return _head.layer_inputs(view.model, head.linear, view.clean).flatten(1)
