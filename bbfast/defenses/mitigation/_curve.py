"""A curve in weight space between two copies of a network, and its training."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from bbfast.data.loader import Batch, BatchLoader
from bbfast.training import Program

__all__ = ["Curve", "CurveProgram", "coefficients", "factor", "reestimate_batch_norm"]

Kind = Literal["bezier", "polychain"]

_LAST = 0.01


def coefficients(bends: int, t: float, kind: Kind) -> Tensor:
    """Weight of each of the curve's points at ``t``, float64 ``[bends]``; they add up to 1."""
    if kind == "polychain":
        place = torch.arange(bends, dtype=torch.float64)
        return (1 - (t * (bends - 1) - place).abs()).clamp(min=0)
    n = bends - 1
    return torch.tensor([math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(bends)], dtype=torch.float64)


def factor(epoch: int, epochs: int) -> float:
    """What the learning rate is multiplied by: 1 until half of the epochs, then linearly to 0.01 at nine tenths.

    Source: the authors' code.
    """
    return 1 - (1 - _LAST) * min(max((epoch / epochs - 0.5) / 0.4, 0.0), 1.0)


class Curve(nn.Module):
    """Points of weights between two networks of one architecture; the inner ones are trained, the ends stay.

    The weights of a network are one flat vector, so a point of the curve is one sum of vectors.

    Args:
        near: The network at ``t = 0``.
        far: The network at ``t = 1``.
        bends: Points of the curve, both ends included, at least 3; the inner ones start on the line between the ends.
        kind: ``bezier`` or ``polychain``.
    """

    near: Tensor
    far: Tensor

    def __init__(self, near: nn.Module, far: nn.Module, bends: int = 3, kind: Kind = "bezier") -> None:
        super().__init__()
        self.bends, self.kind = bends, kind
        # Its parameters are replaced in every pass, get no gradient and stay; its BatchNorm statistics move along.
        self.network = copy.deepcopy(near)
        self.register_buffer("near", _flat(near))
        self.register_buffer("far", _flat(far))
        steps = torch.linspace(0, 1, bends, device=self.near.device)[1:-1, None]
        self.inner = nn.Parameter(torch.lerp(self.near, self.far, steps))

    def point(self, t: float) -> Tensor:
        """Flat weights at ``t``, differentiable in the inner points."""
        weight = coefficients(self.bends, t, self.kind).to(self.near)
        return weight[0] * self.near + weight[1:-1] @ self.inner + weight[-1] * self.far

    def forward(self, x: Tensor, t: float = 0.5) -> Tensor:
        """Output of the network with the weights at ``t``."""
        names, sizes = zip(*((name, p.numel()) for name, p in self.network.named_parameters()), strict=True)
        parts = self.point(t).split(list(sizes))
        shaped = (part.view_as(p) for part, p in zip(parts, self.network.parameters(), strict=True))
        out: Tensor = functional_call(self.network, dict(zip(names, shaped, strict=True)), (x,))
        return out

    @torch.no_grad()
    def put(self, model: nn.Module, t: float) -> None:
        """Give ``model`` the weights at ``t``."""
        nn.utils.vector_to_parameters(self.point(t), model.parameters())


class CurveProgram(Program):
    """Every batch at a place of the curve of its own, drawn from U(0, 1); the rate falls as in :func:`factor`."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        logits = model(batch.x, float(torch.rand(())))
        return nn.functional.cross_entropy(logits.float(), batch.y), logits

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._factor = factor(epoch, self.epochs)

    def after_backward(self, model: nn.Module) -> None:
        # The engine sets the recipe's constant rate before each step.
        for group in self.optimizer.param_groups:
            group["lr"] *= self._factor

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "epochs": self.epochs}


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, loader: BatchLoader) -> int:
    """Take the BatchNorm statistics anew, as the plain mean over one epoch's batches; the number of layers.

    Source: Izmailov et al., UAI 2018, arXiv 1803.05407 (as in the authors' code).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    try:
        for batch in loader.epoch(0):
            model(batch.x)
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training
    return len(layers)


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()
