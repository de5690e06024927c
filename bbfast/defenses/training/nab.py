"""NAB: suspicious samples get another label and a stamp, and every image to be classified gets the stamp."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.defenses._content import content_order
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import batch_size_for
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training._abl_programs import Isolation, sample_losses
from bbfast.defenses.training._contrastive import Encoder, classifier
from bbfast.defenses.training._simclr import DIGITS_SIMCLR, SimClrConfig, self_supervised
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.models import add
from bbfast.models.additions.stamp import stamped
from bbfast.training import Program, Recipe, predict, predict_labels, train

__all__ = ["NAB", "nearest_centre"]

_TAIL = 80  # epochs by which the cosine of the detection outlasts it
_REST = 5  # and that of the training


class NABConfig(SimClrConfig):
    """Settings of NAB, and of the self-supervised stage that ``pseudo="nc"`` takes.

    Args:
        detect_epochs: Epochs of the training by which samples are ranked.
        detect_lr: Its first rate.
        detect_batch: Its samples a step.
        detect_weight_decay: Its L2 penalty.
        loss: ``flooding`` or ``lga`` (local gradient ascent), which keep clean samples from being learned.
        flood: Flood level.
        gamma: Level of local gradient ascent.
        isolate: Part of the set, the lowest losses, that is held to be poisoned.
        pseudo: Where their new labels come from: ``nc``: the nearest class centre of a self-supervised encoder;
            ``vd``: a classifier trained on verified clean data, of which it takes a hold-out.
        centre_exclude: Part of the set, the lowest losses, that is left out of the centres.
        epochs: Epochs of the last training (and of the classifier of ``vd``).
        lr: Its first rate.
        weight_decay: Its L2 penalty.
        batch_size: Its samples a step.
        stamp_size: Side of the stamp, a square at the top left, in pixels.
        stamp_value: Its value in normalised images: 0 is the data set's mean colour.
        cutout: A hole of two pixels a side in every image of the last training.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"isolate": 0.10, "ssl_t_max": 1000},
        "official": {
            "detect_lr": 0.1,
            "detect_weight_decay": 1e-4,
            "lr": 0.1,
            "batch_size": 64,
            "cutout": True,
            "ssl_epochs": 1000,
        },
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: as abl's row, and batches with which an epoch has more than six steps. 5 % are 72 samples, which leave
        # classes out that the stamp then does not protect; the reference's 10 %.
        "digits": {**DIGITS_SIMCLR, "detect_lr": 0.05, "batch_size": 64, "lr": 0.05, "isolate": 0.10},
    }

    detect_epochs: int = Field(20, ge=1)
    detect_lr: float = Field(0.01, gt=0)
    detect_batch: int = Field(64, ge=2)
    detect_weight_decay: float = Field(5e-4, ge=0)
    loss: Literal["flooding", "lga"] = "flooding"
    flood: float = Field(0.5, ge=0)
    gamma: float = Field(0.5, ge=0)
    isolate: float = Field(0.05, gt=0, lt=1)
    pseudo: Literal["nc", "vd"] = "nc"
    centre_exclude: float = Field(0.20, ge=0, lt=1)
    epochs: int = Field(100, ge=0)
    lr: float = Field(0.01, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(256, ge=2)
    stamp_size: int = Field(2, ge=1)
    stamp_value: float = 0.0
    cutout: bool = False


@register_defense("nab")
class NAB(Defense):
    """Train with a backdoor of one's own on the suspicious samples, which says that their label is another.

    1. *Detection*: a fresh model is trained for few epochs without augmentation under a loss that holds clean samples
       up (:func:`bbfast.defenses.training._abl_programs.isolation_loss`); the ``isolate`` with the lowest cross-entropy
       are held to be poisoned.
    2. *Pseudo-labels* for these: the nearest class centre in a self-supervised encoder, centres without the
       ``centre_exclude`` of the lowest losses; or what a classifier trained on clean data says.
    3. *Training* of a fresh model, in which these samples have their pseudo-label and, where it is not the given one, a
       stamp of 2x2 pixels.
    4. *Prediction*: every image is stamped. The model returned does it itself.

    An image with the attacker's trigger then carries both, as the stamped samples did that were taught to be their true
    class. Nothing is selected; the last epoch is returned. Score: minus the loss of step 1. The result does not depend
    on the storage order of the training set. Where labels are true (clean-label attacks) there is nothing to relabel.

    Source: Liu, Sangiovanni-Vincentelli and Yue, Beating Backdoor Attack at Its Own Game, ICCV 2023, arXiv 2307.15539.
    Defaults are BackdoorBench's rates with the authors' ``isolate``; ``preset="official"`` is the authors'.
    """

    card = DefenseCard(
        title="Non-Adversarial Backdoor",
        paper="Liu, Sangiovanni-Vincentelli and Yue, Beating Backdoor Attack at Its Own Game, ICCV 2023",
        year=2023,
        arxiv="2307.15539",
        kinds=("training",),
        needs=frozenset({"poisoned_train", "fresh_model"}),
        summary="Relabels and stamps the samples that are learned fastest, and stamps every image at prediction.",
        deviations=(
            "The rate of the last training falls by its own cosine; BackdoorBench steps the self-supervised one's.",
            "Class centres are of the encoder in eval mode; BackdoorBench's are in train mode.",
            "The stamp is part of the model returned; BackdoorBench stores the weights alone.",
            "The filter that rejects images whose prediction the stamp changes is left to the user.",
            "Precision, memory layout and determinism are those of the recipe the attacked model was trained with.",
        ),
    )
    Config = NABConfig

    def __init__(self, config: Any = None, **values: Any) -> None:
        super().__init__(config, **values)
        if self.config.pseudo == "vd":
            # Only then: a defender without clean data is not asked for any.
            self.card = dataclasses.replace(self.card, needs=self.card.needs | {"clean"})  # type: ignore[misc]

    def check(self, view: DefenderView) -> None:
        cfg: NABConfig = self.config
        _, height, width = view.image_size
        if cfg.stamp_size > min(height, width):
            raise ConfigError(f"defense nab: stamp_size must be at most {min(height, width)}, got {cfg.stamp_size}")
        n = len(view.poisoned_train)
        if n - int(max(cfg.centre_exclude, cfg.isolate) * n) < 2:
            raise DataRequirementError(
                f"nab needs at least 2 training samples that are neither isolated nor excluded, but "
                f"isolate={cfg.isolate} and centre_exclude={cfg.centre_exclude} of {n} leave fewer"
            )
        if cfg.pseudo == "nc":
            classifier(view.fresh_model(empty=True), self.name)

    def run(self, view: DefenderView) -> DefenseResult:
        cfg: NABConfig = self.config
        given = view.poisoned_train
        order = content_order(given.images, given.labels)
        data, stages = given.subset(order), _Stages(view, cfg)
        n = len(data)

        losses = self._losses(view, data, stages)
        rank = losses.argsort(stable=True)
        isolated = torch.zeros(n, dtype=torch.bool)
        isolated[rank[: int(cfg.isolate * n)]] = True
        pseudo = self._pseudo_labels(view, data, rank, isolated, stages)

        labels = data.labels.clone()
        at = isolated.to(labels.device)
        labels[at] = pseudo.to(labels.device)[at]
        marked = labels != data.labels
        model = view.fresh_model()
        value = torch.full((view.image_size[0], 1, 1), cfg.stamp_value, device=view.device)
        program = Stamping(marked, value, cfg.stamp_size, cfg.cutout) if bool(marked.any()) or cfg.cutout else None
        recipe = sgd_recipe(view, cfg.batch_size, cfg.weight_decay).replace(
            epochs=cfg.epochs, lr=cfg.lr, schedule="cosine", t_max=cfg.epochs + _REST
        )
        stages.run("training", model, data.with_labels(labels), recipe, program)
        add(model, "stamp", value=tuple(value.flatten().tolist()), height=cfg.stamp_size, width=cfg.stamp_size)

        scores, flags = torch.empty(n), torch.empty(n, dtype=torch.bool)
        scores[order.cpu()], flags[order.cpu()] = -losses.float(), isolated
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            scores=scores,
            flags=flags,
            threshold=float(scores[flags].min()) if bool(flags.any()) else None,
            history=stages.history,
            info={
                "isolated": int(isolated.sum()),
                "relabelled": int(marked.sum()),
                "pseudo_labels": torch.bincount(pseudo[isolated], minlength=view.num_classes).tolist(),
                "seconds": stages.seconds,
            },
        )

    def _losses(self, view: DefenderView, data: ImageSet, stages: _Stages) -> Tensor:
        """Cross-entropy of each sample after the detection training, float64 ``[N]`` on the CPU."""
        cfg: NABConfig = self.config
        how = SimpleNamespace(loss=cfg.loss, flood=cfg.flood, gamma=cfg.gamma, per_sample=False, loss_trace=False)
        recipe = sgd_recipe(view, cfg.detect_batch, cfg.detect_weight_decay).replace(
            epochs=cfg.detect_epochs,
            lr=cfg.detect_lr,
            schedule="cosine",
            t_max=cfg.detect_epochs + _TAIL,
            augment=False,
        )
        model = view.fresh_model()
        stages.run("detection", model, data, recipe, Isolation(how))
        return sample_losses(model, data, view.device)

    def _pseudo_labels(
        self, view: DefenderView, data: ImageSet, rank: Tensor, isolated: Tensor, stages: _Stages
    ) -> Tensor:
        """A label for every sample, int64 ``[N]`` on the CPU; only those of isolated ones are used."""
        cfg: NABConfig = self.config
        if not bool(isolated.any()):
            return data.labels.cpu()
        if cfg.pseudo == "vd":
            clean, model = view.clean, view.fresh_model()
            recipe = sgd_recipe(view, min(cfg.batch_size, batch_size_for(len(clean))), cfg.weight_decay).replace(
                epochs=cfg.epochs, lr=cfg.lr, schedule="cosine", t_max=cfg.epochs + _REST
            )
            stages.run("clean", model, clean, recipe, None)
            return predict_labels(model, data, device=view.device)
        clock = time.perf_counter()
        encoder, rows = self_supervised(view, data, cfg)
        read = _projections(encoder, data, view)
        stages.note("ssl", rows, time.perf_counter() - clock)
        return nearest_centre(read, data.labels.cpu(), rank[int(cfg.centre_exclude * len(data)) :], view.num_classes)


