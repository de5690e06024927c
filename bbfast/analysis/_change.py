"""How much the trigger changes what each channel of a network puts out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.analysis._layers import by_channel, finite, paired_pass
from bbfast.analysis.subject import Pairs, Subject

__all__ = ["Change", "changes"]

_LEAST = 0.01
"""A channel's spread counts as this share of its layer's at least: a silent channel that the trigger wakes is
large, not infinite."""


class Change:
    """Sums over the samples of one layer; nothing else is kept.

    Args:
        name: Of the layer.
        layer: The layer.
        tool: Its asker, for messages.
    """

    def __init__(self, name: str, layer: nn.Module, tool: str) -> None:
        self.name, self.layer, self.tool = name, layer, tool
        self.count, self.places = 0, 0
        self.l1 = self.l2 = torch.zeros(0)
        self.clean: ops.ChannelStats | None = None

    def __call__(self, clean: Tensor, triggered: Tensor) -> None:
        a, b = (finite(self.name, self.tool, by_channel(self.layer, half)) for half in (clean, triggered))
        gap = (a - b).double()
        l1, l2 = gap.abs().sum((0, 2)), gap.square().sum(2).sqrt().sum(0)
        self.l1, self.l2 = (l1, l2) if not self.count else (self.l1 + l1, self.l2 + l2)
        self.count += len(a)
        self.places = a.shape[2]
        self.clean = ops.channel_stats(a.unsqueeze(-1).contiguous(), state=self.clean)

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(l1, l2, z)``, float32 ``[C]`` on the CPU.

        z is l2 over the root of the number of places, in standard deviations of the channel's clean values.
        """
        assert self.clean is not None
        l1, l2 = self.l1 / self.count, self.l2 / self.count
        spread = self.clean.var.sqrt()
        floor = _LEAST * spread.square().mean().sqrt()
        z = l2 / self.places**0.5 / torch.maximum(spread, floor)
        # A layer without any spread that nothing changes: 0 / 0.
        z = torch.where(l2 > 0, z, 0)
        return l1.float().cpu(), l2.float().cpu(), z.float().cpu()


def changes(subject: Subject, pairs: Pairs, layers: dict[str, nn.Module], tool: str) -> Iterator[Change]:
    """The sums of each layer that takes part in a forward pass, in the order of ``layers``."""
    sums = {name: Change(name, layer, tool) for name, layer in layers.items()}
    paired_pass(subject, pairs, sums)
    return (found for found in sums.values() if found.count)
