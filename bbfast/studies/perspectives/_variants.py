"""An attack's own trigger with other settings than those it was trained with."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.attacks import Attack, AttackResult, create
from bbfast.data.loader import derive_seed

__all__ = ["FAMILIES", "Family", "families", "triggered"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One way to change a trigger.

    Args:
        title: What a figure calls it, with its unit.
        applies: Whether an attack's trigger has it.
        own: The value of the trained trigger.
        values: Those that are tried, for images of a height; the trained value is always among them.
    """

    title: str
    applies: Callable[[Attack], bool]
    own: Callable[[Attack], float]
    values: Callable[[Attack], Sequence[float]]


def _spatial(attack: Attack) -> list[str]:
    """Parameters that are pictures of the images' size."""
    assert attack.image_size is not None
    return [name for name, value in attack.tensors.items() if tuple(value.shape[-2:]) == attack.image_size[1:]]


def _side(attack: Attack) -> float:
    mask = attack.tensors["mask"]
    return float(mask.amax(0).amax(0).gt(0).sum())


def _height(attack: Attack) -> int:
    assert attack.image_size is not None
    return attack.image_size[1]


def _has_square(attack: Attack) -> bool:
    c = _settings(attack)
    return "mask" in attack.tensors and hasattr(c, "square_size") and c.pattern_path is None and c.compat == "paper"


def _settings(attack: Attack) -> Any:
    return attack.config


def _steps(attack: Attack) -> list[float]:
    """Pixels up to three quarters of the images; of a patch so that it does not wrap around the border."""
    shifts = [d * _height(attack) / 32 for d in (0, 1, 2, 4, 6, 8, 12, 16, 20, 24)]
    room = _height(attack) - _side(attack) if "mask" in attack.tensors else _height(attack)
    return sorted({float(round(d)) for d in shifts if round(d) <= room})


FAMILIES: Mapping[str, Family] = {
    "location": Family("shift, pixels", lambda a: bool(_spatial(a)), lambda a: 0.0, _steps),
    "size": Family("side of the square, pixels", _has_square, _side, lambda a: (1, 2, 3, 4, 5, 6)),
    "opacity": Family("opacity, share", lambda a: True, lambda a: 1.0, lambda a: (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)),
    "colour": Family(
        "grey level, share", lambda a: {"mask", "pattern"} <= a.tensors.keys(), lambda a: 1.0,
        lambda a: (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    ),
    "frequency": Family(
        "frequency, waves", lambda a: hasattr(a.config, "frequency") and not a.needs_context,
        lambda a: float(_settings(a).frequency),
        lambda a: tuple(f * _settings(a).frequency for f in (0.5, 0.8, 0.9, 1.1, 1.25, 2)),
    ),
    "strength": Family(
        "strength of the warp", lambda a: hasattr(a.config, "s"), lambda a: float(_settings(a).s),
        lambda a: tuple(f * _settings(a).s for f in (0.25, 0.5, 0.75, 1.5, 2)),
    ),
    "jpeg": Family("JPEG quality", lambda a: True, lambda a: 100.0, lambda a: (10, 20, 30, 50, 70, 90)),
    "blur": Family("blur, sigma in pixels", lambda a: True, lambda a: 0.0, lambda a: (0.3, 0.5, 0.75, 1.0, 1.5, 2.0)),
    "partial": Family(
        "share of its pixels", lambda a: True, lambda a: 1.0, lambda a: (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
    ),
    "instance": Family("share of another image's", lambda a: True, lambda a: 0.0, lambda a: (0.25, 0.5, 0.75, 1.0)),
}  # fmt: skip
"""By name. ``opacity``, ``partial`` and ``instance`` act on what the trigger changes in an image: all of it less
strong; the change at some of the pixels alone; the change that the trigger makes in another image. ``jpeg`` (100: none)
and ``blur`` act on the triggered image. The others are the trigger's own parameters."""


def families(attack: Attack, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that the attack's trigger has."""
    return [name for name in names if FAMILIES[name].applies(attack)]


def triggered(
    result: AttackResult, attack: Attack, changes: Mapping[str, float], clean: Tensor, ids: Tensor, seed: int = 0
) -> Tensor:
    """Test images with a changed trigger.

    Args:
        result: For its training set and seed, where a parameter means that the trigger is drawn anew.
        attack: The result's attack, with its trigger.
        changes: Family to value; none of them is the trained trigger.
        clean: uint8 ``[n, C, H, W]``.
        ids: Sample numbers, int64 ``[n]``.
        seed: Of the pixels of ``partial`` and the other images of ``instance``.

    Returns:
        uint8 ``[n, C, H, W]``.
    """
    changed = {name: value for name, value in changes.items() if value != FAMILIES[name].own(attack)}
    images = _own(result, attack, changed).trigger(clean, ids, "test")
    if changed.keys() & {"opacity", "partial", "instance"}:
        images = _of_the_change(clean.float(), images.float(), changed, seed)
    if "blur" in changed:
        images = _blurred(images, changed["blur"])
    if "jpeg" in changed:
        from bbfast.defenses._corruptions.jpeg import jpeg

        images = _bytes(jpeg(images.float(), round(changed["jpeg"])))
    return images


def _own(result: AttackResult, attack: Attack, changed: Mapping[str, float]) -> Attack:
    """The attack with other parameters of its trigger."""
    settings: dict[str, Any] = {}
    if "size" in changed:
        settings["square_size"] = round(changed["size"])
    if "frequency" in changed:
        settings["frequency"] = changed["frequency"]
    if "strength" in changed:
        settings["s"] = changed["strength"]
    if settings:
        made = create(attack.name, **{**result.config["attack_config"], **settings})
        made.prepare(result.clean_train, result.num_classes, attack.seed)
    else:
        made = copy.copy(attack)
    made.tensors = dict(made.tensors)
    if "location" in changed:
        shift = -round(changed["location"])
        for name in _spatial(attack):
            made.tensors[name] = made.tensors[name].roll((shift, shift), (-2, -1))
    if "colour" in changed:
        pattern = made.tensors["pattern"]
        made.tensors["pattern"] = (pattern.float() * changed["colour"]).round().to(pattern.dtype)
    return made


def _of_the_change(clean: Tensor, images: Tensor, changed: Mapping[str, float], seed: int) -> Tensor:
    delta = images - clean
    if "instance" in changed:
        share = changed["instance"]
        # Each image gets the change of the next: never its own, unless there is but one.
        delta = (1 - share) * delta + share * delta.roll(1, 0)
    if "partial" in changed:
        places = delta.abs().amax((0, 1)).gt(0).flatten().nonzero().flatten()
        generator = torch.Generator().manual_seed(derive_seed("partial trigger", seed))
        order = places[torch.randperm(len(places), generator=generator)]
        kept = torch.zeros(delta.shape[-2:].numel())
        kept[order[: round(changed["partial"] * len(order))]] = 1
        delta = delta * kept.view(delta.shape[-2:])
    return _bytes(clean + changed.get("opacity", 1.0) * delta)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, cut off at three sigma, the border mirrored."""
    channels, reach = images.shape[1], min(max(1, round(3 * sigma)), min(images.shape[-2:]) - 1)
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    bell = torch.exp(-(place**2) / (2 * sigma**2))
    bell = (bell / bell.sum()).expand(channels, 1, 1, -1).contiguous()
    x = F.pad(images.float(), (reach,) * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, bell, groups=channels), bell.transpose(2, 3), groups=channels)
    return _bytes(x)


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255).to(torch.uint8)
