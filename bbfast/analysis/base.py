"""The base of every analysis tool and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from bbfast._config import MethodConfig
from bbfast._methods import Method, MethodRegistry
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Tool", "ToolCard", "ToolConfig", "available", "create", "find", "info", "register_tool"]

ALIASES = {"shap": "shapley", "gradcam": "grad_cam", "quality": "image_quality", "tac": "trigger_activation_change"}
"""Names of BackdoorBench's scripts."""

T = TypeVar("T", bound="type[Tool]")


@dataclasses.dataclass(frozen=True)
class ToolCard:
    """The facts of one tool.

    Args:
        title: Full name.
        question: What it answers.
        paper: Source of the method; empty if there is none.
        extra: The extra of this package that it needs (``analysis``); empty if none.
        deviations: Departures from BackdoorBench's tool of that name, one sentence each.
        quick: Its defaults cost a few passes over the test images at most, so seconds wherever those do: what
            ``bbfast analyze quick`` runs.
    """

    title: str
    question: str
    paper: str = ""
    extra: str = ""
    deviations: tuple[str, ...] = ()
    quick: bool = False


class ToolConfig(MethodConfig):
    """Settings of every tool.

    Args:
        seed: Of every choice of samples, and of everything random.
    """

    seed: int = Field(0, ge=0)


class Tool(Method, ABC):
    """One tool: settings, :meth:`measure`, and :meth:`draw`, which sees nothing but the numbers.

    A subclass sets ``card`` and ``Config`` and registers itself with :func:`register_tool`.

    Args:
        config: Settings; defaults if None.
        **values: Settings by name, instead of ``config``.

    Raises:
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """

    noun = "analysis tool"
    card: ClassVar[ToolCard]
    Config: ClassVar[type[ToolConfig]] = ToolConfig
    shared_axes: ClassVar[bool] = True
    """Places in the figures of two results mean the same, so that a comparison may give them the same limits."""

    def check(self, subject: Subject) -> None:
        """Refuse what the tool cannot look at, before any work.

        Raises:
            UnsupportedModelError, DataRequirementError, UnknownNameError: saying why.
        """

    @classmethod
    def common(cls, parts: Sequence[Numbers]) -> dict[str, Any]:
        """What ``meta`` of each gets before all are drawn for a comparison: what a scale must span that is neither that
        of axes nor of an image of the figure."""
        return {}

    @abstractmethod
    def measure(self, subject: Subject) -> Numbers:
        """The numbers; deterministic in (subject, config). ``meta`` gets what :meth:`draw` needs in words."""

    @staticmethod
    @abstractmethod
    def draw(numbers: Numbers) -> Figure:
        """The figure: a function of the numbers, also of those that were saved and loaded."""


_REGISTRY: MethodRegistry[Tool] = MethodRegistry(
    "analysis tool", ToolCard, packages=("bbfast.analysis.tools",), entry_points="bbfast.analysis", aliases=ALIASES
)


def register_tool(name: str) -> Callable[[T], T]:
    """Class decorator: register a tool under ``name``; a taken name raises ``ValueError``."""
    return _REGISTRY.decorator(name)


def find(name: str) -> type[Tool]:
    """The class registered under ``name`` or one of its aliases.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    return _REGISTRY.get(name)


def available() -> list[str]:
    """Names of all tools, sorted."""
    return _REGISTRY.names()


def create(name: str, **config: Any) -> Tool:
    """A tool by name or alias with the given settings.

    Raises:
        UnknownNameError: if there is no such tool; the message has the nearest names.
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """
    return find(name)(**config)


def info(name: str) -> dict[str, Any]:
    """What is known about a tool: title, question, paper, the extra it needs, departures, defaults."""
    return _REGISTRY.describe(name)
