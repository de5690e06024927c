"""What a benchmark runs: a product of data sets, models, attacks, ratios, seeds and defenses, read from YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, field_validator, model_validator

from bbfast._config import MethodConfig, build_config
from bbfast.bench.presets import GRIDS
from bbfast.errors import ConfigError, UnknownNameError

__all__ = ["NO_DEFENSE", "DataEntry", "Entry", "Grid", "Limits", "load_grid"]

NO_DEFENSE = "none"
_NONE = (NO_DEFENSE, "no defense", "no_defense")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,:=%+-]*")


class _Named(MethodConfig):
    """What is listed by name, and called by its label in tables."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    name: str
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _labelled(self) -> _Named:
        if not self.label:
            object.__setattr__(self, "label", self.name)  # whether there is such a name is the grid's to say
        elif not _LABEL.fullmatch(self.label):
            raise ValueError(f"label must match {_LABEL.pattern}")
        return self


class Entry(_Named):
    """One attack or defense with settings.

    Args:
        name: As ``bbfast list`` shows it; aliases are taken.
        label: What rows are called; the name if left out. Two entries of one method need labels that differ.
        settings: Settings of the method, ``set`` in YAML.
        recipe: Settings of the victim's recipe for this attack alone.
    """

    settings: dict[str, Any] = Field(default_factory=dict, alias="set")
    recipe: dict[str, Any] = Field(default_factory=dict)


class DataEntry(_Named):
    """One data set.

    Args:
        name: As ``bbfast list datasets`` shows it.
        label: What rows are called; the name if left out.
        root: Folder (npz: file) that holds it.
        options: Options of the data set.
    """

    root: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class Limits(MethodConfig):
    """What one stage may use; it is ended and recorded as failed when it takes more.

    Args:
        seconds: Wall-clock time.
        memory_gib: Resident memory of its process, GiB.
    """

    seconds: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)


class Grid(MethodConfig):
    """A benchmark: every combination of what is listed.

    Args:
        name: What it is called.
        datasets: Data sets.
        models: Names of models.
        attacks: Attacks; ``all`` is every one registered.
        ratios: Shares of the training set to poison; 0 is a clean model under the attack's trigger.
        defenses: Defenses; ``none`` is the attack alone, ``all`` is it and every one registered.
        seeds: Seeds of attack and defense.
        preset: Recipe of the victims.
        recipe: Settings that replace those of the preset.
        clean_fraction: Share of the clean training images that a defender holds.
        device: Where to compute: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        limits: What one stage may use.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = GRIDS

    name: str = "grid"
    datasets: tuple[DataEntry, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    attacks: tuple[Entry, ...] = Field(min_length=1)
    ratios: tuple[float, ...] = Field((0.1,), min_length=1)
    defenses: tuple[Entry, ...] = Field((Entry(name=NO_DEFENSE),), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    preset: Literal["paper", "quick"] = "paper"
    recipe: dict[str, Any] = Field(default_factory=dict)
    clean_fraction: float = Field(0.05, gt=0, le=1)
    device: str = "auto"
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _all(cls, values: Any) -> Any:
        from bbfast import attacks, defenses

        if not isinstance(values, Mapping):
            return values
        every = {"attacks": attacks.available, "defenses": lambda: [NO_DEFENSE, *defenses.available()]}
        whole = {key: found() for key, found in every.items() if values.get(key) == "all"}
        return {**values, **whole}

    @field_validator("ratios")
    @classmethod
    def _shares(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if bad := [ratio for ratio in ratios if not 0 <= ratio <= 1]:
            raise ValueError(f"every ratio must lie in [0, 1], not {bad}")
        return ratios

    @field_validator("seeds")
    @classmethod
    def _whole(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if bad := [seed for seed in seeds if seed < 0]:
            raise ValueError(f"seeds must be at least 0, not {bad}")
        return seeds

    @model_validator(mode="after")
    def _known(self) -> Grid:
        """Every name and setting is checked here, so that a plan does not end half-way."""
        from bbfast import attacks, datasets, defenses, models
        from bbfast.training import Recipe

        resolved: dict[str, Any] = {
            "attacks": tuple(_resolved(entry, attacks.info) for entry in self.attacks),
            "defenses": tuple(
                entry.model_copy(update={"name": NO_DEFENSE, "label": NO_DEFENSE})
                if entry.name in _NONE
                else _resolved(entry, defenses.info)
                for entry in self.defenses
            ),
        }
        for key, entries in resolved.items():
            object.__setattr__(self, key, entries)
        for entry in self.attacks:
            if taken := {"ratio", "count"} & entry.settings.keys():
                raise ValueError(f"attack {entry.label!r}: {taken.pop()} is what ratios lists; take it out of set")
            attacks.create(entry.name, **entry.settings)
            Recipe.preset(self.preset, dataset=None, model=None).replace(**{**self.recipe, **entry.recipe})
        for entry in self.defenses:
            if entry.name == NO_DEFENSE and (entry.settings or entry.recipe):
                raise ValueError("defense 'none' has no settings")
            if entry.recipe:
                raise ValueError(f"defense {entry.label!r}: recipe belongs to attacks; use set")
            if entry.name != NO_DEFENSE:
                defenses.create(entry.name, **entry.settings)
        for model in self.models:
            models.info(model)
        for data in self.datasets:
            datasets.info(data.name)
        listed: dict[str, list[Any]] = {
            "datasets": [data.label for data in self.datasets],
            "models": list(self.models),
            "attacks": [entry.label for entry in self.attacks],
            "defenses": [entry.label for entry in self.defenses],
            "ratios": list(self.ratios),
            "seeds": list(self.seeds),
        }
        for what, labels in listed.items():
            if twice := sorted({str(label) for label in labels if labels.count(label) > 1}):
                raise ValueError(f"{what} must differ, but has {twice} twice; give labels of their own")
        return self


def load_grid(source: str | Path | Mapping[str, Any], **changes: Any) -> Grid:
    """A grid from a preset's name, a YAML file, or its content.

    Args:
        source: Name of a preset (``paper``, ``paper-full``, ``digits-full``, ``smoke``), path of a file, or the keys of
            :class:`Grid`. A file may say ``base: PRESET`` and list only what differs.
        **changes: Keys that replace those of ``source``.

    Raises:
        ConfigError: naming the file, the key, what was expected and what came.
        UnknownNameError: if an attack, a defense, a model, a data set or a preset does not exist; with the nearest.
    """
    owner, values = _content(source)
    base = values.pop("base", None)
    if base is not None:
        values = {**_preset(str(base)), **values}
    return build_config(Grid, owner, {**values, **changes})


def _content(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "grid", dict(source)
    path = Path(source).expanduser()
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml") and not path.is_file():
        return f"grid {source!r}", _preset(source)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: expected keys such as attacks and datasets, got {type(found).__name__}")
    return f"grid {path}", {"name": path.stem, **{str(key): value for key, value in found.items()}}


def _preset(name: str) -> dict[str, Any]:
    if name not in GRIDS:
        raise UnknownNameError("grid preset", name, list(GRIDS))
    return {"name": name, **GRIDS[name]}


def _resolved(entry: Entry, info: Any) -> Entry:
    """The entry under its method's own name; a label that was an alias follows."""
    name = str(info(entry.name)["name"])
    return entry.model_copy(update={"name": name, "label": name if entry.label == entry.name else entry.label})
