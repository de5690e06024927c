"""bbfast: backdoor-learning research at GPU speed.

Attacks, defenses, the evaluation protocol and the fast native operations of backdoor learning, on today's PyTorch. The
names below are imported when first used: ``import bbfast`` costs nothing, ``import bbfast.ops`` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bbfast._version import __version__

if TYPE_CHECKING:
    from bbfast import (
        analysis,
        attacks,
        bench,
        datasets,
        defenses,
        errors,
        interop,
        metrics,
        models,
        ops,
        studies,
        transforms,
    )
    from bbfast.attacks import AttackResult, PoisonedSet, attack
    from bbfast.data import BackdoorSet, DataPair, ImageSet
    from bbfast.defenses import DefenderView, DefenseResult, defend, detect_all
    from bbfast.evaluation import evaluate
    from bbfast.store import Store
    from bbfast.training import Recipe, TrainResult, predict, train

_MODULES = (
    "analysis",
    "attacks",
    "bench",
    "datasets",
    "defenses",
    "errors",
    "interop",
    "metrics",
    "models",
    "ops",
    "studies",
    "transforms",
)
_NAMES = {
    "AttackResult": "bbfast.attacks",
    "BackdoorSet": "bbfast.data",
    "DataPair": "bbfast.data",
    "DefenderView": "bbfast.defenses",
    "DefenseResult": "bbfast.defenses",
    "ImageSet": "bbfast.data",
    "PoisonedSet": "bbfast.attacks",
    "Recipe": "bbfast.training",
    "Store": "bbfast.store",
    "TrainResult": "bbfast.training",
    "attack": "bbfast.attacks",
    "defend": "bbfast.defenses",
    "detect_all": "bbfast.defenses",
    "evaluate": "bbfast.evaluation",
    "predict": "bbfast.training",
    "train": "bbfast.training",
}

__all__ = [
    "AttackResult",
    "BackdoorSet",
    "DataPair",
    "DefenderView",
    "DefenseResult",
    "ImageSet",
    "PoisonedSet",
    "Recipe",
    "Store",
    "TrainResult",
    "__version__",
    "analysis",
    "attack",
    "attacks",
    "bench",
    "datasets",
    "defend",
    "defenses",
    "detect_all",
    "errors",
    "evaluate",
    "interop",
    "metrics",
    "models",
    "ops",
    "predict",
    "studies",
    "train",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"bbfast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'bbfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
