"""The base of every method's settings: typed, range-checked, frozen; errors name the key, the rule and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bbfast.errors import ConfigError, nearest

__all__ = ["MethodConfig", "build_config"]

C = TypeVar("C", bound="MethodConfig")


class MethodConfig(BaseModel):
    """Frozen settings of one method. Subclasses declare fields with types, ranges and defaults.

    Raises:
        ConfigError: as :func:`build_config`, with the class's name as owner.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers are to see the fields as arguments

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(f"{type(self).__qualname__}: {_explained(type(self), error)}") from None


def build_config(cls: type[C], owner: str, values: Mapping[str, Any]) -> C:
    """Validate ``values`` into ``cls``.

    Raises:
        ConfigError: naming ``owner``, each offending key, what was expected and what came; an unknown key gets the
            nearest known ones.
    """
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{owner}: {str(error).removeprefix(f'{cls.__qualname__}: ')}") from None


def _explained(cls: type[MethodConfig], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "settings"
        if problem["type"] == "extra_forbidden":
            known = list(cls.model_fields)
            close = nearest(key, known)
            hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
            lines.append(f"unknown setting {key!r}; {hint}")
        else:
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}")
    return "; ".join(lines)
