"""Names to builders, and what every model built here carries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from bbfast._registry import Registry
from bbfast.models._spec import ModelSpec, as_pairs, parse_image_size

__all__ = ["ADDITIONS", "MODELS", "ROLES", "ModelEntry", "add", "available", "build", "build_spec", "info", "register"]

ROLES = ("stage1", "stage2", "stage3", "stage4", "stage5", "last_conv", "norms", "classifier", "penultimate")
"""Every role a module can have. ``stage5`` is there only in models with five resolutions (VGG); ``penultimate`` is not
given at registration: it is the input of the classifier."""

Builder = Callable[[ModelSpec], nn.Module]
ADDITIONS: Registry[Callable[..., None]] = Registry("model addition", packages=("bbfast.models.additions",))
"""Name to ``add(model, **settings)``, which changes the model in place."""
B = TypeVar("B", bound=Builder)


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A registered model.

    Args:
        builder: ``builder(spec) -> nn.Module``; the module takes normalised images.
        roles: Role to the dotted names of its modules.
        title, year, paper, summary: Shown by ``bbfast list`` and ``bbfast info``.
        min_size: Smallest side of an image, in pixels.
        weights: Name of the ImageNet weights that ``pretrained=True`` loads; empty if there are none.
    """

    builder: Builder
    roles: Mapping[str, tuple[str, ...]]
    title: str
    year: int | None
    paper: str
    summary: str
    min_size: int
    weights: str


MODELS: Registry[ModelEntry] = Registry("model", packages=("bbfast.models.zoo",), entry_points="bbfast.models")


def register(
    name: str,
    *,
    roles: Mapping[str, str | Sequence[str]] | None = None,
    title: str = "",
    year: int | None = None,
    paper: str = "",
    summary: str = "",
    min_size: int = 1,
    weights: str = "",
) -> Callable[[B], B]:
    """Decorator of a function ``builder(spec: ModelSpec) -> nn.Module``.

    Args:
        name: Name to build it by.
        roles: Role (``stage1`` .. ``stage5``, ``last_conv``, ``norms``, ``classifier``) to a dotted module name or
            several. ``norms`` and ``classifier`` are found by type if not given; any other one that is not given is
            one that the model does not have.
        title: Full name.
        year: Of publication.
        paper: Reference.
        summary: One sentence.
        min_size: Smallest side of an image, in pixels.
        weights: Name of the ImageNet weights that the builder loads if ``spec.pretrained``; empty if there are none.

    Raises:
        ValueError: if the name is taken or a role unknown.
    """
    mapped = {}
    for role, names in (roles or {}).items():
        if role not in ROLES or role == "penultimate":
            raise ValueError(f"role must be one of {', '.join(ROLES[:-1])}, got {role!r}")
        mapped[role] = (names,) if isinstance(names, str) else tuple(names)

    def decorate(builder: B) -> B:
        MODELS.register(name)(ModelEntry(builder, mapped, title or name, year, paper, summary, min_size, weights))
        return builder

    return decorate


def available() -> list[str]:
    """Names of all models, third-party ones included, sorted."""
    return MODELS.names()


def build(
    name: str,
    num_classes: int,
    image_size: int | Sequence[int],
    pretrained: bool = False,
    in_channels: int | None = None,
) -> nn.Module:
    """Build a model, newly initialised from torch's global generator.

    Args:
        name: One of :func:`available`.
        num_classes: Number of logits.
        image_size: Side, ``(H, W)`` or ``(C, H, W)`` of the images.
        pretrained: Start from ImageNet weights (all tensors whose shape fits; the last layer is fresh). torchvision
            downloads them once.
        in_channels: Channels of the images; default: those of ``image_size``, else 3.

    Returns:
        A module from normalised images ``[N, C, H, W]`` to logits ``[N, K]``, in training mode, with the attribute
        ``bbfast_spec`` (:class:`ModelSpec`).

    Raises:
        UnknownNameError: if there is no such model; the message gives the nearest names.
        ValueError: if ``num_classes`` or a size is not positive, the images are too small for the model, or it has no
            pretrained weights.
        WeightsError: if the weights cannot be downloaded.
    """
    size, channels = parse_image_size(image_size, in_channels)
    return build_spec(ModelSpec(MODELS.canonical(name), num_classes, size, channels, pretrained))


def build_spec(spec: ModelSpec, *, weights: bool = True) -> nn.Module:
    """Build what ``spec`` describes; ``weights=False`` leaves ImageNet weights out. See :func:`build`."""
    entry = MODELS.get(spec.name)
    if isinstance(spec.num_classes, bool) or not isinstance(spec.num_classes, int) or spec.num_classes < 1:
        raise ValueError(f"num_classes must be a whole number >= 1, got {spec.num_classes!r}")
    if min(spec.image_size) < entry.min_size:
        raise ValueError(f"{spec.name} needs images of at least {entry.min_size} pixels a side, got {spec.image_size}")
    if spec.pretrained and not entry.weights:
        raise ValueError(f"pretrained must be False: there are no ImageNet weights for {spec.name}")
    model = entry.builder(dataclasses.replace(spec, pretrained=spec.pretrained and weights))
    for name, settings in spec.additions:
        ADDITIONS.get(name)(model, **dict(settings))
    model.bbfast_spec = spec  # type: ignore[assignment]
    return model


def add(model: nn.Module, name: str, **settings: Any) -> None:
    """Build an addition into ``model``, in place, and write it into its plan, so that it is saved and loaded with it.

    An addition is what a defense's model needs when it is used, besides its weights: a further layer, a stamp.

    Args:
        model: Any model; one without a plan (not made by :func:`build`) keeps none.
        name: A registered addition.
        **settings: What its function takes; plain JSON values.

    Raises:
        UnknownNameError: if there is no such addition.
    """
    ADDITIONS.get(name)(model, **settings)
    spec = getattr(model, "bbfast_spec", None)
    if isinstance(spec, ModelSpec):
        added = (*spec.additions, (ADDITIONS.canonical(name), as_pairs(settings)))
        model.bbfast_spec = dataclasses.replace(spec, additions=added)  # type: ignore[assignment]


def info(name: str) -> dict[str, Any]:
    """What is known about a model: title, year, paper, summary, smallest image, ImageNet weights, layers by role.

    Raises:
        UnknownNameError: if there is no such model.
    """
    entry = MODELS.get(name)
    facts = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name != "builder"}
    return {"name": MODELS.canonical(name), **facts, "roles": {role: list(n) for role, n in entry.roles.items()}}
