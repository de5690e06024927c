"""An attack or a defense as a stage of a store: made once, found again by what determines it.

Nothing here knows of terminals, apart from the lines that ``say`` is called with.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from bbfast._record import method_version
from bbfast.errors import ArtifactError, BBFastError
from bbfast.store import Store

if TYPE_CHECKING:
    from torch import nn

    from bbfast.attacks import Attack, AttackResult
    from bbfast.data import DataPair
    from bbfast.defenses import Defense, DefenseResult, FeatureCache
    from bbfast.training import Recipe

__all__ = [
    "Made",
    "attack_place",
    "attack_stage",
    "defense_place",
    "defense_stage",
    "find_attack",
    "identity",
    "recipe_for",
    "victim",
]

ATTACK, DEFENSE = "attack", "defense"
Say = Callable[[str], None]


class _Result(Protocol):
    def save(self, folder: Path, /, *, overwrite: bool = ...) -> Path: ...


R = TypeVar("R", bound=_Result)


@dataclass(frozen=True)
class Made(Generic[R]):
    """A stage's result, where it lies, and whether it was there already."""

    result: R
    folder: Path
    reused: bool


def attack_stage(
    store: Store,
    attack: Attack,
    data: DataPair,
    model: str,
    recipe: Recipe,
    *,
    pretrained: bool = False,
    control: bool = False,
    seed: int = 0,
    device: str = "auto",
    fresh: bool = False,
    progress: bool | None = None,
    say: Say = lambda line: None,
    about: str = "",
) -> Made[AttackResult]:
    """The attack's result from ``store``, made now if it is not there.

    Args:
        store: Where results lie; checkpoints of an unfinished run lie in its work folder, and a killed run goes on.
        attack: The attack with its settings.
        data: Clean training and test set.
        model: Name of the model.
        recipe: How it is trained.
        pretrained: Start from ImageNet weights.
        control: Its row at ratio 0 (:func:`bbfast.attacks.control`) instead.
        seed: Seed of everything random.
        device: Where to train. Not part of what a result is found by.
        fresh: Make it anew even if it is there; what is there is replaced when the new one is whole.
        progress: As in :func:`bbfast.train`.
        say: Called with a line about what is done.
        about: What that line says of the work when it starts.

    Raises:
        BBFastError, ValueError: as :func:`bbfast.attack` and the store do.
    """
    from bbfast.attacks import AttackResult
    from bbfast.attacks import attack as run
    from bbfast.attacks import control as unpoisoned

    config = _attack_config(attack, data, model, recipe, pretrained, control)

    def make(work: Path) -> AttackResult:
        trained = victim(model, data, seed) if pretrained else model
        if control:
            return unpoisoned(attack, data, trained, recipe, seed, device, store=store, progress=progress)
        return run(attack, data, trained, recipe, seed, device, checkpoint=work, store=store, progress=progress)

    return _stage(store, ATTACK, attack.name, config, seed, make, AttackResult.load, fresh, say, about)


def defense_stage(
    store: Store,
    defense: Defense,
    attack: AttackResult,
    *,
    clean_fraction: float = 0.05,
    seed: int = 0,
    device: str = "auto",
    fresh: bool = False,
    progress: bool | None = None,
    cache: FeatureCache | None = None,
    say: Say = lambda line: None,
    about: str = "",
) -> Made[DefenseResult]:
    """The defense's result from ``store``, made now if it is not there; arguments as of :func:`attack_stage`.

    Args:
        defense: The defense with its settings.
        attack: What it defends.
        clean_fraction: Part of the clean training set that the defender holds.
        cache: Features shared with other defenses of the same attack.
    """
    from bbfast.defenses import DefenseResult, defend

    config = _defense_config(defense, attack.config, clean_fraction)

    def make(work: Path) -> DefenseResult:
        return defend(
            defense, attack, clean_fraction, seed, device, checkpoint=work, progress=progress, cache=cache, store=store
        )

    return _stage(store, DEFENSE, defense.name, config, seed, make, DefenseResult.load, fresh, say, about)


def attack_place(
    store: Store,
    attack: Attack,
    data: DataPair,
    model: str,
    recipe: Recipe,
    *,
    pretrained: bool = False,
    control: bool = False,
    seed: int = 0,
) -> Path:
    """Where :func:`attack_stage` keeps its result."""
    key = store.key(ATTACK, _attack_config(attack, data, model, recipe, pretrained, control), seed=seed)
    return store.path(ATTACK, attack.name, key)


