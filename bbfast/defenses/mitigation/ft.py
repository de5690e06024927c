"""FT: fine-tuning on clean data, the baseline of every repair."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import DIGITS_LR, TINY, FinetuneConfig, finetune
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView

__all__ = ["FT", "FTConfig"]


class FTConfig(FinetuneConfig):
    """Settings of FT.

    Args:
        epochs: Passes over the hold-out (200 on Tiny ImageNet).
        lr: Learning rate (0.02 on the digits). 0.01 is harsh for a pretrained ViT or ConvNeXt; it is what the reference
            uses on all models.
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"epochs": 200, **TINY},
        "digits": {"lr": DIGITS_LR},
    }

    epochs: int = Field(100, ge=0)
    lr: float = Field(0.01, gt=0)


@register_defense("ft")
class FT(Defense):
    """Train the model further on the clean hold-out, all of it, and keep the last epoch.

    All parameters move, BatchNorm statistics too. Nothing is selected, so the hold-out is not split.

    Source: BackdoorBench ``defense/ft.py``; no paper of its own. Deviations: see the card.
    """

    card = DefenseCard(
        title="Fine-tuning",
        paper="baseline, as in BackdoorBench",
        year=None,
        arxiv="",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Trains the model further on the clean hold-out.",
        deviations=(
            "The cosine ends at the last epoch; the reference's half period is 100 whatever the number of epochs, so "
            "that 200 epochs climb back to the full rate (preset='reference' keeps 100).",
            "On hold-outs under about 1,500 images the batch shrinks so that an epoch keeps about 8 steps; the "
            "reference's 256 would make one step of a hold-out of 71 images (preset='reference' keeps 256).",
            "A last batch of one sample is merged or dropped: BatchNorm cannot train on it, the reference crashes.",
        ),
    )
    Config = FTConfig

    def run(self, view: DefenderView) -> DefenseResult:
        config: FTConfig = self.config
        model = view.model
        history = finetune(model, view.clean, view, config, epochs=config.epochs, lr=config.lr, tag="fine-tuning")
        return DefenseResult(kind=self.card.kinds[0], model=model, history=history)
