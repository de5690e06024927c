"""What an attack is compared with at ratio 0: a model that was never poisoned, shown this attack's trigger."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.attacks.base import Attack
from bbfast.attacks.poisoning import PoisonedSet
from bbfast.attacks.prerequisites import AttackContext, open_store
from bbfast.attacks.result import AttackResult
from bbfast.attacks.run import measured, new_victim, record
from bbfast.attacks.surrogate import set_hash
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.models.state import load_state, model_state
from bbfast.store import Store
from bbfast.training import Program, Recipe, TrainResult, train
from bbfast.training.device import resolve_device

__all__ = ["control", "for_control"]

_SECONDS = "bbfast.seconds"
"""Kept with the weights: seconds of the training, whole and an epoch."""


def control(
    attack: Attack,
    data: DataPair,
    model: str | nn.Module,
    recipe: Recipe,
    seed: int = 0,
    device: torch.device | str = "auto",
    *,
    store: Store | str | Path | bool | None = None,
    progress: bool | None = None,
) -> AttackResult:
    """A clean model under an attack's trigger: the attack's row at ratio 0.

    The model starts from the weights of the attack's victims of that seed and is trained on the clean set, once for all
    attacks with the same recipe. It is not the attacker's own clean model (:mod:`bbfast.attacks.surrogate`), which has
    another seed: a trigger made by descending on a model's own weights would fool that model without any backdoor.

    Args:
        attack: The attack with its settings; its ratio plays no part but where the trigger follows from the choice of
            samples (sleeper_agent), and then is cut to what the class has.
        data: Clean training and test set.
        model: Name of a model, or a module, as in :func:`bbfast.attack`.
        recipe: How it is trained.
        seed: Of model, batches and trigger.
        device: Where to train.
        store: Where the clean model and what the trigger needs are kept, as in :func:`bbfast.attack`.
        progress: As in :func:`bbfast.train`.

    Returns:
        As of :func:`bbfast.attack`, with ``ratio`` 0, no poisoned sample and the clean training set; ``asr`` is the
        share of triggered images that the clean model takes for the target, ``seconds`` is without the training if
        another attack's control had made the model.

    Raises:
        ValueError: if there is no trigger without a poisoned model, or the settings do not fit the data.
    """
    started, where = time.perf_counter(), resolve_device(device)
    method = for_control(attack)
    method.check(data.train, data.num_classes, seed, recipe.batch_size)
    rule = method.rule(data.train.labels, data.num_classes)
    rule.check_labels(data.test.labels)
    victim = new_victim(model, data, seed)
    config = record(attack, data, model, victim, recipe, seed, where)
    config["attack_config"] = {**config["attack_config"], "ratio": 0.0, "count": None}
    context = AttackContext(
        where,
        lambda other: new_victim(model, data, other),
        recipe,
        data.name,
        data.test,
        open_store(store),
        progress,
        config["model"]["name"],
    )
    method.prepare(data.train, rule.num_classes, seed, context)
    clean = _unpoisoned(data.train)
    # What an attack assumes of its victim's training besides the data (BATT's augmentation) is no poison.
    program = method.poisoned_program(clean) if method.program(rule) is None else None
    trained = _clean_model(context, victim, data.train, seed, program or Program())
    return measured(method, data, rule, seed, clean, trained, config, started, where)


def for_control(attack: Attack) -> Attack:
    """The attack as its trigger is made where nothing is poisoned: a class that is too small is no obstacle.

    Raises:
        ValueError: if its trigger is learned together with the poisoned model.
    """
    if attack.learns_trigger:
        raise ValueError(
            f"{attack.name}: its trigger is learned together with the poisoned model, so there is none at ratio 0"
        )
    return type(attack)(attack.config.model_copy(update={"clip_to_class": True}))


def _clean_model(context: AttackContext, victim: nn.Module, data: ImageSet, seed: int, program: Program) -> TrainResult:
    recipe = context.recipe.replace(eval_every=0)
    identity = {
        "initial_weights": content_hash(victim.state_dict()),
        "network": type(victim).__qualname__,
        "recipe": recipe.model_dump(mode="json"),
        "data": set_hash(data),
        "normalisation": [data.mean, data.std],
        "program": program.describe(),
    }

    def make(work: Path) -> dict[str, Tensor]:
        trained = train(
            victim,
            data,
            recipe,
            seed=seed,
            device=context.device,
            program=program,
            checkpoint=work,
            progress=context.progress,
            description=f"clean model on {context.dataset}",
        )
        return {**model_state(victim), _SECONDS: torch.tensor([trained.seconds, trained.seconds_per_epoch])}

    state = dict(context.obtain("clean_model", identity, make, seed=seed))
    whole, epoch = state.pop(_SECONDS).tolist()
    load_state(victim, state)
    return TrainResult(victim.to(context.device), [], whole, epoch, context.device)


def _unpoisoned(train: ImageSet) -> PoisonedSet:
    none = torch.zeros_like(train.labels, dtype=torch.bool)
    return PoisonedSet(
        images=train.images,
        labels=train.labels,
        poisoned=none,
        original_labels=train.labels.clone(),
        role=torch.zeros_like(train.labels, dtype=torch.int8),
        mean=train.mean,
        std=train.std,
        ids=train.ids,
    )