def _projections(encoder: Encoder, data: ImageSet, view: DefenderView) -> Tensor:
    """Unit vectors float32 ``[N, d]`` on the CPU: eval mode, no augmentation."""
    return predict(encoder, data, device=view.device)


def nearest_centre(read: Tensor, labels: Tensor, trusted: Tensor, num_classes: int) -> Tensor:
    """The class whose mean is nearest to each sample, int64 ``[N]``.

    Args:
        read: float32 ``[N, d]``.
        labels: Given labels, int64 ``[N]``.
        trusted: Samples that make the means, int64 ``[M]``; a class without any is nobody's.
        num_classes: Number of classes.
    """
    counts = torch.bincount(labels[trusted], minlength=num_classes)
    sums = read.new_zeros(num_classes, read.shape[1]).index_add(0, labels[trusted], read[trusted])
    distance = torch.cdist(read, sums / counts.clamp(min=1)[:, None])
    return distance.masked_fill(counts == 0, torch.inf).argmin(dim=1)


class Stamping(Program):
    """Puts the stamp on marked samples, after the crops and flips that all get; cuts holes into all if asked.

    Args:
        marked: bool ``[N]``.
        value: Of the stamp, ``[C, 1, 1]``.
        side: Of the stamp, in pixels.
        cutout: Whether to cut holes.
    """

    def __init__(self, marked: Tensor, value: Tensor, side: int, cutout: bool) -> None:
        self.marked, self.value, self.side, self.cutout = marked, value, side, cutout

    def make_batch(self, batch: Batch) -> Batch:
        x = cut(batch.x) if self.cutout else batch.x
        ours = self.marked[batch.index][:, None, None, None]
        return batch.replace(x=torch.where(ours, stamped(x, self.value, self.side, self.side), x))

    def describe(self) -> dict[str, Any]:
        marks = content_hash({"marked": self.marked})
        stamp = [self.value.flatten().tolist(), self.side]
        return {**super().describe(), "marked": marks, "stamp": stamp, "cutout": self.cutout}


