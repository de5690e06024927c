"""NC: Neural Cleanse."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import normalize
from bbfast.defenses.base import Defense, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import DIGITS_LR, REFERENCE, TINY, FinetuneConfig, batch_size_for, finetune
from bbfast.defenses.mitigation._inversion import InversionSettings, Triggers, invert
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.metrics import anomaly_index
from bbfast.training.program import Batch, Program

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["NC", "NCConfig", "Stamping", "find_targets", "model_statistic", "unlearning_set"]


class NCConfig(FinetuneConfig):
    """Settings of Neural Cleanse.

    Args:
        mask_lr: Adam's learning rate for mask and pattern.
        init_cost: First weight of the mask's size in the loss.
        asr_threshold: Success rate at which a trigger counts as found.
        patience: Passes of success (failure) in a row after which the weight rises (falls).
        multiplier: Factor by which it rises; it falls by ``multiplier ** 1.5``.
        early_stop_threshold: A new size below this part of the best one counts as progress.
        early_stop_patience: Passes without progress after which a class is finished.
        inversion_epochs: Passes over the hold-out at most.
        norm_p: Norm of the mask in the loss and between passes, 1 or 2; the anomaly index is of L1 sizes anyhow.
        anomaly_threshold: Anomaly index above which a small trigger is a backdoor.
        median: Median of an even number of sizes: the ``average`` of the middle two, or the ``lower`` one as in torch
            and in the reference.
        augment: Random crops and flips during the inversion; a localised trigger is then optimised over shifted images.
        fallback: Trigger shown for a class that never reached ``asr_threshold``: of its last or (reference) first pass.
        classes: Classes to invert; None is all.
        class_chunk: Classes in one forward pass; None is what fits.
        unlearn_ratio: Part of the hold-out that is stamped in the unlearning.
        stamp: Stamp images in the unlearning ``after`` they are cropped and flipped, so that the trigger lies where it
            was found, or ``before`` as the reference does, which moves it and often cuts it off.
        unlearn_epochs: Passes of the unlearning (200 on Tiny ImageNet, 1 in the paper).
        unlearn_lr: Its learning rate (0.02 on the digits).
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {**REFERENCE, "augment": True, "fallback": "first_pass", "median": "lower", "stamp": "before"},
        "paper": {"unlearn_epochs": 1},
        "trojanzoo": {"multiplier": 1.5, "patience": 10, "asr_threshold": 0.99},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"unlearn_epochs": 200, **TINY},
        "digits": {"unlearn_lr": DIGITS_LR},
    }

    mask_lr: float = Field(0.1, gt=0)
    init_cost: float = Field(1e-3, ge=0)
    asr_threshold: float = Field(0.98, gt=0, le=1)
    patience: int = Field(5, ge=1)
    multiplier: float = Field(2.0, gt=1)
    early_stop_threshold: float = Field(0.99, gt=0, le=1)
    early_stop_patience: int = Field(25, ge=1)
    inversion_epochs: int = Field(80, ge=1)
    norm_p: Literal[1, 2] = 1
    anomaly_threshold: float = Field(2.0, gt=0)
    median: Literal["average", "lower"] = "average"
    augment: bool = False
    fallback: Literal["last_pass", "first_pass"] = "last_pass"
    classes: tuple[int, ...] | None = None
    class_chunk: int | None = Field(None, ge=1)
    unlearn_ratio: float = Field(0.2, gt=0, le=1)
    stamp: Literal["after", "before"] = "after"
    unlearn_epochs: int = Field(100, ge=0)
    unlearn_lr: float = Field(0.01, gt=0)


