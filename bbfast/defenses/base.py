"""The base of every defense, its settings, and the registry that finds it by name."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import field_validator, model_validator
from torch import nn

from bbfast._config import MethodConfig
from bbfast._methods import Method, MethodRegistry
from bbfast.defenses.card import KINDS, DefenseCard
from bbfast.defenses.features import Reader
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnknownNameError

__all__ = ["Defense", "DefenseConfig", "Evaluator", "available", "create", "find", "info", "register_defense"]

Evaluator = Callable[[nn.Module], dict[str, Any]]
"""Measures a model on the test sets: ``c_acc``, ``asr``, ``r_acc``."""

ALIASES = {
    "spectral": "ss",
    "d-br": "d_br",
    "d-st": "d_st",
    "i-bau": "i_bau",
    "ft-sam": "ft_sam",
    "dde": "ep",
}
"""Names used by BackdoorBench's folders and papers. One whose method is not registered stays unknown."""

D = TypeVar("D", bound="type[Defense]")
C = TypeVar("C", bound="DefenseConfig")


class DefenseConfig(MethodConfig):
    """Settings of one defense.

    A value comes from, in falling order: the caller, the preset, the data set's row, the field's default. Which of the
    first two was given is kept (``model_fields_set``), so that the data set's row can be filled in when it is known.

    Args:
        preset: Name of a row of ``presets``: ``"bbfast"`` (the defaults), ``"reference"`` (the numbers and documented
            choices of BackdoorBench, never its bugs), ``"paper"`` where it differs.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}}
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    detect_only: ClassVar[dict[str, Any]] = {}
    """Settings with which a method that detects and then mitigates stops after the first."""

    preset: str = "bbfast"

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "bbfast")
        row = cls.presets.get(name, {}) if isinstance(name, str) else {}
        return {**row, **values}

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str) -> str:
        if name not in cls.presets:
            raise ValueError(f"expected one of {sorted(cls.presets)}")
        return name

    def for_dataset(self: C, name: str) -> C:
        """The same settings, with data set ``name``'s row filled in where neither caller nor preset said anything."""
        from bbfast.training.presets import dataset_key

        row = self.dataset_defaults.get(dataset_key(name), {})
        chosen = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self)(**{**row, **chosen})


class Defense(Method, ABC):
    """One defense: settings, what it needs, and :meth:`run`.

    A subclass sets ``card`` and ``Config`` and registers itself with :func:`register_defense`, which sets ``name``. It
    keeps no state between runs: everything it learns is in the result.

    Args:
        config: Settings; default settings if None.
        **values: Settings by name, instead of ``config``.

    Raises:
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """

    noun = "defense"
    version: ClassVar[int] = 1
    """Raised when a change of the method changes its results: they are then found by other keys."""
    card: ClassVar[DefenseCard]
    Config: ClassVar[type[DefenseConfig]] = DefenseConfig
    evaluator: Evaluator | None = None
    """Set by the runner when its caller says ``oracle=True``, else None: the ground truth, for choices that are made as
    published tables made them. Every result so made carries ``selection["oracle"]``."""

    def for_dataset(self, name: str) -> Defense:
        """The same defense with the settings that its method uses on data set ``name`` (see :class:`DefenseConfig`)."""
        other = copy.copy(self)
        other.config = self.config.for_dataset(name)
        return other

    def check(self, view: DefenderView) -> None:
        """Refuse what the method cannot do, before any work and without a forward pass.

        Raises:
            UnsupportedModelError: if the model lacks layers that the method needs.
            DataRequirementError: if the granted data are too few.
        """

    def readers(self, view: DefenderView, source: str) -> Sequence[Reader]:
        """What :meth:`run` will ask ``view`` to read of a granted set, so that several defenses can share the pass.

        Called for ``reserve`` and ``clean`` before ``poisoned_train`` and ``stream``, each after the one before has
        been read: a reader may be built from what the view holds by then.

        Args:
            view: The view of the coming run.
            source: One of the granted sets.
        """
        return ()

    @abstractmethod
    def run(self, view: DefenderView) -> DefenseResult:
        """Defend with what ``view`` grants; deterministic in (view, config)."""


_REGISTRY: MethodRegistry[Defense] = MethodRegistry(
    "defense",
    DefenseCard,
    packages=("bbfast.defenses.mitigation", "bbfast.defenses.training", "bbfast.defenses.detection"),
    entry_points="bbfast.defenses",
    aliases=ALIASES,
)


def register_defense(name: str) -> Callable[[D], D]:
    """Class decorator: register a defense under ``name``; a taken name raises ``ValueError``."""
    return _REGISTRY.decorator(name)


def find(name: str) -> type[Defense]:
    """The class registered under ``name`` or one of its aliases.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    try:
        return _REGISTRY.get(name)
    except UnknownNameError:
        known = _REGISTRY.names()
        aliases = [alias for alias, target in ALIASES.items() if target in known]
        raise UnknownNameError("defense", name, [*known, *aliases]) from None


def available(kind: str | None = None) -> list[str]:
    """Names of all defenses, or of those that give ``kind`` (``mitigation``, ``training``, ``detection``,
    ``inference``, ``model``).

    Raises:
        ValueError: if ``kind`` is none of them.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS} or None, got {kind!r}")
    return [name for name in _REGISTRY.names() if kind is None or kind in _REGISTRY.get(name).card.kinds]


def create(name: str, **config: Any) -> Defense:
    """A defense by name or alias with the given settings.

    Raises:
        UnknownNameError: if there is no such defense; the message has the nearest names.
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """
    return find(name)(**config)


def info(name: str) -> dict[str, Any]:
    """What is known about a defense: paper, kinds, what it needs, defaults, presets, rows by data set, departures."""
    cls = find(name)
    card = cls.card
    return {
        "name": cls.name,
        "title": card.title,
        "paper": card.paper,
        "year": card.year,
        "arxiv": card.arxiv,
        "kinds": list(card.kinds),
        "needs": sorted(card.needs),
        "summary": card.summary,
        "clean_fraction": card.clean_fraction,
        "reserve_per_class": card.reserve_per_class,
        "deviations": list(card.deviations),
        "defaults": cls.Config().model_dump(mode="json"),
        "presets": {key: dict(row) for key, row in cls.Config.presets.items()},
        "dataset_defaults": {key: dict(row) for key, row in cls.Config.dataset_defaults.items()},
    }
