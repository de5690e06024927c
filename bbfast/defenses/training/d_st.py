"""D-ST: what moves least under a turn is learned with its labels, the rest without."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses._content import content_order
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses._fct import FctConfig, check_fct, sensitivity
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training._contrastive import Encoder, Rate, SupCon, classifier, pretrain
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.training._views import Views
from bbfast.defenses.view import DefenderView
from bbfast.models import features
from bbfast.training import Batch, Program, Recipe, train

__all__ = ["DST", "Readout"]


class DSTConfig(FctConfig):
    """Settings of D-ST: those of sample distinguishment and of the two trainings after it.

    Args:
        ssl_epochs: Epochs of the contrastive training.
        ssl_lr: Its rate: a line from ``warmup_from``, then a cosine to a thousandth of this.
        ssl_batch: Its samples a step, two views of each.
        warmup_epochs: Epochs of the line.
        warmup_from: First rate of both trainings.
        temperature: Divides the cosines in the contrastive loss.
        base_temperature: The loss is multiplied by ``temperature / base_temperature``.
        strict_positives: A clean sample is drawn to clean samples of its label only, not to suspicious ones.
        mirror: Views are mirrored half of the time.
        cls_epochs: Epochs of the classifier on the frozen encoder.
        cls_lr: Its rate at the end: a line from ``warmup_from`` over all its epochs.
        cls_batch: Its samples a step, of which those held to be neither clean nor poisoned are not used.
        poison_weight: Weight of the ascent on the samples held to be poisoned.
        weight_decay: L2 penalty of both trainings.
        cls_augment: Train the classifier on random views; False on the stored images.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"views": 1},
        "paper": {"views": 1, "ssl_batch": 512, "cls_batch": 512},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: half of the epochs, for time. The classifier's rate is that of 5, 1.25 (in proportion to the batch), .3,
        # .1 and .03 with the lowest training loss. A mirrored digit is no digit.
        "digits": {
            **FctConfig.dataset_defaults["digits"],
            "ssl_epochs": 100,
            "warmup_epochs": 5,
            "mirror": False,
            "cls_lr": 0.1,
        },
    }

    ssl_epochs: int = Field(200, ge=0)
    ssl_lr: float = Field(0.5, gt=0)
    ssl_batch: int = Field(128, ge=2)
    warmup_epochs: int = Field(10, ge=0)
    warmup_from: float = Field(0.01, gt=0)
    temperature: float = Field(0.1, gt=0)
    base_temperature: float = Field(0.07, gt=0)
    strict_positives: bool = False
    mirror: bool = True
    cls_epochs: int = Field(10, ge=0)
    cls_lr: float = Field(5.0, gt=0)
    cls_batch: int = Field(128, ge=2)
    poison_weight: float = Field(1e-3, ge=0)
    weight_decay: float = Field(5e-4, ge=0)
    cls_augment: bool = True


