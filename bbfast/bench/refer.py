"""Which results a plan refers to, told by what they record: nothing need be noted, and no data be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bbfast._hashing import sha256_json
from bbfast.bench.identity import attack_identity, defense_identity
from bbfast.bench.plan import Plan

__all__ = ["recorded", "wanted"]


def wanted(plan: Plan) -> set[str]:
    """What :func:`recorded` gives for the results of the plan's stages, of whatever version of their data."""
    made = {key: attack_identity(task.spec) for key, task in plan.tasks.items() if task.kind == "attack"}
    return {
        sha256_json(made[key] if task.parent is None else {"attack": made[task.parent], **_defense(task.spec)})
        for key, task in plan.tasks.items()
    }


def _defense(spec: Mapping[str, Any]) -> dict[str, Any]:
    method = defense_identity(spec["defense"]["name"], spec["defense"]["settings"], spec["data"])
    return {**method, "clean_fraction": spec["clean_fraction"], "seed": spec["seed"]}


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
