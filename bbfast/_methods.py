"""What everything that is found by name has in common: a card, settings, and a registry that makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from bbfast._config import MethodConfig, build_config
from bbfast._registry import Registry

__all__ = ["Method", "MethodRegistry"]

M = TypeVar("M", bound="Method")
C = TypeVar("C", bound="type[Method]")


class Method:
    """Something with a name, a card and settings.

    Args:
        config: Settings; default settings if None.
        **values: Settings by name, instead of ``config``.

    Raises:
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
        TypeError: if ``config`` is of another class, or given together with ``values``.
    """

    noun: ClassVar[str] = "method"
    """What messages call it."""
    name: ClassVar[str] = ""
    card: ClassVar[Any]
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: MethodConfig | None = None, **values: Any) -> None:
        if config is None:
            config = build_config(self.Config, f"{self.noun} {self.name or type(self).__name__}", values)
        elif values:
            raise TypeError("give either config or settings by name, not both")
        elif not isinstance(config, self.Config):
            raise TypeError(f"config must be a {self.Config.__qualname__}, got {type(config).__qualname__}")
        self.config: Any = config

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={getattr(self.config, key)!r}" for key in sorted(self.config.model_fields_set))
        return f"{type(self).__name__}({shown})"


class MethodRegistry(Registry[type[M]]):
    """A registry of such classes.

    Args:
        noun: What an entry is, for messages.
        card: What the ``card`` of every entry must be.
        packages, entry_points, aliases: As of :class:`bbfast._registry.Registry`.
    """

    def __init__(
        self,
        noun: str,
        card: type,
        packages: tuple[str, ...] = (),
        entry_points: str | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(noun, packages, entry_points, aliases)
        self._card = card

    def decorator(self, name: str) -> Callable[[C], C]:
        """Class decorator: register a class under ``name``, which becomes its ``name``.

        Raises:
            TypeError: if it has no card of the right kind.
            ValueError: if the name is taken.
        """

        def decorate(cls: C) -> C:
            if not isinstance(getattr(cls, "card", None), self._card):
                raise TypeError(f"{self.kind} {name!r}: {cls.__qualname__}.card must be a {self._card.__name__}")
            self.register(name)(cls)  # type: ignore[arg-type]
            cls.name = name
            return cls

        return decorate

    def describe(self, name: str) -> dict[str, Any]:
        """Name, card and defaults of an entry, as plain data.

        Raises:
            UnknownNameError: with the nearest known names.
        """
        cls = self.get(name)
        card = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(cls.card).items()}
        return {"name": cls.name, **card, "defaults": cls.Config().model_dump(mode="json")}