@register_defense("nc")
class NC(Defense):
    """Find for every class the smallest trigger, call a class with a far smaller one a target, and unlearn its trigger.

    1. For all classes in one batch, a mask and a pattern that turn 98 % of the hold-out into the class
       (:func:`bbfast.defenses.mitigation._inversion.invert`).
    2. Anomaly index of the masks' L1 norms: ``|L - median| / (1.4826 MAD)``; targets are the classes below the median
       with an index above 2.
    3. If there are any, fine-tuning on the hold-out, a fifth of it stamped with the triggers under its true labels.
       Without a target the model comes back as it was.

    As a detector of models: ``verdict`` is the decision, ``info["statistic"]`` the largest index of a class below the
    median, ``info["class_stat"]`` each class's size.

    The verdict rests on targets being the exception: an all-to-all attack has no outlier and is not found, and with
    fewer than about ten classes the index says little.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019. Deviations: see the card.
    """

    card = DefenseCard(
        title="Neural Cleanse",
        paper="Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, IEEE S&P 2019",
        year=2019,
        arxiv="",
        kinds=("mitigation", "model"),
        needs=frozenset({"model", "clean"}),
        summary="Recovers the smallest trigger of every class, calls outliers backdoors and unlearns them.",
        deviations=(
            "The model returned is the unlearned one; the reference trains it and then stores the backdoored weights.",
            "Images are stamped with the optimised trigger; the reference sends mask and pattern through PNG files "
            "with min-max scaling first.",
            "In the unlearning images are cropped and flipped before they are stamped, so that the trigger lies where "
            "it was found; the reference stamps first, and a crop then moves a corner trigger or cuts it off "
            "(stamp='before').",
            "No random crops and flips during the inversion, as in the paper; the reference has them "
            "(preset='reference').",
            "All classes are optimised in one batch on a common order of images; per class the steps are the same.",
            "The median of an even number of sizes is the average of the middle two; the reference takes the lower one "
            "(median='lower').",
            "A class that never reached the success threshold shows its last trigger (reference: its first) and is "
            "never called a target.",
            "Without an explicit batch size, batches shrink on hold-outs under about 1,500 images, so that a pass "
            "keeps about 8 steps.",
        ),
    )
    Config = NCConfig

    def check(self, view: DefenderView) -> None:
        chosen = self.config.classes
        if chosen is not None and (
            not chosen or len(set(chosen)) < len(chosen) or not _within(chosen, view.num_classes)
        ):
            raise ConfigError(
                f"defense nc: classes must be different numbers in 0..{view.num_classes - 1}, got {chosen}"
            )
        if len(view.clean) < 2:
            raise DataRequirementError(
                f"nc inverts triggers on at least 2 clean images, the hold-out has {len(view.clean)}"
            )

    def run(self, view: DefenderView) -> DefenseResult:
        config: NCConfig = self.config
        model, clean = view.model, view.clean
        start = time.perf_counter()
        triggers = self._invert(view)
        inversion_seconds = time.perf_counter() - start
        anomaly, targets = find_targets(triggers, config.anomaly_threshold, config.median)
        history: list[dict[str, Any]] = []
        if targets:
            images, program = unlearning_set(clean, triggers, targets, config.unlearn_ratio, config.stamp)
            history = finetune(
                model,
                images,
                view,
                config,
                epochs=config.unlearn_epochs,
                lr=config.unlearn_lr,
                tag="unlearning",
                slower=("unlearn_lr",),
                program=program,
            )
        names = triggers.classes.tolist()
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model,
            trigger={
                k: {
                    "mask": triggers.mask[i],
                    "pattern": triggers.pattern[i],
                    "norm": float(triggers.norm[i]),
                    "success": float(triggers.success[i]),
                }
                for i, k in enumerate(names)
            },
            verdict={
                "backdoored": bool(targets),
                "targets": targets,
                "anomaly": dict(zip(names, anomaly.tolist(), strict=True)),
            },
            history=history,
            info={
                "seconds_inversion": inversion_seconds,
                "seconds_unlearning": time.perf_counter() - start - inversion_seconds,
                "passes": dict(zip(names, triggers.passes.tolist(), strict=True)),
                "cost": dict(zip(names, triggers.cost.tolist(), strict=True)),
                "found": dict(zip(names, triggers.found.tolist(), strict=True)),
                "class_stat": dict(zip(names, triggers.norm.double().tolist(), strict=True)),
                "statistic": model_statistic(triggers, config.median),
                "threshold": config.anomaly_threshold,
            },
        )

    def _invert(self, view: DefenderView) -> Triggers:
        config: NCConfig = self.config
        clean = view.clean
        chosen = range(view.num_classes) if config.classes is None else config.classes
        names = {
            field: getattr(config, field) for field in InversionSettings.__dataclass_fields__ if hasattr(config, field)
        }
        settings = InversionSettings(
            **{
                **names,
                "batch_size": config.batch_size or batch_size_for(len(clean)),
                "precision": {"off": "fp32"}.get(config.amp, config.amp),
            }
        )
        return invert(
            view.model,
            clean,
            torch.tensor(list(chosen), device=view.device),
            settings,
            seed=view.derive_seed("inversion"),
            padding=view.padding,
            flip=view.flip,
            deterministic_only=view.recipe is not None and view.recipe.deterministic,
            checkpoint=view.checkpoint / "inversion" if view.checkpoint is not None else None,
            progress=view.progress,
            description=f"{view.method}: trigger inversion",
        )


