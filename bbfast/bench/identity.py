"""What the result of a stage will record of its settings, all of them, told before anything is read or made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbfast.bench.stages import recipe_for

__all__ = ["attack_identity", "defense_identity"]


def attack_identity(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an attack's stage with every default filled in.

    Args:
        spec: Of a :class:`bbfast.bench.plan.Task`.
    """
    from bbfast import attacks

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


def defense_identity(name: str, settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a defense on a data set with every default filled in.

    Args:
        name: Of the defense.
        settings: Those that were given.
        data: Name, root and options of the data set.
    """
    from bbfast import defenses

    method = defenses.create(name, **settings).for_dataset(_data_name(data))
    return {"defense": method.name, "defense_config": method.config.model_dump(mode="json"), "version": method.version}


def _data_name(spec: Mapping[str, Any]) -> str:
    """What a data set is called once it is read: a file or folder of one's own is called by its name."""
    if spec["name"] not in ("npz", "image_folder") or spec["root"] is None:
        return str(spec["name"])
    place = Path(spec["root"]).expanduser().absolute()
    return str(spec["options"].get("dataset_name") or (place.stem if spec["name"] == "npz" else place.name))
