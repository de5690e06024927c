"""The command line that gives a stored result again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from bbfast.errors import UnknownNameError

__all__ = ["attack_command", "changed_settings", "defense_command"]

_EMBEDDED = "digits"
_PRESETS = ("quick", "paper")
_UNKNOWN = object()
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")


def attack_command(config: Mapping[str, Any], store: str) -> str | None:
    """``bbfast attack ...`` for the result with this ``config``; None if it was not made by this library's training, or
    is a clean model under an attack's trigger (ratio 0), which only a grid makes.

    Args:
        config: Of an attack's result.
        store: Folder of results, as ``--out``.
    """
    from bbfast import attacks, datasets

    name, settings, data = str(config["attack"]), dict(config["attack_config"]), config["data"]
    if not config.get("recipe") or config["model"].get("name") is None or settings.get("ratio") == 0:
        return None
    try:
        known = attacks.create(name).config.model_dump(mode="json")
    except UnknownNameError:
        return None
    words = ["bbfast", "attack", name]
    if data["name"] in datasets.available():
        words += ["--dataset", str(data["name"]), *([] if data["name"] == _EMBEDDED else ["--root", "DATA"])]
    else:
        given = {key: data[key] for key in ("mean", "std", "flip", "padding")}
        words += ["--dataset", "npz", "--root", f"{data['name']}.npz", *_pairs("--data", given)]
    words += ["--model", str(config["model"]["name"])]
    words += ["--pretrained"] if config["model"].get("pretrained") else []
    if settings.get("ratio") is not None:
        words += ["--ratio", f"{settings.pop('ratio')!r}"]
    words += _pairs("--set", {key: value for key, value in settings.items() if known.get(key) != value})
    preset, changes = _recipe(config)
    words += ["--preset", preset, *_pairs("--recipe", changes)]
    words += ["--seed", str(config["seed"]), "--out", store]
    return shlex.join(words)


def defense_command(config: Mapping[str, Any], attack: str) -> str | None:
    """``bbfast defend ...`` for the result with this ``config``; None if its method is not known here.

    Args:
        config: Of a defense's result.
        attack: Folder of the attack's result.
    """
    from bbfast import defenses

    try:
        known = defenses.create(str(config["defense"]))
    except UnknownNameError:
        return None
    defaults = known.for_dataset(str(config["attack"]["data"]["name"])).config.model_dump(mode="json")
    changed = {key: value for key, value in config["defense_config"].items() if defaults.get(key) != value}
    words = ["bbfast", "defend", str(config["defense"]), "--attack", attack, *_pairs("--set", changed)]
    return shlex.join([*words, "--clean-fraction", f"{config['clean_fraction']:g}", "--seed", str(config["seed"])])


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a result's own method that are not its defaults, all of them if the method is not known; of an attack
    also what its recipe changes in the nearest preset.

    Left out is what tables have a column for, the poisoned share, and what changes no result (``eval_every``).
    """
    from bbfast import attacks, defenses

    try:
        if "defense" in config:
            plain = defenses.create(str(config["defense"])).for_dataset(str(config["attack"]["data"]["name"])).config
        else:
            plain = attacks.create(str(config["attack"])).config
        defaults = plain.model_dump(mode="json")
    except UnknownNameError:
        defaults = {}
    given = config["defense_config" if "defense" in config else "attack_config"]
    changed = {key: value for key, value in given.items() if key != "ratio" and defaults.get(key, _UNKNOWN) != value}
    if "defense" not in config and config.get("recipe") and defaults:
        changed |= {key: value for key, value in _recipe(config)[1].items() if key != "eval_every"}
    return changed


def _recipe(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset that is nearest to a recipe, and what to change in it."""
    from bbfast import attacks
    from bbfast.bench.stages import recipe_for

    # Ratio 0 is a grid's to ask for, and no recipe depends on how much is poisoned.
    settings = {key: value for key, value in config["attack_config"].items() if key not in ("ratio", "count")}
    method = attacks.create(str(config["attack"]), **settings)
    offers = []
    for preset in _PRESETS:
        plain = recipe_for(method, preset, str(config["data"]["name"]), str(config["model"]["name"]))
        dump = plain.model_dump(mode="json")
        offers.append((preset, {key: value for key, value in config["recipe"].items() if dump.get(key) != value}))
    return min(offers, key=lambda offer: len(offer[1]))


def _pairs(option: str, values: Mapping[str, Any]) -> list[str]:
    """``--set key=value`` for each; values as YAML reads them."""
    return [word for key, value in values.items() for word in (option, f"{key}={_yaml(value)}")]


def _yaml(value: Any) -> str:
    """A value that YAML reads back as the same one: plain words bare, everything else as JSON."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "null"):
        return value
    return json.dumps(value)