def defense_place(
    store: Store, defense: Defense, attack_config: Mapping[str, Any], *, clean_fraction: float = 0.05, seed: int = 0
) -> Path:
    """Where :func:`defense_stage` keeps its result; ``attack_config`` is the attack result's."""
    key = store.key(DEFENSE, _defense_config(defense, attack_config, clean_fraction), seed=seed)
    return store.path(DEFENSE, defense.name, key)


def _attack_config(
    attack: Attack, data: DataPair, model: str, recipe: Recipe, pretrained: bool, control: bool
) -> dict[str, Any]:
    unpoisoned = {"ratio": 0.0, "count": None} if control else {}
    return {
        "attack": attack.name,
        "attack_config": {**attack.config.model_dump(mode="json"), **unpoisoned},
        "attack_files": attack.files(),
        **method_version(ATTACK, attack.version),
        "model": {"name": model, "pretrained": pretrained},
        "recipe": recipe.model_dump(mode="json"),
        "data": {key: getattr(data, key) for key in ("name", "fingerprint", "mean", "std", "flip", "padding")},
    }


def _defense_config(defense: Defense, attack_config: Mapping[str, Any], clean_fraction: float) -> dict[str, Any]:
    settings = defense.for_dataset(str(attack_config["data"]["name"])).config
    return {
        "attack": identity(attack_config),
        "defense": defense.name,
        "defense_config": settings.model_dump(mode="json"),
        **method_version(DEFENSE, defense.version),
        "clean_fraction": clean_fraction,
    }


def identity(attack_config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one attack from another: its recorded settings without where and with which versions it was made."""
    return {key: value for key, value in attack_config.items() if key not in ("device", "versions")}


def recipe_for(attack: Attack, preset: str, dataset: str, model: str) -> Recipe:
    """The named recipe for a data set and model, with what the attack's own paper replaces in the ``paper`` one."""
    from bbfast.training import Recipe

    recipe = Recipe.preset(preset, dataset=dataset, model=model, compat=attack.config.compat)
    return recipe if preset == "quick" else recipe.replace(**attack.recipe_overrides(recipe))


def victim(model: str, data: DataPair, seed: int) -> nn.Module:
    """A model with ImageNet weights and a new head, the same one for the same seed."""
    import torch

    from bbfast import models
    from bbfast.data.loader import derive_seed

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("model", seed))
        return models.build(model, data.num_classes, data.image_size, pretrained=True)


def find_attack(store: Store, defense_config: Mapping[str, Any]) -> Path:
    """The folder of the attack that a defense was run on.

    Raises:
        ArtifactError: if it is not in ``store``.
    """
    from bbfast import artifact
    from bbfast._hashing import sha256_json

    wanted = sha256_json(identity(defense_config["attack"]))
    for entry in store.list(ATTACK, str(defense_config["attack"]["attack"])):
        # One damaged result must not hide the others.
        with contextlib.suppress(BBFastError):
            if sha256_json(identity(artifact.read(entry.path, ATTACK, verify="lazy").config)) == wanted:
                return entry.path
    raise ArtifactError(
        f"the attack that this defense was run on is not in {store.root}; name its folder with --attack"
    )


def _stage(
    store: Store,
    stage: str,
    name: str,
    config: Mapping[str, Any],
    seed: int,
    make: Callable[[Path], R],
    load: Callable[[Path], R],
    fresh: bool,
    say: Say,
    about: str,
) -> Made[R]:
    key = store.key(stage, config, seed=seed)
    folder = store.path(stage, name, key)
    made: list[R] = []

    def tracked(work: Path) -> R:
        resumes = any(work.iterdir())
        say(
            f"{stage} {name}: {about or 'running'}" + (", going on where an interrupted run stopped" if resumes else "")
        )
        made.append(make(work))
        return made[0]

    on_wait = _told_once(say, f"{stage} {name}: another process is making the same result; waiting for it")
    if fresh:
        with store.lock(key, on_wait=on_wait):
            # A checkpoint is part of what shall not be used.
            shutil.rmtree(store.work(key))
            tracked(store.work(key)).save(folder, overwrite=True)
            shutil.rmtree(store.work(key), ignore_errors=True)
    else:
        store.get_or_make(stage, name, config, tracked, seed=seed, kind=stage, on_wait=on_wait)
    if made:
        return Made(made[0], folder, reused=False)
    say(f"{stage} {name}: already in {folder}, not run again (--fresh runs it)")
    return Made(load(folder), folder, reused=True)


def _told_once(say: Say, line: str) -> Callable[[float], None]:
    """A callback for a lock that is taken: the first call says ``line``."""
    told: list[float] = []

    def on_wait(seconds: float) -> None:
        if not told:
            say(line)
        told.append(seconds)

    return on_wait