def cut(x: Tensor) -> Tensor:
    """Normalised images ``[B, C, H, W]`` with a hole at 0 of two pixels a side, less at an edge (Cutout of length 3 in
    its authors' code); draws from torch's global CPU generator."""
    n, _, height, width = x.shape
    centre = (torch.rand(2, n) * torch.tensor([[height], [width]])).long().to(x.device)

    def hole(size: int, at: Tensor) -> Tensor:
        place = torch.arange(size, device=x.device)
        return (place >= at[:, None] - 1) & (place < at[:, None] + 1)

    away = hole(height, centre[0])[:, :, None] & hole(width, centre[1])[:, None]
    return x.masked_fill(away[:, None], 0.0)


class _Stages:
    """The trainings, with what they have in common."""

    def __init__(self, view: DefenderView, config: NABConfig) -> None:
        self._view, self._config = view, config
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def run(self, name: str, model: Any, data: ImageSet, recipe: Recipe, program: Program | None) -> None:
        view, clock = self._view, time.perf_counter()
        with naming("nab", name, lower(self._config, "detect_lr" if name == "detection" else "lr")):
            done = train(
                model,
                data,
                recipe,
                seed=view.derive_seed(name),
                device=view.device,
                program=program,
                checkpoint=None if view.checkpoint is None else view.checkpoint / name,
                progress=view.progress,
                description=f"nab {name}",
            )
        self.note(name, done.history, time.perf_counter() - clock)

    def note(self, name: str, rows: list[dict[str, Any]], seconds: float) -> None:
        self.seconds[name] = seconds
        self.history += [{"phase": name, **row} for row in rows]
