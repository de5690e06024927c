"""One stage of a benchmark, done in a worker: what it is given is plain JSON, and so is what it gives back."""

from __future__ import annotations

import errno
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from bbfast import artifact
from bbfast._hashing import canonical_json
from bbfast.bench.outcomes import Outcome
from bbfast.bench.stages import attack_place, attack_stage, defense_place, defense_stage, recipe_for
from bbfast.errors import (
    ArtifactError,
    BBFastError,
    CorruptArtifactError,
    DataRequirementError,
    DatasetError,
    UnsupportedModelError,
)
from bbfast.store import Store

if TYPE_CHECKING:
    from bbfast.attacks import Attack, AttackResult
    from bbfast.data import DataPair
    from bbfast.defenses import Defense, FeatureCache

__all__ = ["Memory", "failure", "perform"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
M = TypeVar("M", "Attack", "Defense")


class Memory:
    """What a worker keeps from one stage to the next: the last data set, the last attack and features of its sets."""

    def __init__(self) -> None:
        self._data: tuple[str, DataPair] | None = None
        self._attack: tuple[str, AttackResult, FeatureCache] | None = None

    def data(self, spec: Mapping[str, Any]) -> DataPair:
        from bbfast import datasets

        name = canonical_json(spec)
        if self._data is None or self._data[0] != name:
            self._data = None  # before the next is read: there may not be room for two
            self._data = (name, datasets.load(spec["name"], spec["root"], **spec["options"]))
        return self._data[1]

    def attack(self, folder: Path) -> tuple[AttackResult, FeatureCache]:
        from bbfast.attacks import AttackResult
        from bbfast.defenses import FeatureCache

        if self._attack is None or self._attack[0] != str(folder):
            self._attack = None
            self._attack = (str(folder), AttackResult.load(folder), FeatureCache())
        return self._attack[1:]


def perform(task: Mapping[str, Any], root: str, memory: Memory) -> Outcome:
    """Do a stage, or find it done: a result that is there is read whole first, and made anew if it is damaged.

    Args:
        task: ``kind`` and ``spec`` of a :class:`bbfast.bench.plan.Task`; for a defense ``parent``, the folder's name of
            the attack's result.
        root: The store.
        memory: Of this worker.

    Returns:
        The outcome; whatever goes wrong is in it, with its traceback. Only what ends the process is not.
    """
    try:
        step = _attack if task["kind"] == "attack" else _defense
        return step(task, Store(root), memory)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Outcome:
    """The outcome of a stage that raised ``error``."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if _disk_is_full(error):
        return Outcome("full", reason=f"{reason} (worker on {socket.gethostname()})")
    if isinstance(error, CorruptArtifactError):
        return Outcome("damaged", reason=str(error))
    if isinstance(error, DatasetError):
        reason += f" (worker on {socket.gethostname()})"  # other machines may have it
    return Outcome("failed", reason=reason, traceback="".join(traceback.format_exception(error)))


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came of, says so; safetensors does in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, SafetensorError) and any(f"os error {code})" in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _attack(task: Mapping[str, Any], store: Store, memory: Memory) -> Outcome:
    from bbfast import attacks

    spec = task["spec"]
    data = memory.data(spec["data"])
    settings = dict(spec["attack"]["settings"])
    if control := settings["ratio"] == 0:
        del settings["ratio"]  # no attack takes it; what the trigger is made with is the method's default
    method = _planned(attacks.create(spec["attack"]["name"], **settings), "attack", spec)
    recipe = recipe_for(method, spec["preset"], data.name, spec["model"]).replace(**spec["recipe"])
    try:
        # The refusals that a run begins with: they belong to the cell, not to this machine.
        asked = attacks.for_control(method) if control else method
        asked.check(data.train, data.num_classes, spec["seed"], recipe.batch_size)
    except ValueError as error:
        return Outcome("not_applicable", reason=str(error))
    own = {"control": control, "seed": spec["seed"]}
    folder = attack_place(store, method, data, spec["model"], recipe, **own)
    if not _there(store, folder):
        attack_stage(store, method, data, spec["model"], recipe, **own, device=spec["device"], progress=False)
    return Outcome("done", folder=folder.name)


def _defense(task: Mapping[str, Any], store: Store, memory: Memory) -> Outcome:
    from bbfast import defenses

    spec = task["spec"]
    method = _planned(defenses.create(spec["defense"]["name"], **spec["defense"]["settings"]), "defense", spec)
    source = store.root / task["parent"]
    own = {"clean_fraction": spec["clean_fraction"], "seed": spec["seed"]}
    folder = defense_place(store, method, _config(source), **own)
    if not _there(store, folder):
        attacked, cache = memory.attack(source)
        try:
            defense_stage(store, method, attacked, **own, device=spec["device"], progress=False, cache=cache)
        except (DataRequirementError, UnsupportedModelError) as error:
            return Outcome("not_applicable", reason=str(error))
    return Outcome("done", folder=folder.name)


def _there(store: Store, folder: Path) -> bool:
    """Whether a result stands there whole; a damaged one is put aside."""
    return artifact.exists(folder) and store.check(folder)


def _planned(method: M, kind: str, spec: Mapping[str, Any]) -> M:
    """The method, if it is of the version that was planned: a worker may have another bbfast than its runner."""
    planned = spec[kind].get(f"{kind}_version", 1)
    if method.version != planned:
        raise BBFastError(
            f"{kind} {method.name!r} has version {method.version} here, the runner planned version {planned}; install "
            "the runner's bbfast on every worker"
        )
    return method


def _config(folder: Path) -> dict[str, Any]:
    """The settings of a stored result, without its tensors."""
    config = artifact.read(folder, "attack", verify="lazy").config
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder} has no settings")
    return config
