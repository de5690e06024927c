"""From flags to a clean model: what any detector found is left out of a new training, or unlearned."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from bbfast._config import build_config
from bbfast.defenses._content import content_keys
from bbfast.defenses._retrain import demand_recipe, retrain
from bbfast.defenses.base import Defense, DefenseConfig
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.run import defend
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult
    from bbfast.training import Recipe

__all__ = ["filter_and_retrain", "unlearn"]

_log = logging.getLogger(__name__)


def filter_and_retrain(
    attack_result: AttackResult | str | Path,
    flags: Tensor | DefenseResult,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    *,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> DefenseResult:
    """Train a fresh model of the same architecture on the samples that are not flagged.

    ::

        found = bbfast.defend("spectre", attack_result)
        repaired = bbfast.defenses.filter_and_retrain(attack_result, found)

    Args:
        attack_result: Result of an attack, or its folder.
        flags: Which training samples to leave out: bool ``[N]``, or a detector's result on this attack.
        recipe: How to train; default the recipe of the attacked model.
        seed: Seed of initial weights, order and augmentation.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        checkpoint: Folder in which an interrupted training is kept; the same call goes on from there.
        progress: Show progress bars: None decides by the terminal.

    Returns:
        The model with its metrics, as :func:`bbfast.defend` gives them, and the flags (and scores, if a result was
        given) with theirs.

    Raises:
        TypeError, ValueError: if the flags are not bool, or not one for each training sample.
        DataRequirementError: if everything is flagged, or neither ``recipe`` nor the attack result has a recipe.
        UnsupportedModelError: if the model carries no plan to build it anew.
    """
    return _defend(_Filter(flags), attack_result, seed, device, checkpoint, progress, recipe)


def unlearn(
    attack_result: AttackResult | str | Path,
    flags: Tensor | DefenseResult,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    *,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> DefenseResult:
    """Make the attacked model forget the flagged samples: the last phase of Anti-Backdoor Learning, gradient ascent.

    Ascent knows no bounds and takes clean accuracy with it, the more so the more clean samples are flagged: it suits a
    small set of which nearly all is poison. With nothing flagged the model stays as it is.

    Args:
        attack_result: Result of an attack, or its folder.
        flags: Which training samples to forget: bool ``[N]``, or a detector's result on this attack.
        recipe: Gives precision, memory layout and determinism; default the recipe of the attacked model.
        seed: Seed of order and augmentation.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        checkpoint: Folder in which an interrupted run is kept; the same call goes on from there.
        progress: Show progress bars: None decides by the terminal.
        **settings: ``unlearn_epochs`` (20), ``lr_unlearn`` (1e-4), ``batch_size`` (256), ``weight_decay`` (1e-4) as in
            ``abl``; ``ascent_stop`` (None): loss on the flagged samples above which ascent ends, 10 is sensible.

    Returns:
        As :func:`filter_and_retrain` does; ``info["unlearn_epochs"]`` says how many epochs there were.

    Raises:
        ConfigError: if a setting is unknown or out of range.
        TypeError, ValueError: if the flags are not bool, or not one for each training sample.
        DataRequirementError: if exactly one sample is flagged, of which a BatchNorm has no statistics.
        DivergedError: if the loss stops being finite.

    Source: Li et al., NeurIPS 2021, arXiv 2110.11571, section 3.
    """
    method = _Unlearn(flags, build_config(_Unlearn.Config, "unlearn", settings))
    return _defend(method, attack_result, seed, device, checkpoint, progress, recipe)


class _Composed(Defense):
    """A defense that is given flags. Not registered: there is no default for them."""

    def __init__(self, flags: Tensor | DefenseResult, config: DefenseConfig | None = None) -> None:
        super().__init__(config)
        self.origin = flags if isinstance(flags, DefenseResult) else None
        given = flags.flags if isinstance(flags, DefenseResult) else flags
        if not isinstance(given, Tensor) or given.dtype != torch.bool or given.dim() != 1:
            got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__qualname__
            raise TypeError(f"{self.name}: flags must be a bool tensor [N] or a result that has one, got {got}")
        self.flags = given.detach().cpu().clone()

    def check(self, view: DefenderView) -> None:
        n = len(view.poisoned_train)
        if len(self.flags) != n or (self.origin is not None and self.origin.metrics.get("population") == "stream"):
            raise ValueError(
                f"{self.name}: flags must be of the {n} training samples, got {len(self.flags)}"
                + ("" if self.origin is None else f" of a result of kind {self.origin.kind!r}")
            )

    def result(self, **fields: Any) -> DefenseResult:
        found = self.origin
        return DefenseResult(
            kind=self.card.kinds[0],
            flags=self.flags,
            scores=None if found is None else found.scores,
            threshold=None if found is None else found.threshold,
            **fields,
        )

    def recorded(self) -> dict[str, Any]:
        """What the result is determined by besides the settings."""
        detector = None if self.origin is None else self.origin.config.get("defense")
        digest = hashlib.sha256(self.flags.numpy().tobytes()).hexdigest()
        return {"count": int(self.flags.sum()), "sha256": digest, "detector": detector}


class _Filter(_Composed):
    name = "filter_and_retrain"
    card = DefenseCard(
        title="Filter and retrain",
        paper="the mitigation of Activation Clustering, Spectral Signatures and others",
        year=None,
        arxiv="",
        kinds=("training",),
        needs=frozenset({"poisoned_train", "fresh_model"}),
        summary="Trains a fresh model without the flagged samples.",
    )

    def check(self, view: DefenderView) -> None:
        super().check(view)
        demand_recipe(view, self.name)

    def run(self, view: DefenderView) -> DefenseResult:
        clock = time.perf_counter()
        model, history = retrain(view, ~self.flags, self.name)
        return self.result(
            model=model,
            history=history,
            info={"removed": int(self.flags.sum()), "seconds": {"retrain": time.perf_counter() - clock}},
        )


class _Unlearn(_Composed):
    name = "unlearn"
    card = DefenseCard(
        title="Unlearning",
        paper="Li et al., Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021",
        year=2021,
        arxiv="2110.11571",
        kinds=("mitigation",),
        needs=frozenset({"model", "poisoned_train"}),
        summary="Gradient ascent on the flagged samples.",
    )

    class Config(DefenseConfig):
        """Settings of unlearning; see :func:`unlearn`."""

        unlearn_epochs: int = Field(20, ge=0)
        lr_unlearn: float = Field(1e-4, gt=0)
        batch_size: int = Field(256, ge=2)
        weight_decay: float = Field(1e-4, ge=0)
        ascent_stop: float | None = Field(None, gt=0)

    def check(self, view: DefenderView) -> None:
        super().check(view)
        if int(self.flags.sum()) == 1:
            raise DataRequirementError("unlearn: only 1 sample is flagged; ascent takes at least 2")

    def run(self, view: DefenderView) -> DefenseResult:
        from bbfast.defenses.training._unlearn import ascend, sgd_recipe

        cfg, clock = self.config, time.perf_counter()
        flagged = view.poisoned_train.subset(self.flags)
        # By content, so that the storage order of the training set does not matter.
        order = flagged.labels.argsort(stable=True)
        flagged = flagged.subset(order[content_keys(flagged.images)[order].argsort(stable=True)])
        model, rows, epochs = view.model, [], 0
        if len(flagged):
            recipe = sgd_recipe(view, cfg.batch_size, cfg.weight_decay)
            recipe = recipe.replace(epochs=cfg.unlearn_epochs, lr=cfg.lr_unlearn)
            done = ascend(view, model, flagged, recipe, cfg.ascent_stop, self.name)
            rows, epochs = done.rows, done.epochs
        else:
            _log.warning("unlearn: nothing is flagged, the model stays as it is")
        return self.result(
            model=model.eval(),
            history=rows,
            info={
                "unlearned": len(flagged),
                "unlearn_epochs": epochs,
                "seconds": {"unlearn": time.perf_counter() - clock},
            },
        )


def _defend(
    method: _Composed,
    attack_result: AttackResult | str | Path,
    seed: int,
    device: str | torch.device,
    checkpoint: str | Path | None,
    progress: bool | None,
    recipe: Recipe | None,
) -> DefenseResult:
    result = defend(
        method, attack_result, seed=seed, device=device, checkpoint=checkpoint, progress=progress, recipe=recipe
    )
    result.config["flags"] = method.recorded()
    return result
