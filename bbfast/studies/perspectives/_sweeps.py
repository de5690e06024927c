"""One setting of one method varied at a time: the entries of a grid that do so, and what is read from their curve."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sweep", "area", "clean_fraction_sweep", "gap", "sweep_of"]

_UNFIT = re.compile(r"[^A-Za-z0-9_ .,:=%+-]")
CLEAN_FRACTION = "clean_fraction"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The values that one setting takes, the default among them.

    Args:
        kind: ``attack`` or ``defense``: whose setting it is.
        method: Name of the attack or defense.
        key: The setting; several that move together are joined by ``+``.
        values: Rising where they are numbers; None, a default that follows from the data, comes first. A mapping sets
            several settings at once; then the default is None, what it is without them.
        default: Place of the default among them.
    """

    kind: str
    method: str
    key: str
    values: tuple[Any, ...]
    default: int

    @property
    def title(self) -> str:
        return f"{self.method} {self.key}"

    @property
    def texts(self) -> list[str]:
        """The values in words."""
        return ["auto" if value is None else _text(value, self.key) for value in self.values]

    def labels(self) -> list[str]:
        """What rows are called, a label a value."""
        return [f"{self.method} {_UNFIT.sub('', f'{self.key}={text}')}" for text in self.texts]

    def entries(self) -> list[dict[str, Any]]:
        """Entries for a grid, one a value; a value of None leaves the setting alone."""
        both = zip(self.labels(), self.values, strict=True)
        return [{"name": self.method, "label": label, "set": _settings(self.key, value)} for label, value in both]


def sweep_of(kind: str, method: str, key: str, values: Sequence[Any], dataset: str) -> Sweep:
    """The sweep of a setting of an attack or defense, its default for ``dataset`` added.

    Raises:
        UnknownNameError: if there is no such method.
        ConfigError: if it has no such setting, or a value is not one of it.
    """
    from bbfast import attacks, defenses

    keys = key.split("+")
    create: Any = attacks.create if kind == "attack" else defenses.create
    for value in values:
        create(method, **_settings(key, value))
    made = create(method) if kind == "attack" else create(method).for_dataset(dataset)
    defaults = [getattr(made.config, part, None) for part in keys]
    plain = all(value == defaults[0] for value in defaults) and not any(isinstance(v, Mapping) for v in values)
    default = defaults[0] if plain else None
    return _with_default(kind, made.name, key, values, default)


def clean_fraction_sweep(defense: str, values: Sequence[float], default: float) -> Sweep:
    """The sweep of the share of clean images that a defender holds."""
    return _with_default("defense", defense, CLEAN_FRACTION, values, default)


def _with_default(kind: str, method: str, key: str, values: Sequence[Any], default: Any) -> Sweep:
    every: list[Any] = [default] if default is None else []
    for value in (*values, *([] if default is None else [default])):
        plain = tuple(value) if isinstance(value, list) else value
        if plain not in every:
            every.append(plain)
    numbers = [v for v in every if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(every) - every.count(None):
        every = [*([None] if None in every else []), *sorted(numbers)]
    return Sweep(kind, method, key, tuple(every), every.index(default))


def _settings(key: str, value: Any) -> dict[str, Any]:
    """What a value sets; nothing for None, the default that follows from the data."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(key.split("+"), value)


def _text(value: Any, key: str = "") -> str:
    if isinstance(value, Mapping):
        return _text(value[key]) if key in value else ",".join(f"{k}:{_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def area(values: NDArray[np.float64]) -> float:
    """Area under a curve whose points are evenly spaced over a width of one, by the trapezoidal rule; unknown points
    are bridged. NaN with fewer than two."""
    at = np.flatnonzero(np.isfinite(values))
    if len(at) < 2:
        return float("nan")
    y, steps = values[at], np.diff(at)
    return float(((y[1:] + y[:-1]) / 2 * steps).sum() / (at[-1] - at[0]))


def gap(values: NDArray[np.float64], default: int) -> float:
    """What the best value gains over the default; NaN if the default's figure is unknown."""
    return float(np.nanmax(values) - values[default]) if np.isfinite(values[default]) else float("nan")
