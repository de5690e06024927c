"""Whose training diverged, in which phase, and which of the method's settings to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pydantic import BaseModel

from bbfast.errors import DivergedError

__all__ = ["lower", "naming"]


@contextlib.contextmanager
def naming(method: str, phase: str, remedy: str) -> Iterator[None]:
    """Let a :class:`DivergedError` from the block name ``method`` and ``phase``, and advise ``remedy``.

    The engine's own advice names the recipe's settings, which a method's user has not got.
    """
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{method}, {phase}: {error.what}", remedy, error.last_good) from error


def lower(config: BaseModel, *names: str) -> str:
    """Advice to lower one of these settings of ``config``, with their values."""
    shown = []
    for name in names:
        value = getattr(config, name)
        shown.append(f"{name} (now {value:g})" if isinstance(value, int | float) else f"{name} (now {value})")
    return f"lower {' or '.join(shown)}"
