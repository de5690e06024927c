"""Layers by role: what a method asks for instead of a layer's name or position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor, nn

from bbfast.errors import UnknownNameError, UnsupportedModelError
from bbfast.models._registry import MODELS, ROLES
from bbfast.models._spec import ModelSpec

__all__ = ["Roles", "features", "forward_features", "roles"]


@dataclasses.dataclass(frozen=True, eq=False)
class Roles:
    """The modules of a model by role.

    ``stage1`` .. ``stage4``: the network's stages, early to late (VGG has a ``stage5``). ``last_conv``: the last
    spatial convolution (on ViT the last encoder block). ``norms``: every affine BatchNorm2d, or in a network without
    them every affine LayerNorm. ``classifier``: the last linear layer; ``penultimate`` is its *input*, so it names the
    same module.

    Args:
        model: The model, without wrappers of ``torch.compile`` and ``DataParallel``.
        label: Its name, for messages.
        table: Role to dotted module names.
    """

    model: nn.Module
    label: str
    table: Mapping[str, tuple[str, ...]]

    def has(self, role: str) -> bool:
        """Whether the model has the role; raises ``UnknownNameError`` for one that no model has."""
        if role not in ROLES:
            raise UnknownNameError("layer role", role, ROLES)
        return bool(self.table.get(role))

    def names(self, role: str) -> list[str]:
        """Dotted names of the role's modules, in the order of the network.

        Raises:
            UnknownNameError: if no model has such a role.
            UnsupportedModelError: if this model does not have it.
        """
        if not self.has(role):
            present = ", ".join(r for r in ROLES if self.table.get(r)) or "none"
            hint = f"its roles: {present}; give others with bbfast.models.register(name, roles=...)"
            raise UnsupportedModelError(f"layer role {role!r}", self.label, "the model has no such layer", hint)
        return list(self.table[role])

    def modules(self, role: str) -> list[nn.Module]:
        """The role's modules; raises as :meth:`names` does."""
        return [self.model.get_submodule(name) for name in self.names(role)]

    def module(self, role: str) -> nn.Module:
        """The role's only module; raises as :meth:`names` does, and ``ValueError`` if there are several."""
        found = self.modules(role)
        if len(found) != 1:
            raise ValueError(f"role {role!r} of {self.label} has {len(found)} modules; use modules({role!r})")
        return found[0]


def roles(model: nn.Module) -> Roles:
    """The layers of ``model`` by role.

    For a model of :func:`bbfast.models.build` they come from its registration. In any other module, ``norms`` and
    ``classifier`` (the last linear layer in the order of registration) are found by type; the other roles are absent.

    Raises:
        UnsupportedModelError: if a registered name does not exist in ``model``, whose layers were changed.
    """
    plain = _unwrapped(model)
    spec = getattr(plain, "bbfast_spec", None)
    label = spec.name if isinstance(spec, ModelSpec) else type(plain).__name__
    table: dict[str, tuple[str, ...]] = {}
    if isinstance(spec, ModelSpec):
        table.update(MODELS.get(spec.name).roles)
    known = dict(plain.named_modules())
    for role, names in table.items():
        absent = [name for name in names if name not in known]
        if absent:
            reason = f"it has no layer {absent[0]!r}"
            raise UnsupportedModelError(f"layer role {role!r}", label, reason, "were layers of it replaced?")
    table.setdefault("norms", _norms(known))
    table.setdefault(
        "classifier", tuple([name for name, module in known.items() if isinstance(module, nn.Linear)][-1:])
    )
    table["penultimate"] = table["classifier"]
    return Roles(plain, label, table)


@overload
def features(model: nn.Module, x: Tensor, role: str, with_logits: Literal[False] = False) -> Tensor: ...


@overload
def features(model: nn.Module, x: Tensor, role: str, with_logits: Literal[True]) -> tuple[Tensor, Tensor]: ...


def features(model: nn.Module, x: Tensor, role: str, with_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``model`` on ``x`` and return what passes at a role.

    Gradients, training mode and autocast are the caller's.

    Args:
        model: Any model with the role.
        x: Normalised images ``[N, C, H, W]``.
        role: ``penultimate``: the classifier's input ``[N, D]``; otherwise the output of the role's module.
        with_logits: Whether the logits ``[N, K]`` of the same pass come along.

    Returns:
        The feature, or ``(feature, logits)``.

    Raises:
        UnknownNameError, UnsupportedModelError, ValueError: as :meth:`Roles.module` does.
    """
    found, logits = forward_features(model, x, [role])
    return (found[role], logits) if with_logits else found[role]


def forward_features(model: nn.Module, x: Tensor, wanted: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """One pass that keeps what passes at several roles.

    Args:
        model: Any model with the roles.
        x: Normalised images ``[N, C, H, W]``.
        wanted: Roles, as in :func:`features`.

    Returns:
        ``({role: feature}, logits [N, K])``.

    Raises:
        UnknownNameError, UnsupportedModelError, ValueError: as :meth:`Roles.module` does.
    """
    table = roles(model)
    kept: dict[str, Tensor] = {}

    def keep_input(role: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept[role] = args[0]

        return hook

    def keep_output(role: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept[role] = output

        return hook

    targets = {role: table.module(role) for role in wanted}
    handles = [
        module.register_forward_pre_hook(keep_input(role))
        if role == "penultimate"
        else module.register_forward_hook(keep_output(role))
        for role, module in targets.items()
    ]
    try:
        logits: Tensor = model(x)
    finally:
        for handle in handles:
            handle.remove()
    for role in wanted:
        if role not in kept:
            reason = "its forward pass does not use that layer"
            raise UnsupportedModelError(f"layer role {role!r}", table.label, reason)
    return kept, logits


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _norms(known: Mapping[str, nn.Module]) -> tuple[str, ...]:
    batch = tuple(n for n, m in known.items() if isinstance(m, nn.BatchNorm2d) and m.affine)
    return batch or tuple(n for n, m in known.items() if isinstance(m, nn.LayerNorm) and m.elementwise_affine)
