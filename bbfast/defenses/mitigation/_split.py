"""A model as two halves, images to features and features to logits, whatever its architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from bbfast.errors import UnsupportedModelError
from bbfast.models._registry import ROLES
from bbfast.training.prediction import probe

__all__ = ["Split", "first_layer", "split_layer"]

_STAGES = ("stage5", "stage4")


class _Stop(Exception):
    """Carries the features out of a forward pass."""


class Split:
    """Reads and changes what passes at the end of one module; modes and gradients are the caller's.

    Args:
        model: The model.
        layer: Dotted name of the module whose output is the feature.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.model, self.layer = model, layer

    def features(self, x: Tensor) -> Tensor:
        """``z [B, ...]`` of normalised images ``[B, C, H, W]``; what follows the module is not run."""
        kept: list[Tensor] = []

        def leave(_: nn.Module, __: Any, out: Tensor) -> None:
            kept.append(out)
            raise _Stop

        with self._hooked(leave), contextlib.suppress(_Stop):
            self.model(x)
        return kept[0]

    def both(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Features and logits; ``change`` replaces the features on their way, and may change the batch's size."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            kept.append(out)
            return None if change is None else change(out)

        with self._hooked(keep):
            logits: Tensor = self.model(x)
        return kept[0], logits

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[..., Any]) -> Iterator[None]:
        handle = self.model.get_submodule(self.layer).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def split_layer(model: nn.Module, method: str, layer: str = "last_stage") -> str:
    """Dotted name of the module at whose end the model is split: ``last_stage``, a stage (``stage3``) or a name.

    Raises:
        UnsupportedModelError: if there is no such module.
    """
    from bbfast.models import roles

    found = roles(model)
    if layer.startswith("stage") and layer in ROLES and found.has(layer):
        return found.names(layer)[0]
    if layer != "last_stage":
        if not layer or layer not in dict(found.model.named_modules()):
            raise UnsupportedModelError(method, found.label, f"it has no layer {layer!r}", "give a dotted name")
        return layer
    for role in _STAGES:
        if found.has(role):
            return found.names(role)[0]
    raise UnsupportedModelError(method, found.label, "its stages are not known", "name a layer with layer=...")


def first_layer(model: nn.Module, method: str, image_size: tuple[int, int, int]) -> str:
    """Dotted name of the layer without children that receives the images; makes a forward pass of one image.

    Raises:
        UnsupportedModelError: if the images go elsewhere first.
    """
    from bbfast.models import roles

    label = roles(model).label
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0] if args else None
            seen.append((name, isinstance(given, Tensor) and given.shape == (1, *image_size)))

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    probe(model, image_size, [module.register_forward_pre_hook(note(name)) for name, module in leaves])
    if not seen or not seen[0][1]:
        raise UnsupportedModelError(method, label, "no layer receives the images as they are")
    return seen[0][0]
