"""Options that several commands share, and the parsing of ``--set key=value``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli._frame import UsageFailure

if TYPE_CHECKING:
    from yaml import SafeLoader

__all__ = ["Device", "Fresh", "Json", "Seed", "Settings", "merge_settings", "parse_settings", "parse_settings_of"]

Settings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of the method; may be repeated. `bbfast info` lists them."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def _check_device(name: str) -> str:
    """Before anything is done: a result that is there already would be shown whatever the device."""
    if name not in ("auto", "cpu"):
        from bbfast.training.device import resolve_device

        try:
            resolve_device(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return name


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one.", callback=_check_device)]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout instead of a table.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do the work again even if its result is there.")]


def parse_settings(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """``["mask=[1, 2]", "lr=0.1"]`` as a dict; values are read as YAML, so numbers, booleans, null and lists work.

    Of the booleans only ``true`` and ``false`` are read as such: ``amp=off`` means the text.

    Raises:
        UsageFailure: if a pair has no ``=``, its value is not YAML, or a key comes twice.
    """
    import yaml

    loader = _loader()
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageFailure(f"{option} takes KEY=VALUE, got {pair!r}")
        if key in settings:
            raise UsageFailure(f"{option} {key} is given twice")
        try:
            settings[key] = yaml.load(text, loader)
        except yaml.YAMLError as error:
            raise UsageFailure(f"{option} {key}: the value must be YAML, got {text!r}") from error
    return settings


def parse_settings_of(pairs: Iterable[str], option: str = "--set") -> dict[str, dict[str, Any]]:
    """``["grad_cam.layer=stage2"]`` as a dict for each of several methods; values as of :func:`parse_settings`.

    Raises:
        UsageFailure: as there, or if a key does not say which method it is of.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_settings(pairs, option).items():
        name, dot, own = key.partition(".")
        if not (name and dot and own):
            raise UsageFailure(f"{option} for several takes NAME.KEY=VALUE, got {key!r}")
        found.setdefault(name, {})[own] = value
    return found


def _loader() -> type[SafeLoader]:
    """PyYAML's safe loader with the booleans of YAML 1.2; 1.1 takes on, off, yes and no for booleans too."""
    from yaml import SafeLoader

    class Loader(SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":bool")]
        for first, rules in SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    return Loader


def merge_settings(named: dict[str, Any], settings: dict[str, Any], option: str = "--set") -> dict[str, Any]:
    """Settings that have an option of their own (None if not given) together with those of ``option``.

    Raises:
        UsageFailure: if one is given both ways.
    """
    given = {key: value for key, value in named.items() if value is not None}
    twice = sorted(given.keys() & settings.keys())
    if twice:
        flag = twice[0].replace("_", "-")
        raise UsageFailure(f"{twice[0]} is given twice: by --{flag} and by {option} {twice[0]}=")
    return {**given, **settings}