def find_targets(triggers: Triggers, threshold: float, median: Literal["average", "lower"]) -> tuple[Tensor, list[int]]:
    """Anomaly index of every class, float64 ``[K]``, and the target classes by ascending size of their trigger.

    A target's trigger is smaller than the median by more than ``threshold`` robust standard deviations, and works: a
    small mask that turns no images is no trigger.
    """
    sizes = triggers.norm.double()
    anomaly: Tensor = anomaly_index(sizes, median=median)
    low: Tensor = anomaly_index(sizes, median=median, side="low")
    suspects = torch.nonzero((low > threshold) & triggers.found).flatten()
    ordered = suspects[torch.argsort(sizes[suspects], stable=True)]
    return anomaly, triggers.classes[ordered].tolist()


def model_statistic(triggers: Triggers, median: Literal["average", "lower"]) -> float:
    """How backdoored the model looks: the largest anomaly index of a class whose trigger works and is smaller than the
    median, 0 if there is none. Above the threshold exactly when there is a target."""
    low: Tensor = anomaly_index(triggers.norm.double(), median=median, side="low")
    return float(low.where(triggers.found, 0.0).max())


def unlearning_set(
    clean: ImageSet, triggers: Triggers, targets: list[int], ratio: float, stamp: Literal["after", "before"] = "after"
) -> tuple[ImageSet, Stamping | None]:
    """The hold-out with its last part stamped, once with each target's trigger, under its true labels.

    Args:
        clean: The hold-out, in random order.
        triggers: Recovered triggers.
        targets: Classes whose triggers are stamped.
        ratio: Part that is stamped, in ``(0, 1]``; at least one image.
        stamp: ``after`` leaves the images as they are, and the second value stamps batches when they have been cropped
            and flipped. ``before`` gives stamped images, rounded to 8 bits as every stored image is.

    Returns:
        The images, and what is to be done to each batch of them.
    """
    first = len(clean) - max(1, int(ratio * len(clean)))
    names = triggers.classes.tolist()
    rows = [names.index(target) for target in targets]
    mask, pattern = triggers.mask[rows].to(clean.device), triggers.pattern[rows].to(clean.device)
    rest = clean[first:]
    images = ImageSet(
        torch.cat([clean.images[:first], *[rest.images] * len(rows)]),
        torch.cat([clean.labels[:first], *[rest.labels] * len(rows)]),
        mean=clean.mean,
        std=clean.std,
    )
    owner = torch.arange(len(rows), device=clean.device).repeat_interleave(len(rest))
    if stamp == "after":
        return images, Stamping(mask, pattern, torch.cat([owner.new_full((first,), -1), owner]))
    stamped = ops.patch(images.images[first:], 255 * pattern[owner], mask[owner])
    return dataclasses.replace(images, images=torch.cat([images.images[:first], stamped])), None


class Stamping(Program):
    """Plain training that stamps some of the samples after they have been cropped, flipped and normalised.

    Args:
        mask: float ``[T, 1, H, W]``, 0..1.
        pattern: float ``[T, C, H, W]``, 0..1, pixel space.
        owner: int64 ``[N]``, the trigger that each sample is stamped with; -1 for none.
    """

    def __init__(self, mask: Tensor, pattern: Tensor, owner: Tensor) -> None:
        self._mask, self._pattern, self._owner = mask, pattern, owner

    def describe(self) -> dict[str, Any]:
        tensors = {"mask": self._mask, "pattern": self._pattern, "owner": self._owner}
        return {**super().describe(), "triggers": content_hash(tensors)}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._normalised = normalize(self._pattern, train.mean, train.std)

    def make_batch(self, batch: Batch) -> Batch:
        owner = self._owner[batch.index]
        which = owner.clamp(min=0)
        weight = self._mask[which] * (owner >= 0)[:, None, None, None]
        return batch.replace(x=torch.lerp(batch.x, self._normalised[which], weight.expand_as(batch.x)))


def _within(classes: tuple[int, ...], num_classes: int) -> bool:
    return all(0 <= k < num_classes for k in classes)
