"""Attention maps: where a network looks, and where to read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.errors import UnsupportedModelError
from bbfast.models import roles
from bbfast.training.prediction import probe

__all__ = ["Tap", "attention_loss", "attention_map", "default_taps", "named_taps"]

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where a feature map is read.

    Args:
        label: What it is called in results.
        module: Dotted name of the module.
        of_input: Read what goes in (the map before a pooling layer) instead of what comes out.
    """

    label: str
    module: str
    of_input: bool = False

    def listen(self, model: nn.Module, kept: dict[str, Tensor]) -> Any:
        """Keep the map of every forward pass of ``model`` in ``kept``, under the label; gives the hook's handle."""
        module = model.get_submodule(self.module)
        if self.of_input:
            return module.register_forward_pre_hook(lambda _, args: kept.__setitem__(self.label, args[0]))
        return module.register_forward_hook(lambda _, __, output: kept.__setitem__(self.label, output))


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Normalised attention: ``A = sum over channels of |F|^p``, then ``A / (|A| + 1e-6)`` for each sample.

    Args:
        features: ``[B, C, h, w]``, or tokens ``[B, T, C]``; a class token before a square number of tokens is left out.
        power: p.

    Returns:
        float32 ``[B, h * w]``, invariant to the scale of ``features``; a dead map gives zeros.

    Source: Zagoruyko, Komodakis, ICLR 2017, section 3.1; Li et al., NAD, ICLR 2021, eq. 1 and 2.
    """
    x = features.float()
    if x.dim() == 3:
        tokens = x.shape[1]
        square = math.isqrt(tokens) ** 2 == tokens
        x = (x if square or math.isqrt(tokens - 1) ** 2 != tokens - 1 else x[:, 1:]).transpose(1, 2)
    a = x.flatten(2).abs().pow(power).sum(dim=1)
    return a / (a.norm(dim=1, keepdim=True) + _EPS)


def attention_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean squared difference of the attention maps over samples and positions; the teacher's gets no gradient."""
    return F.mse_loss(attention_map(student, power), attention_map(teacher.detach(), power))


def default_taps(model: nn.Module, image_size: Sequence[int], method: str) -> list[Tap]:
    """Three places, early to late, where attention says something.

    Networks of five resolutions (VGG): before the second, third and fourth pooling. Networks of tokens (ViT): the
    blocks that end each third. Others: the last three stages with more than one position; on small images there may be
    fewer.

    Args:
        model: The model; runs once on one blank image.
        image_size: ``(C, H, W)``.
        method: Who asks, for the message.

    Raises:
        UnsupportedModelError: if there is none.
    """
    found = roles(model)
    names = [f"stage{i}" for i in range(1, 6) if found.has(f"stage{i}")]
    if len(names) == 5:
        return [Tap(name, found.names(name)[0], of_input=True) for name in names[1:4]]
    taps = [Tap(name, found.names(name)[0]) for name in names]
    maps = _maps(model, taps, image_size)
    if maps and all(features.dim() == 3 for features in maps.values()):
        parent, _, _ = taps[-1].module.rpartition(".")
        blocks = [name for name, _ in model.get_submodule(parent).named_children()]
        ends = [len(blocks) * third // 3 - 1 for third in (1, 2, 3)]
        return [Tap(f"block{i + 1}", f"{parent}.{blocks[i]}") for i in ends]
    taps = [tap for tap in taps if maps[tap.label].flatten(2).shape[2] > 1][-3:]
    if not taps:
        raise UnsupportedModelError(
            method,
            found.label,
            f"none of its stages has a map of more than one position on images of {tuple(image_size)}",
            "name others with layers=...",
        )
    return taps


def named_taps(model: nn.Module, layers: Sequence[str], method: str) -> list[Tap]:
    """The places named by roles (``stage3``) or dotted names of modules.

    Raises:
        UnsupportedModelError: if there is no such role or module.
    """
    found, known = roles(model), dict(found_modules(model))
    taps = []
    for layer in layers:
        name = layer if layer in known else None
        if name is None and layer.startswith("stage") and found.table.get(layer):
            name = found.names(layer)[0]
        if name is None:
            raise UnsupportedModelError(method, found.label, f"it has no layer {layer!r}", "give roles or module names")
        taps.append(Tap(layer, name))
    return taps


def found_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by dotted name, without the model itself."""
    return {name: module for name, module in roles(model).model.named_modules() if name}


def _maps(model: nn.Module, taps: Sequence[Tap], image_size: Sequence[int]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    probe(model, image_size, [tap.listen(model, kept) for tap in taps])
    return kept
