"""The whole of an attack: poison, train, measure."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bbfast._record import method_version, versions
from bbfast.attacks.base import Attack, registry
from bbfast.attacks.poisoning import LabelRule, PoisonedSet, Role, check_seed
from bbfast.attacks.prerequisites import AttackContext, open_store, seeded_model
from bbfast.attacks.result import AttackResult
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import BackdoorSet
from bbfast.evaluation import evaluate
from bbfast.metrics import c_acc
from bbfast.store import Store
from bbfast.training import Recipe, TrainResult, predict_labels, train
from bbfast.training.callbacks import Callbacks
from bbfast.training.device import resolve_device

__all__ = ["attack", "data_record", "measured", "new_victim", "record"]


def attack(
    attack: str | Attack,
    data: DataPair,
    model: str | nn.Module = "preactresnet18",
    recipe: Recipe | str | None = None,
    seed: int = 0,
    device: torch.device | str = "auto",
    *,
    checkpoint: str | Path | None = None,
    store: Store | str | Path | bool | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Any] = (),
) -> AttackResult:
    """Backdoor a model: poison the data or the training, train, and measure C-Acc, ASR and R-Acc.

    Everything that can be wrong with the arguments is raised before any work. The same arguments give the same result;
    with ``recipe.deterministic`` bit for bit.

    Args:
        attack: Name, or an attack with its settings (left as it is).
        data: Clean training and test set.
        model: Name of a model, or a module (copied, and trained from the weights it has).
        recipe: How to train; a name takes that preset for the data set, None is ``"paper"``. Where an attack's own
            paper replaces settings of the recipe (WaNet: constant learning rate), it does so in the ``paper`` preset
            only.
        seed: Seed of everything: choice of samples, trigger, initial weights, order of batches.
        device: Where to train.
        checkpoint: Folder of a checkpoint; a run that was killed goes on when called again.
        store: Where what the attack needs (a surrogate, an encoder) is kept and found again: a store or its folder;
            None is a folder in the user's cache (``BBFAST_CACHE``); False keeps nothing.
        progress: Progress bars; None shows them on a terminal.
        callbacks: As in :func:`bbfast.train`; ``on_poisoned(flags)``, bool ``[N]``, is called before the training of a
            poison-only attack.

    Returns:
        The model, the poisoned data, the backdoor test set and the metrics.

    Raises:
        UnknownNameError: if there is no attack, model or preset of that name; with the nearest names.
        ConfigError, ValueError, TypeError: if settings do not fit the data.
    """
    started = time.perf_counter()
    check_seed(seed)
    method = copy.copy(attack) if isinstance(attack, Attack) else registry.get(attack)()
    if not isinstance(data, DataPair):
        raise TypeError(f"data must be a DataPair, from bbfast.datasets.load, got {type(data).__name__}")
    where = resolve_device(device)
    used = _recipe(method, recipe, data, model)
    method.check(data.train, data.num_classes, seed, used.batch_size)
    rule = method.rule(data.train.labels, data.num_classes)
    rule.check_labels(data.test.labels)
    victim = new_victim(model, data, seed)

    work = None if checkpoint is None else Path(checkpoint)
    context = AttackContext(
        where,
        lambda other: new_victim(model, data, other),
        used,
        data.name,
        data.test,
        open_store(store),
        progress,
        _name(model),
    )
    method.prepare(data.train, rule.num_classes, seed, context)
    program = method.program(rule)
    poisoned = None if program is not None else method.poison(data.train, seed, rule.num_classes)
    if poisoned is not None:
        program = method.poisoned_program(poisoned)
        Callbacks(callbacks).poisoned(poisoned.poisoned)
    trained = train(
        victim,
        data.train if poisoned is None else poisoned.as_imageset(),
        used,
        test=data.test,
        backdoor_test=None if method.learns_trigger else method.backdoor_test(data.test, seed, rule.num_classes),
        seed=seed,
        device=where,
        callbacks=callbacks,
        program=program,
        checkpoint=work and work / "training",
        progress=progress,
        description=f"{method.name} on {data.name}",
    )
    if poisoned is None:
        poisoned = method.export_train(data.train, seed, rule.num_classes, used.batch_size)
    config = record(method, data, model, trained.model, used, seed, where)
    return measured(method, data, rule, seed, poisoned, trained, config, started, where)


def measured(
    method: Attack,
    data: DataPair,
    rule: LabelRule,
    seed: int,
    poisoned: PoisonedSet,
    trained: TrainResult,
    config: dict[str, Any],
    started: float,
    device: torch.device,
) -> AttackResult:
    """The result of a training that is over: what it reaches on both test sets, and all that belongs to it."""
    model = trained.model.eval()
    backdoor_test: BackdoorSet = method.backdoor_test(data.test, seed, rule.num_classes)
    metrics = dict(evaluate(model, data.test, backdoor_test, device=device))
    for name, extra in method.extra_tests(data.test, seed, rule.num_classes).items():
        metrics[name] = c_acc(predict_labels(model, extra, device=device), extra.labels)
    metrics["poison_ratio"] = poisoned.ratio
    metrics["seconds"] = time.perf_counter() - started + trained.earlier_seconds
    metrics["seconds_per_epoch"] = trained.seconds_per_epoch
    return AttackResult(
        model=model,
        train=poisoned.as_imageset(),
        poisoned=poisoned.poisoned,
        original_labels=poisoned.original_labels,
        role=poisoned.role,
        clean_images=data.train.images[poisoned.role != int(Role.CLEAN)],
        test=data.test,
        backdoor_test=backdoor_test,
        metrics=metrics,
        config=config,
        history=list(trained.history),
        trigger_state=method.state(),
    )


def _recipe(method: Attack, recipe: Recipe | str | None, data: DataPair, model: str | nn.Module) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None and not isinstance(recipe, str):
        raise TypeError(f"recipe must be a Recipe, the name of a preset or None, got {type(recipe).__name__}")
    preset = Recipe.preset(recipe or "paper", dataset=data.name, model=_name(model), compat=method.config.compat)
    return preset if recipe == "quick" else preset.replace(**method.recipe_overrides(preset))


def new_victim(model: str | nn.Module, data: DataPair, seed: int) -> nn.Module:
    """A new model of the architecture, the same one for the same seed; or a copy of the module given."""
    if isinstance(model, str):
        return seeded_model(model, data.num_classes, data.train.image_size, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a torch.nn.Module, got {type(model).__name__}")
    spec = getattr(model, "bbfast_spec", None)
    if spec is not None and spec.num_classes != data.num_classes:
        raise ValueError(f"model must have one output for each of {data.num_classes} classes, got {spec.num_classes}")
    return copy.deepcopy(model)


def _name(model: str | nn.Module) -> str:
    if isinstance(model, str):
        return model
    spec = getattr(model, "bbfast_spec", None)
    return type(model).__name__ if spec is None else str(spec.name)


def record(
    method: Attack,
    data: DataPair,
    asked: str | nn.Module,
    model: nn.Module,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the result was made with."""
    spec = getattr(model, "bbfast_spec", None)
    return {
        "attack": method.name,
        "attack_config": method.config.model_dump(mode="json"),
        "attack_files": method.files(),
        **method_version("attack", method.version),
        "model": {"name": _name(asked)} if spec is None else spec.to_dict(),
        "recipe": recipe.model_dump(mode="json"),
        "data": data_record(data),
        "seed": seed,
        "device": str(device),
        "versions": versions(method.version, device),
    }


def data_record(data: DataPair) -> dict[str, Any]:
    """What a result records about its data."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "image_size": list(data.image_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "flip": data.flip,
        "padding": data.padding,
    }
