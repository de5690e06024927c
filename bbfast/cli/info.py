"""``bbfast info``: one entry in full: its card and its settings."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bbfast._config import MethodConfig
from bbfast.cli._frame import command, emit_json, screen, usage
from bbfast.cli._options import Json
from bbfast.cli.listing import Kind, describe, names
from bbfast.errors import UnknownNameError

__all__ = ["register", "settings_of"]


def register(app: typer.Typer) -> None:
    @command(
        app,
        "info",
        examples="bbfast info attacks badnets\nbbfast info defenses nc --json\nbbfast info datasets cifar10",
    )
    def info(
        kind: Annotated[Kind, typer.Argument(help="What kind of thing it is.")],
        name: Annotated[str, typer.Argument(help="Its name, as `bbfast list` shows it.")],
        json: Json = False,
    ) -> None:
        """Show an entry's paper, what it needs, and its settings with type, range and default."""
        with usage():
            resolved = _canonical(kind.value, name)
        card, settings = describe(kind.value, resolved), settings_of(kind.value, resolved)
        if json:
            emit_json({"name": resolved, **card, "settings": settings})
            return
        console = screen()
        console.print(_card_table(resolved, card))
        if settings:
            console.print()
            console.print(_settings_table(settings, "--data" if kind is Kind.datasets else "--set"))


def settings_of(kind: str, name: str) -> list[dict[str, Any]]:
    """What can be set: name, type, default, range and meaning of each setting; empty for kinds that have none."""
    config = _settings_class(kind, name)
    if config is None:
        return []
    schema = config.model_json_schema()
    definitions, meanings = schema.get("$defs", {}), _meanings(config)
    return [
        {
            "name": key,
            "type": _type(field, definitions),
            "default": config.model_fields[key].get_default(call_default_factory=True),
            "range": _range(field),
            "help": field.get("description") or meanings.get(key, ""),
        }
        for key, field in schema["properties"].items()
    ]


def _settings_class(kind: str, name: str) -> type[MethodConfig] | None:
    found: Any = None
    if kind in ("attacks", "defenses", "analysis", "studies"):
        found = type(importlib.import_module(f"bbfast.{kind}").create(name)).Config
    elif kind == "datasets":
        from bbfast.data.datasets import DATASETS

        found = getattr(DATASETS.get(name), "Options", None)
    return found if isinstance(found, type) and issubclass(found, MethodConfig) else None


def _meanings(config: type[MethodConfig]) -> dict[str, str]:
    """The ``Args`` sections of the docstrings of a settings class and its bases, by setting."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        # A class without a docstring would show its base's.
        section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(cls.__dict__.get("__doc__") or ""), re.M)
        entries = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section[1], re.M) if section else []
        found.update({key: _unmarked(" ".join(text.split())) for key, text in entries})
    return found


def _unmarked(text: str) -> str:
    """Without the mark-up of the API pages."""
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")


def _canonical(kind: str, name: str) -> str:
    known = names(kind)
    if name in known:
        return name
    info = getattr(importlib.import_module(f"bbfast.{kind}"), "info", None) if known else None
    if callable(info):
        # It knows the aliases, and what else is close to a name that does not exist.
        return str(info(name)["name"])
    raise UnknownNameError(kind, name, known)


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema's type in words: ``float or null``, ``"a" | "b"``, ``list of int``."""
    if "$ref" in field:
        return _type(definitions.get(field["$ref"].rsplit("/", 1)[-1], {}), definitions)
    if "anyOf" in field:
        return " or ".join(_type(option, definitions) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(items, definitions)}"
    return {"number": "float", "integer": "int", "boolean": "bool", "string": "text", "object": "mapping"}.get(
        kind, kind
    )


_ELSEWHERE = ("name", "defaults", "schema", "options", "option_help")
"""Parts of a card that the title or the table of settings shows."""

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _range(field: dict[str, Any]) -> str:
    options = [field, *field.get("anyOf", [])]
    return ", ".join(f"{sign} {option[key]:g}" for key, sign in _BOUNDS.items() for option in options if key in option)


def _card_table(name: str, card: dict[str, Any]) -> Table:
    table = Table(
        title=name, title_justify="left", title_style="bold cyan", box=None, pad_edge=False, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for key, value in card.items():
        if key in _ELSEWHERE or value in (None, "", [], (), {}):
            continue
        if key == "presets":
            value = list(value)
        # Whole sentences stand one a line.
        text = "\n".join(value) if key == "deviations" else _words(value)
        table.add_row(key.replace("_", " "), escape(text))
    return table


def _settings_table(settings: list[dict[str, Any]], option: str) -> Table:
    table = Table(
        title=f"Settings ({option} KEY=VALUE)", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("type")
    table.add_column("default", overflow="fold", max_width=24)
    table.add_column("range")
    described = any(row["help"] for row in settings)
    if described:
        table.add_column("meaning")
    for row in settings:
        cells = [row["name"], row["type"], _words(row["default"]), row["range"], *([row["help"]] if described else [])]
        table.add_row(*map(escape, cells))
    return table


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_words, sorted(value) if isinstance(value, set | frozenset) else value)) or "none"
    return "none" if value is None else str(value)
