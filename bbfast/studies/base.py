"""The base of every study and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from bbfast._config import MethodConfig
from bbfast._methods import Method, MethodRegistry
from bbfast.analysis.numbers import Numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid
    from bbfast.data import DataPair
    from bbfast.studies.results import Results

__all__ = [
    "DataConfig",
    "Listed",
    "Share",
    "Study",
    "StudyCard",
    "StudyConfig",
    "available",
    "create",
    "find",
    "info",
    "register_study",
]

T = TypeVar("T", bound="type[Study]")

Share = Annotated[float, Field(gt=0, le=1)]
"""A share of the training set that is poisoned: a grid takes 0 too, where there is nothing to study."""

Listed = tuple[str | dict[str, Any], ...] | Literal["all"]
"""Attacks or defenses as a grid lists them: names, mappings with ``name``, ``label`` and ``set``, or ``all``."""


@dataclasses.dataclass(frozen=True)
class StudyCard:
    """The facts of one study.

    Args:
        title: Full name.
        question: What it answers; ends in "?".
        reading: The paragraph that says what to read in the figure.
        paper: Source; empty if there is none.
    """

    title: str
    question: str
    reading: str
    paper: str = ""


class StudyConfig(MethodConfig):
    """Settings of every study.

    Args:
        preset: Recipe of the attacked models, quick or paper.
        recipe: Settings that replace those of the preset.
        seeds: Seeds of attacks and defenses; spreads and rank statistics are over them.
        clean_fraction: Share of the clean training images that a defender holds.
        seconds: Wall-clock limit of one stage; it fails when it takes longer.
        memory_gib: Memory limit of one stage.
    """

    preset: Literal["paper", "quick"] = "quick"
    recipe: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    clean_fraction: float = Field(0.05, gt=0, le=1)
    seconds: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)

    def grid(self, name: str, **keys: Any) -> Grid:
        """The grid of these settings and ``keys``, which are those of :class:`bbfast.bench.Grid`.

        Raises:
            ConfigError, UnknownNameError: as :func:`bbfast.bench.load_grid` does.
        """
        from bbfast.bench import load_grid

        own = {key: getattr(self, key) for key in ("preset", "recipe", "seeds", "clean_fraction")}
        limits = {"seconds": self.seconds, "memory_gib": self.memory_gib}
        return load_grid({"name": name, **own, "limits": limits, **keys})


class DataConfig(StudyConfig):
    """Settings of a study of one data set.

    Args:
        dataset: Name of the data set.
        root: Folder (npz: file) that holds it.
        options: Options of the data set.
    """

    dataset: str = "digits"
    root: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def grid(self, name: str, **keys: Any) -> Grid:
        data = {"name": self.dataset, "root": self.root, "options": self.options}
        return super().grid(name, **{"datasets": [data], **keys})

    def data(self) -> DataPair:
        """The data set, for a study that trains for itself."""
        from bbfast import datasets

        return datasets.load(self.dataset, self.root, **self.options)


class Study(Method, ABC):
    """One study: settings, :meth:`grids` for the benchmark, :meth:`measure`, and :meth:`draw`, which sees nothing but
    the numbers.

    A subclass sets ``card`` and ``Config`` and registers itself with :func:`register_study`.

    Args:
        config: Settings; defaults if None.
        **values: Settings by name, instead of ``config``.

    Raises:
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """

    noun = "study"
    card: ClassVar[StudyCard]
    Config: ClassVar[type[StudyConfig]] = StudyConfig

    def grids(self) -> Sequence[Grid]:
        """What the benchmark runs first; names of grids differ. Everything that can be wrong in the settings is found
        here, before any work.

        Raises:
            ConfigError, UnknownNameError: naming the setting.
        """
        return ()

    @abstractmethod
    def measure(self, results: Results) -> Numbers:
        """The numbers; deterministic in (results, config), times and memory in the table apart.

        ``meta`` gets what :meth:`draw` needs in words; ``meta["findings"]``, whole sentences, is what ``reading.md``
        says of these numbers.
        """

    @staticmethod
    @abstractmethod
    def draw(numbers: Numbers) -> Figure:
        """The figure: a function of the numbers, also of those that were saved and loaded."""


_REGISTRY: MethodRegistry[Study] = MethodRegistry(
    "study", StudyCard, packages=("bbfast.studies.perspectives",), entry_points="bbfast.studies"
)


def register_study(name: str) -> Callable[[T], T]:
    """Class decorator: register a study under ``name``; a taken name raises ``ValueError``."""
    return _REGISTRY.decorator(name)


def find(name: str) -> type[Study]:
    """The class registered under ``name``.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    return _REGISTRY.get(name)


def available() -> list[str]:
    """Names of all studies, sorted."""
    return _REGISTRY.names()


def create(name: str, **config: Any) -> Study:
    """A study by name with the given settings.

    Raises:
        UnknownNameError: if there is no such study; the message has the nearest names.
        ConfigError: if a setting is unknown, has the wrong type or is out of range.
    """
    return find(name)(**config)


def info(name: str) -> dict[str, Any]:
    """What is known about a study: title, question, what to read in its figure, paper, defaults."""
    return _REGISTRY.describe(name)
