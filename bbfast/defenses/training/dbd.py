"""DBD: features without labels first, then a classifier, then labels only for what it finds easy."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from pydantic import Field

from bbfast.defenses._content import content_order
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training._contrastive import classifier
from bbfast.defenses.training._mixmatch import MixMatch, clock, lowest
from bbfast.defenses.training._simclr import DIGITS_SIMCLR, SimClrConfig, self_supervised
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError
from bbfast.training import train
from bbfast.training.presets import dataset_key

__all__ = ["DBD"]


class DBDConfig(SimClrConfig):
    """Settings of DBD, and of its self-supervised stage.

    Args:
        warmup_epochs: Epochs in which the classifier alone learns all labels.
        warmup_batch: Their samples a step.
        semi_epochs: Epochs of MixMatch; the split is made anew before each.
        semi_iters: Steps of each.
        semi_batch: Labelled samples a step, and as many unlabelled ones, twice.
        label_fraction: Part of the set, the lowest losses, that keeps its labels; 1 drops none.
        sce_alpha: Weight of the cross-entropy in the loss of warm-up and split.
        sce_beta: Weight of the reverse cross-entropy.
        sharpen: Temperature of guessed labels.
        mixup_alpha: Of the Beta distribution of the mixing weight.
        lambda_u: Weight of the unlabelled term; None is 15 on CIFAR-10, 6 elsewhere.
        rampup: Epochs over which it grows, the warm-up's included; None is 190 on CIFAR-10, 80 elsewhere.
        lr: Rate of Adam in warm-up and MixMatch.
        separate_norm: BatchNorm statistics of ``semi_batch`` interleaved samples, as the reference's three passes have;
            False takes those of the whole step in one pass.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"ssl_t_max": 1000, "separate_norm": True},
        "paper": {"ssl_epochs": 1000, "semi_epochs": 190},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: 1,442 images have 22 batches of 64, and 1024 steps an epoch would be 46 passes between two splits. With
        # the ramp at the same part of the training.
        "digits": {**DIGITS_SIMCLR, "semi_epochs": 50, "semi_iters": 24, "rampup": 40},
    }

    warmup_epochs: int = Field(10, ge=0)
    warmup_batch: int = Field(128, ge=2)
    semi_epochs: int = Field(100, ge=1)
    semi_iters: int = Field(1024, ge=1)
    semi_batch: int = Field(64, ge=2)
    label_fraction: float = Field(0.5, gt=0, le=1)
    sce_alpha: float = Field(0.1, ge=0)
    sce_beta: float = Field(1.0, ge=0)
    sharpen: float = Field(0.5, gt=0)
    mixup_alpha: float = Field(0.75, gt=0)
    lambda_u: float | None = Field(None, ge=0)
    rampup: int | None = Field(None, ge=1)
    lr: float = Field(2e-3, gt=0)
    separate_norm: bool = False


@register_defense("dbd")
class DBD(Defense):
    """Learn features without the labels that the attacker changed, then believe only labels that fit them.

    1. *Self-supervised*: a fresh network learns to tell images apart by SimCLR
       (:func:`bbfast.defenses.training._simclr.self_supervised`).
    2. *Warm-up*: its classifier alone learns all labels by symmetric cross-entropy, which poisoned samples, far from
       their class in these features, keep high.
    3. *Semi-supervised*: before each epoch the ``label_fraction`` of the samples with the lowest symmetric
       cross-entropy keep their labels, the others lose theirs; MixMatch trains the whole network.

    The last epoch is returned; nothing is selected. Scores are the losses of the model returned, and the part that
    would lose its labels is flagged: half of the set, whatever is poisoned. The result does not depend on the storage
    order of the training set.

    A network is started from ImageNet weights if the attacked one was.

    Source: Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022, arXiv 2202.03423.
    """

    card = DefenseCard(
        title="Decoupling-based Backdoor Defense",
        paper="Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022",
        year=2022,
        arxiv="2202.03423",
        kinds=("training",),
        needs=frozenset({"poisoned_train", "fresh_model"}),
        summary="Trains features without labels, then keeps the labels of the half that fits them best.",
        deviations=(
            "The cosine of the self-supervised stage ends with it; the reference's half period is 1000 epochs whatever "
            "their number (preset='reference' keeps it).",
            "The network stays in eval mode while the classifier warms up; the reference's BatchNorm statistics move.",
            "Losses are ranked without augmentation; the reference's are of augmented images.",
            "The mixed samples of a step go through the network in one pass (preset='reference': in three).",
            "Precision, memory layout and determinism are those of the recipe the attacked model was trained with.",
        ),
    )
    Config = DBDConfig

    def check(self, view: DefenderView) -> None:
        cfg: DBDConfig = self.config
        n = len(view.poisoned_train)
        kept = int(cfg.label_fraction * n)
        parts = {"keeps its label": kept} | ({"loses it": n - kept} if cfg.label_fraction < 1 else {})
        for what, size in parts.items():
            if size < cfg.semi_batch:
                raise DataRequirementError(
                    f"dbd fills a batch of semi_batch={cfg.semi_batch} samples with what {what}, but of {n} training "
                    f"samples with label_fraction={cfg.label_fraction} those are {size}"
                )
        classifier(view.fresh_model(empty=True), self.name)

    def run(self, view: DefenderView) -> DefenseResult:
        cfg: DBDConfig = self.config
        given, started = view.poisoned_train, time.perf_counter()
        order = content_order(given.images, given.labels)
        data = given.subset(order)
        encoder, rows = self_supervised(view, data, cfg)
        model, pretrained = encoder.model, time.perf_counter()

        natural = dataset_key(view.data_name) == "cifar10"
        lambda_u = cfg.lambda_u if cfg.lambda_u is not None else (15.0 if natural else 6.0)
        rampup = cfg.rampup if cfg.rampup is not None else (190 if natural else 80)
        program = MixMatch(data, cfg, lambda_u, rampup, view.padding, view.flip)
        recipe = sgd_recipe(view, 2, 0.0).replace(
            epochs=cfg.semi_epochs, lr=cfg.lr, optimizer="adam", augment=False, compile=False
        )
        with naming("dbd", "semi-supervised", lower(cfg, "lr")):
            done = train(
                model,
                clock(cfg.semi_iters, data),
                recipe,
                seed=view.derive_seed("semi"),
                device=view.device,
                program=program,
                checkpoint=None if view.checkpoint is None else view.checkpoint / "semi",
                progress=view.progress,
                description="dbd semi-supervised",
            )
        losses = program.losses(model)
        scores, flags = torch.empty(len(data)), torch.empty(len(data), dtype=torch.bool)
        scores[order.cpu()], flags[order.cpu()] = losses.float(), ~lowest(losses, cfg.label_fraction)
        phases = {"ssl": rows, "semi": done.history}
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            scores=scores,
            flags=flags,
            threshold=float(scores[flags].min()) if bool(flags.any()) else None,
            history=[{"phase": phase, **row} for phase, part in phases.items() for row in part],
            info={
                "labelled": int((~flags).sum()),
                "lambda_u": lambda_u,
                "rampup": rampup,
                "seconds": {"ssl": pretrained - started, "semi": time.perf_counter() - pretrained},
            },
        )
