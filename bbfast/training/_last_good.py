"""The weights to go back to when a training diverges."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

__all__ = ["LastGood"]


class LastGood:
    """A copy of a network's state dict, on its device, that is only ever overwritten by finite weights.

    ``weights`` is None until there were any.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None

    def keep(self, model: nn.Module) -> None:
        """Copy the weights, unless their norm is NaN or infinite: a finite loss is of those before the last step."""
        now = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        floats = [value for value in now.values() if value.is_floating_point() and value.numel()]
        # The 2-norm reads memory once and waits for the device once; isfinite takes ten times as long on a CPU. What
        # overflows it (1e19) is lost too.
        if not math.isfinite(float(get_total_norm(floats))):
            return
        if self.weights is None:
            self.weights = {name: value.clone() for name, value in now.items()}
        else:
            for name, value in now.items():
                self.weights[name].copy_(value)
