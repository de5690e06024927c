"""A defense of a model that was never poisoned: run once, whichever attack's trigger it is then judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bbfast._prerequisite import STAGE
from bbfast._record import method_version
from bbfast.defenses.base import Defense
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.store import Store

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult

__all__ = ["run_once", "triggerless"]


def triggerless(attack: AttackResult, defense: Defense) -> bool:
    """Whether nothing that the defense sees depends on the attack: ratio 0, and no stream of triggered images."""
    facts = attack.config.get("attack_config", {})
    spec = getattr(attack.model, "bbfast_spec", None)
    clean = facts.get("ratio") == 0 and not bool(attack.poisoned.any()) and spec is not None
    return clean and "stream" not in defense.card.needs and defense.evaluator is None


def run_once(
    store: Store, defense: Defense, attack: AttackResult, view: DefenderView, run: Callable[[], DefenseResult]
) -> DefenseResult:
    """What ``run`` gives, from ``store`` if the same defense has seen the same before; with its seconds of then.

    Args:
        store: Where it is kept.
        defense: The defense with its settings.
        attack: One that is :func:`triggerless`; only the description of its model is read.
        view: What the defense sees: weights and images are part of what the result is found by.
        run: Runs it.
    """
    config = {
        "defense": defense.name,
        "config": defense.config.model_dump(mode="json"),
        **method_version("defense", defense.version),
        "facts": dataclasses.asdict(view.facts),
        # Two architectures may have the same weights.
        "network": attack.model.bbfast_spec.to_dict(),  # type: ignore[union-attr,operator]
        "recipe": None if view.recipe is None else view.recipe.model_dump(mode="json"),
        "seen": view.fingerprint(),
    }
    made: list[DefenseResult] = []

    def make(folder: Path) -> DefenseResult:
        made.append(run())
        return made[0]

    name = f"{defense.name}_of_a_clean_model"
    store.get_or_make(STAGE, name, config, make, seed=view.seed, kind="defense")
    if made:
        return made[0]
    result = DefenseResult.load(store.path(STAGE, name, store.key(STAGE, config, seed=view.seed)))
    if result.model is not None:
        result.model.to(view.device)
    return result
