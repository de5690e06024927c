"""One registry for every kind of named thing: attacks, defenses, data sets, models.

Built-in entries are modules of a package, imported when first asked for; third-party packages add theirs through an
entry point group. Adding a method is adding its file: there is no list to edit.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from bbfast.errors import UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Names to objects.

    Args:
        kind: What an entry is, for messages ("attack").
        packages: Dotted packages whose modules register themselves when imported.
        entry_points: Entry point group of third-party packages; each entry point names a module or an object, and
            loading it registers.
        aliases: Other accepted spellings to the registered name.
    """

    def __init__(
        self,
        kind: str,
        packages: tuple[str, ...] = (),
        entry_points: str | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._packages = packages
        self._group = entry_points
        self._aliases = dict(aliases or {})
        self._entries: dict[str, T] = {}
        self._discovered = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: register the object under ``name``; a name that is taken, also as an alias, raises
        ``ValueError``."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} name {name!r} is taken by {self._entries[name]!r}")
            if name in self._aliases:
                raise ValueError(f"{self.kind} name {name!r} is another spelling of {self._aliases[name]!r}")
            self._entries[name] = entry
            return entry

        return decorate

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        self._discover()
        return sorted(self._entries)

    def canonical(self, name: str) -> str:
        """The registered name for ``name`` or one of its aliases.

        Raises:
            TypeError: if ``name`` is not text.
            UnknownNameError: with the nearest known names.
        """
        if not isinstance(name, str):
            raise TypeError(f"{self.kind} name must be text, got {type(name).__name__} {name!r}")
        self._discover()
        resolved = self._aliases.get(name, name)
        if resolved not in self._entries:
            raise UnknownNameError(self.kind, name, [*self._entries, *self._aliases])
        return resolved

    def get(self, name: str) -> T:
        """The object registered under ``name`` or an alias; raises ``UnknownNameError``."""
        return self._entries[self.canonical(name)]

    def _discover(self) -> None:
        if not self._discovered:
            with self._lock:
                self._load_all()

    def _load_all(self) -> None:
        # Asked again under the lock: another thread may have done it meanwhile.
        if not self._discovered:
            for package_name in self._packages:
                package = importlib.import_module(package_name)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{package_name}.{module.name}")
            if self._group is not None:
                for point in importlib.metadata.entry_points(group=self._group):
                    try:
                        point.load()
                    except Exception as error:
                        # One broken plug-in must not take the library down with it; it is reported and left out.
                        _log.warning(
                            "%s plug-in %s (%s) could not be loaded: %s", self.kind, point.name, point.value, error
                        )
            self._discovered = True
