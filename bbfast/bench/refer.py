"""Which results a plan refers to, told by what they record: nothing need be noted, and no data be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbfast._hashing import sha256_json
from bbfast.bench.plan import Plan, Task
from bbfast.bench.stages import recipe_for

__all__ = ["recorded", "wanted"]


def wanted(plan: Plan) -> set[str]:
    """What :func:`recorded` gives for the results of the plan's stages, of whatever version of their data."""
    made = {key: _attack(task) for key, task in plan.tasks.items() if task.kind == "attack"}
    return {
        sha256_json(made[key] if task.parent is None else _defense(task, made[task.parent]))
        for key, task in plan.tasks.items()
    }


def recorded(config: Mapping[str, Any]) -> str:
    """Hash of the recorded settings that decide which stage made a result, without the data's fingerprint.

    Args:
        config: Of an attack's or a defense's result.
    """
    if "defense" not in config:
        return sha256_json(_of_attack(config))
    return sha256_json({"attack": _of_attack(config["attack"]), **_of_defense(config)})


def _of_attack(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: config.get(key) for key in ("attack", "attack_config", "recipe", "seed")},
        "version": config.get("attack_version", 1),
        "model": config["model"]["name"],
        "data": config["data"]["name"],
    }


def _of_defense(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: config.get(key) for key in ("defense", "defense_config", "clean_fraction", "seed")},
        "version": config.get("defense_version", 1),
    }


def _attack(task: Task) -> dict[str, Any]:
    from bbfast import attacks

    spec = task.spec
    settings, data = dict(spec["attack"]["settings"]), _data_name(spec["data"])
    control = {"ratio": 0.0, "count": None} if settings["ratio"] == 0 else {}
    if control:
        del settings["ratio"]
    method = attacks.create(spec["attack"]["name"], **settings)
    recipe = recipe_for(method, spec["preset"], data, spec["model"]).replace(**spec["recipe"])
    return {
        "attack": method.name,
        "attack_config": {**method.config.model_dump(mode="json"), **control},
        "recipe": recipe.model_dump(mode="json"),
        "seed": spec["seed"],
        "version": method.version,
        "model": spec["model"],
        "data": data,
    }


def _defense(task: Task, attack: Mapping[str, Any]) -> dict[str, Any]:
    from bbfast import defenses

    spec = task.spec
    method = defenses.create(spec["defense"]["name"], **spec["defense"]["settings"]).for_dataset(attack["data"])
    own = {"defense": method.name, "defense_config": method.config.model_dump(mode="json"), "version": method.version}
    return {"attack": attack, **own, "clean_fraction": spec["clean_fraction"], "seed": spec["seed"]}


def _data_name(spec: Mapping[str, Any]) -> str:
    """What a data set is called once it is read: a file or folder of one's own is called by its name."""
    if spec["name"] not in ("npz", "image_folder") or spec["root"] is None:
        return str(spec["name"])
    place = Path(spec["root"]).expanduser().absolute()
    return str(spec["options"].get("dataset_name") or (place.stem if spec["name"] == "npz" else place.name))
