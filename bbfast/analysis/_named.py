"""The layer that a tool was asked to look at: found by name or role, and refused before any work if it will not do."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bbfast.errors import UnknownNameError, UnsupportedModelError

if TYPE_CHECKING:
    from bbfast.analysis.subject import Subject

__all__ = ["UnknownLayerError", "anything", "find_layer", "usable_layer"]

_NEAREST = 10

Accepts = Callable[[nn.Module, tuple[int, ...]], str]
"""Of a layer and the shape of what it puts out for two images: why a tool cannot use it, or nothing."""


class UnknownLayerError(UnknownNameError):
    """No layer of that name; the message lists all names if they are few, or else the ten closest, and the roles."""

    def __init__(self, name: str, known: list[str], roles: list[str]) -> None:
        super().__init__("layer", name, known)
        close = difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0)
        words = ", ".join(map(repr, known if len(known) <= _NEAREST else close))
        which = "it has" if len(known) <= _NEAREST else f"did you mean one of the closest of {len(known)}:"
        named = f"; roles that name one: {', '.join(roles)}" if roles else ""
        self.args = (f"unknown layer {name!r}; {which} {words or 'none'}{named}",)
        self.roles, self.layers = roles, known

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.layers, self.roles)


def find_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """A layer by its dotted name or by a role (``stage3``, ``last_conv``); of a role with several, the last.

    Raises:
        UnknownNameError: if there is none.
    """
    from bbfast.models import roles

    table = roles(model)
    if name in table.table and table.has(name):
        name = table.names(name)[-1]
    known = dict(model.named_modules())
    known.pop("", None)
    if name not in known:
        raise UnknownLayerError(name, list(known), [role for role in table.table if table.has(role)])
    return name, known[name]


def anything(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """For tools that look at every layer whose output has channels."""
    return ""


def usable_layer(subject: Subject, tool: str, name: str, accepts: Accepts = anything) -> tuple[str, nn.Module]:
    """A layer by name or role that a pass runs through once, that puts out one tensor, and that the tool accepts.

    Costs one pass over two images.

    Raises:
        UnknownNameError: if there is no such layer.
        UnsupportedModelError: saying why it will not do, with those nearest to it that will.
    """
    name, _ = find_layer(subject.model, name)
    found = _outputs(subject)

    def problem(key: str, layer: nn.Module) -> str:
        outs = found.get(key, [])
        if len(outs) != 1:
            return f"a pass through the model calls it {len(outs)} times" if outs else "the model never calls it"
        shape = outs[0]
        if shape is None or len(shape) < 2 or shape[0] != 2:
            return "it does not put out one tensor with a row for each image"
        return accepts(layer, shape)

    known = dict(subject.model.named_modules())
    known.pop("", None)
    if why := problem(name, known[name]):
        good = [key for key, layer in known.items() if not problem(key, layer)]
        close = difflib.get_close_matches(name, good, n=_NEAREST, cutoff=0)
        some = [key for key in good if key in close]
        hint = f"layers that it can use: {', '.join(some)}" if some else "no layer of this model will do"
        raise UnsupportedModelError(tool, f"layer {name!r}", why, hint)
    return name, known[name]


def _outputs(subject: Subject) -> dict[str, list[tuple[int, ...] | None]]:
    """For every layer that is called the shape of what it puts out, call by call; None if that is not one tensor."""
    shapes: dict[str, list[tuple[int, ...] | None]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            # What attention puts out beside its values is None.
            if isinstance(out, tuple) and out and all(part is None for part in out[1:]):
                out = out[0]
            one = isinstance(out, Tensor) and out.is_floating_point()
            shapes.setdefault(name, []).append(tuple(out.shape) if one else None)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in subject.model.named_modules() if name]
    try:
        with torch.no_grad():
            subject.model(subject.pixels(subject.attack.test.images[[0, 0]]))
    finally:
        for handle in hooks:
            handle.remove()
    return shapes
