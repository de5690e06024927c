"""The layer behind the last convolution, and what pruning its inputs does, without running the network again."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.defenses.features import normalised
from bbfast.errors import UnsupportedModelError
from bbfast.training.prediction import evaluating

__all__ = ["Head", "channel_columns", "channel_means", "find_head", "layer_inputs", "sweep"]

_BUDGET = 1 << 27
"""Bytes of the largest intermediate of :func:`sweep`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A Linear layer whose input columns belong to channels.

    Args:
        linear: The layer.
        name: Its name in the model.
        channels: Number of channels; channel c owns the columns ``c * width`` to ``(c + 1) * width - 1``.
        rest: What follows it up to the logits; empty if it gives them.
    """

    linear: nn.Linear
    name: str
    channels: int
    rest: nn.Sequential

    @property
    def width(self) -> int:
        """Columns a channel."""
        return self.linear.in_features // self.channels

    @property
    def is_classifier(self) -> bool:
        return len(self.rest) == 0


def find_head(model: nn.Module, method: str) -> Head:
    """The layer to prune.

    The last Linear layer, whose inputs are channels of the last convolutional stage after global pooling. Where the
    model ends in a stack of Linear layers (VGG), the first of them instead, by the channels of the last convolution:
    the inputs of the last layer are then hidden units that no convolution gives.

    Args:
        model: The model.
        method: Who asks, for the message.

    Raises:
        UnsupportedModelError: if the model has no final Linear layer.
    """
    from bbfast.models import roles

    found = roles(model)
    if not found.has("classifier"):
        raise UnsupportedModelError(
            method, found.label, "it has no final Linear layer", "choose a model that ends in one"
        )
    name = found.names("classifier")[0]
    last = model.get_submodule(name)
    assert isinstance(last, nn.Linear)
    parent_name, _, _ = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    children = list(parent.named_children()) if isinstance(parent, nn.Sequential) else []
    stack = [i for i, (_, child) in enumerate(children) if isinstance(child, nn.Linear)]
    if len(stack) < 2:
        return Head(last, name, last.in_features, nn.Sequential())
    child_name, first = children[stack[0]]
    assert isinstance(first, nn.Linear)
    conv = found.module("last_conv") if found.has("last_conv") else None
    out = conv.out_channels if isinstance(conv, nn.Conv2d) else first.in_features
    channels = out if first.in_features % out == 0 else first.in_features
    rest = nn.Sequential(*(child for _, child in children[stack[0] + 1 :]))
    return Head(first, f"{parent_name}.{child_name}" if parent_name else child_name, channels, rest)


@torch.no_grad()
def layer_inputs(model: nn.Module, layer: nn.Module, images: ImageSet, batch_size: int = 256) -> Tensor:
    """What ``layer`` receives for every image: float32 ``[N, ...]``, eval mode, no augmentation."""
    parts: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0].detach().float()))
    try:
        with evaluating(model):
            for start in range(0, len(images), batch_size):
                model(normalised(images.images, start, batch_size, images.mean, images.std))
    finally:
        hook.remove()
    return torch.cat(parts)


def channel_means(inputs: Tensor, channels: int, absolute: bool = False) -> Tensor:
    """Mean activation of each channel, float64 ``[channels]``, over samples and the channel's columns.

    Args:
        inputs: ``[N, channels * width]``.
        channels: Number of channels.
        absolute: Mean of the absolute values.
    """
    x = inputs.double()
    return (x.abs() if absolute else x).view(inputs.shape[0], channels, -1).mean(dim=(0, 2))


def channel_columns(channels: Tensor, width: int) -> Tensor:
    """The input columns of ``channels`` int64 ``[c]``, channel after channel: int64 ``[c * width]``."""
    return (channels[:, None] * width + torch.arange(width, device=channels.device)).flatten()


@torch.no_grad()
def sweep(head: Head, inputs: Tensor, labels: Tensor, order: Tensor, step: int) -> Tensor:
    """Accuracy after pruning the first 0, ``step``, ``2 * step``, ... channels of ``order``, all short of pruning every
    one.

    Zeroing columns of a Linear layer subtracts their products from its output. So one batched product gives the share
    of every group of ``step`` channels, and a running sum over the groups gives the output for every number of pruned
    channels: as much work as running the layer once.

    Args:
        head: The layer.
        inputs: What it receives, ``[N, channels * width]``.
        labels: int64 ``[N]``.
        order: Channels in the order of pruning, int64 ``[channels]``.
        step: Channels pruned at a time.

    Returns:
        float64 ``[ceil(channels / step)]`` accuracies in 0..1.
    """
    steps = math.ceil(head.channels / step)
    columns = channel_columns(order, head.width)
    span, out = step * head.width, head.linear.out_features
    pad = steps * span - columns.numel()
    weight = nn.functional.pad(head.linear.weight.double()[:, columns], (0, pad))
    weight = weight.view(out, steps, span).permute(1, 2, 0).contiguous()
    hits = torch.zeros(steps, dtype=torch.float64, device=inputs.device)
    rows = max(1, _BUDGET // (8 * steps * max(out, span)))
    for z, y in zip(inputs.split(rows), labels.split(rows), strict=True):
        z = z.double()
        groups = nn.functional.pad(z[:, columns], (0, pad)).view(z.shape[0], steps, span).transpose(0, 1)
        share = torch.bmm(groups, weight)
        whole = nn.functional.linear(z, head.linear.weight.double(), _double(head.linear.bias))
        outputs = whole - (share.cumsum(dim=0) - share)
        logits = outputs if head.is_classifier else _run(head, outputs)
        hits += (logits.argmax(dim=2) == y).sum(dim=1)
    return hits / max(len(labels), 1)


def _run(head: Head, outputs: Tensor) -> Tensor:
    """The rest of the head in eval mode and its own precision on ``[S, n, out]``."""
    with evaluating(head.rest):
        flat: Tensor = head.rest(outputs.flatten(0, 1).to(head.linear.weight.dtype))
    return flat.unflatten(0, outputs.shape[:2])


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()
