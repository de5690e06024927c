"""Backdoor attacks: triggers, poisoned data, and models trained on them. One file a method; see docs/add_attack.md."""

from __future__ import annotations

import dataclasses
from typing import Any

from bbfast.attacks.base import Attack, AttackConfig, register_attack, registry
from bbfast.attacks.card import Card
from bbfast.attacks.control import control, for_control
from bbfast.attacks.poisoning import LabelRule, PoisonedSet, Role
from bbfast.attacks.prerequisites import AttackContext
from bbfast.attacks.result import AttackResult
from bbfast.attacks.run import attack

__all__ = [
    "Attack",
    "AttackConfig",
    "AttackContext",
    "AttackResult",
    "Card",
    "LabelRule",
    "PoisonedSet",
    "Role",
    "attack",
    "available",
    "control",
    "create",
    "for_control",
    "info",
    "register_attack",
]


def available() -> list[str]:
    """Names of all attacks, those of installed third-party packages included, sorted."""
    return registry.names()


def create(name: str, **config: Any) -> Attack:
    """An attack by name.

    Args:
        name: One of :func:`available`, or an alias ("badnet", "inputaware", "ftrojann").
        **config: Settings that differ from the defaults; :func:`info` lists them.

    Raises:
        UnknownNameError: with the nearest names.
        ConfigError: naming the setting, what was expected and what came.
    """
    return registry.get(name)(**config)


def info(name: str) -> dict[str, Any]:
    """Facts about an attack: its card, its settings' defaults and their JSON schema.

    Raises:
        UnknownNameError: with the nearest names.
    """
    cls = registry.get(name)
    defaults = {
        field: value.get_default(call_default_factory=True)
        for field, value in cls.Config.model_fields.items()
        if not value.is_required()
    }
    return {
        "name": cls.name,
        **dataclasses.asdict(cls.card),
        "defaults": defaults,
        "schema": cls.Config.model_json_schema(),
    }
