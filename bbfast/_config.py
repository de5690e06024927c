"""The base of every method's settings: typed, range-checked, frozen; errors name the key, the rule and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bbfast.errors import ConfigError, nearest

__all__ = ["MethodConfig", "build_config"]

C = TypeVar("C", bound="MethodConfig")


class MethodConfig(BaseModel):
    """Frozen settings of one method. Subclasses declare fields with types, ranges and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def build_config(cls: type[C], owner: str, values: Mapping[str, Any]) -> C:
    """Validate ``values`` into ``cls``.

    Raises:
        ConfigError: naming ``owner``, each offending key, what was expected and what came; an unknown key gets the
            nearest known ones.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"])) or "settings"
            if problem["type"] == "extra_forbidden":
                known = list(cls.model_fields)
                close = nearest(key, known)
                hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
                lines.append(f"unknown setting {key!r}; {hint}")
            else:
                lines.append(f"{key}: {problem['msg']}, got {problem['input']!r}")
        raise ConfigError(f"{owner}: " + "; ".join(lines)) from None