@register_defense("d_st")
class DST(Defense):
    """Train from scratch: contrast with the labels of what looks clean, then a classifier on that alone.

    1. *Sample distinguishment* as in D-BR: the ``alpha_clean`` least sensitive to turns are held to be clean, the
       ``alpha_poison`` most sensitive poisoned, the rest is uncertain.
    2. *Semi-supervised contrastive learning*: two views of each image; a clean sample is drawn to all samples with its
       label, any other to its own other view only (:func:`bbfast.defenses.training._contrastive.supcon`).
    3. *Classifier*: encoder frozen, in eval mode; the model's last layer is trained with ``CE(clean) - poison_weight *
       CE(poisoned)``, uncertain samples left out.

    The last epoch is returned; nothing is selected. Score and flags are those of D-BR. The result does not depend on
    the storage order of the training set.

    The rates are made for batches of 512; with 128, BackdoorBench's, ``cls_lr=5`` may be too much.

    Source: Chen, Wu and Wang, Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, NeurIPS 2022,
    sections 4.1 and 4.2.
    """

    card = DefenseCard(
        title="D-ST",
        paper="Chen, Wu and Wang, Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, "
        "NeurIPS 2022",
        year=2022,
        arxiv="",
        kinds=("training",),
        needs=frozenset({"poisoned_train", "fresh_model"}),
        summary="Trains by contrast with the labels of the samples that look clean, and a classifier on those.",
        deviations=(
            "The change under turns is averaged over 4 of them; the paper draws one (views=1).",
            "Turns are drawn once, from the image's pixels; BackdoorBench draws anew between threshold and split.",
            "A batch without a clean or without a poisoned sample has no such term; the reference's is NaN.",
            "Precision, memory layout and determinism are those of the recipe the attacked model was trained with.",
        ),
    )
    Config = DSTConfig

    def check(self, view: DefenderView) -> None:
        check_fct(view, self.config)
        classifier(view.fresh_model(empty=True), self.name)

    def run(self, view: DefenderView) -> DefenseResult:
        cfg: DSTConfig = self.config
        found = sensitivity(view, cfg)
        seconds, clock = {"sensitivity": found.seconds}, time.perf_counter()
        given = view.poisoned_train
        order = content_order(given.images, given.labels)
        data, at = given.subset(order), order.cpu()
        clean, poisoned = found.clean[at], found.poisoned[at]
        views = Views(mirror=cfg.mirror, blur=False, cubic=False)
        base = sgd_recipe(view, cfg.ssl_batch, cfg.weight_decay).replace(augment=False, compile=False)

        model = view.fresh_model()
        encoder = Encoder(model, norm=False, seed=view.derive_seed("projection"), method=self.name)
        rate = Rate(cfg.ssl_lr, max(cfg.ssl_epochs, 1), cfg.ssl_lr * 1e-3, cfg.warmup_epochs, cfg.warmup_from)
        program = SupCon(views, rate, clean, cfg.temperature, cfg.base_temperature, cfg.strict_positives)
        done = pretrain(
            view,
            encoder,
            data,
            base.replace(epochs=cfg.ssl_epochs, lr=cfg.ssl_lr),
            program,
            None if view.checkpoint is None else view.checkpoint / "contrast",
            lower(cfg, "ssl_lr"),
        )
        seconds["contrast"] = time.perf_counter() - clock
        clock = time.perf_counter()
        read = self._classifier(view, model, data, base, Readout(views, clean, poisoned, cfg))
        seconds["classifier"] = time.perf_counter() - clock
        phases = {"sensitivity": found.history, "contrast": done.history, "classifier": read}
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            scores=found.scores,
            flags=found.poisoned,
            threshold=float(found.scores[found.poisoned].min()),
            history=[{"phase": phase, **row} for phase, rows in phases.items() for row in rows],
            info={
                "clean": int(clean.sum()),
                "flagged": int(poisoned.sum()),
                "seconds": seconds,
            },
        )

    def _classifier(
        self, view: DefenderView, model: nn.Module, data: ImageSet, base: Recipe, program: Readout
    ) -> list[dict[str, Any]]:
        cfg: DSTConfig = self.config
        last = classifier(model, self.name)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        last.requires_grad_(True)
        try:
            with naming("d_st", "classifier", lower(cfg, "cls_lr")):
                done = train(
                    model,
                    data,
                    base.replace(epochs=cfg.cls_epochs, lr=cfg.cls_lr, batch_size=cfg.cls_batch),
                    seed=view.derive_seed("classifier"),
                    device=view.device,
                    program=program,
                    checkpoint=None if view.checkpoint is None else view.checkpoint / "classifier",
                    progress=view.progress,
                    description="d_st classifier",
                )
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return done.history


class Readout(Program):
    """The last layer on a frozen encoder: towards the labels of clean samples, slightly away from the poisoned ones'.

    Args:
        views: Makes a view.
        clean: bool ``[N]``.
        poisoned: bool ``[N]``; what is neither takes no part.
        config: Settings.
    """

    augments_itself: ClassVar[bool] = True

    def __init__(self, views: Views, clean: Tensor, poisoned: Tensor, config: DSTConfig) -> None:
        self._views, self._clean, self._poisoned, self._config = views, clean, poisoned, config

    def describe(self) -> dict[str, Any]:
        held = content_hash({"clean": self._clean, "poisoned": self._poisoned})
        cfg = self._config
        settings = [cfg.poison_weight, cfg.warmup_from, cfg.cls_augment, cfg.mirror]
        return {**super().describe(), "samples": held, "settings": settings}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._clean, self._poisoned = self._clean.to(device), self._poisoned.to(device)
        self._last, self._model = classifier(model, "d_st"), model

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._model.eval()
        self._steps = steps

    def make_batch(self, batch: Batch) -> Batch:
        done = (batch.epoch + batch.step / self._steps) / self.recipe.epochs
        start = self._config.warmup_from
        self._lr = start + done * (self.recipe.lr - start)
        images = self.train.images[batch.index]
        # Views of all, so that the draws of one sample do not hang on who else is used.
        x = self._views(images) if self._config.cls_augment else images.float() / 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.train.mean, self.train.std))
        used = self._clean[batch.index] | self._poisoned[batch.index]
        return batch.replace(x=((x - mean) / std)[used], y=batch.y[used], index=batch.index[used])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if not len(batch):
            return self._last.bias.sum() * 0, None
        with torch.no_grad():
            read = features(model, batch.x, "penultimate").flatten(1)
        logits = self._last(read)
        each = F.cross_entropy(logits.float(), batch.y, reduction="none")
        weight = self._config.poison_weight
        return _mean_of(each, self._clean[batch.index]) - weight * _mean_of(each, self._poisoned[batch.index]), logits

    def after_backward(self, model: nn.Module) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr


def _mean_of(each: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen ones, 0 if there is none."""
    return (each * chosen).sum() / chosen.sum().clamp(min=1)
