"""Adaptive sharpness-aware minimisation as a program of the training engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.defenses.mitigation._flat import FlatParameters
from bbfast.training.program import Program

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["SharpnessAware", "ascend", "frozen_statistics", "remove_gap"]

_EPS = 1e-12


@torch.no_grad()
def ascend(values: Tensor, gradient: Tensor, rho: float, adaptive: bool) -> None:
    """Move ``values`` ``[P]`` in place to where the loss around them is highest, to first order.

    ``w += rho w^2 g / (| |w| g | + 1e-12)``, or without ``adaptive`` ``w += rho g / (|g| + 1e-12)``, with one norm over
    all parameters.

    Source: Kwon et al., ASAM, ICML 2021, eq. 9; Foret et al., SAM, ICLR 2021, eq. 2.
    """
    if not adaptive:
        values.add_(gradient * (rho / (gradient.norm() + _EPS)))
        return
    size = values.abs()
    scaled = size * gradient
    values.addcmul_(size, scaled * (rho / (scaled.norm() + _EPS)))


@torch.no_grad()
def remove_gap(gradient: Tensor, before: Tensor, alpha: float) -> None:
    """Subtract, in place, ``alpha`` times the part of ``before`` that is orthogonal to ``gradient``; both ``[P]``.

    Source: Zhuang et al., GSAM, ICLR 2022, algorithm 1.
    """
    along = torch.dot(before, gradient) / (gradient.square().sum() + _EPS)
    gradient.mul_(1 + alpha * along).sub_(before, alpha=alpha)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm layers in train mode normalise by the batch and leave every buffer as it is.

    A momentum of 0 would leave the running statistics, but not ``num_batches_tracked``.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class SharpnessAware(Program):
    """Steps with the gradient taken where the loss around the weights is highest.

    Two passes a batch: the gradient at w moves the weights to w + e (:func:`ascend`); the gradient there, with
    BatchNorm's statistics left alone, is what the optimiser steps with from w. The loss in the history is the one at
    w + e; ``loss_before`` is the one at w. Layers with dropout draw anew in the second pass.

    Args:
        rho: Length of the ascent; 0 is plain training, bit for bit.
        adaptive: Scale it by the size of each weight.
        alpha: Weight of the gradient decomposition (:func:`remove_gap`); 0 is none.
        cosine_steps: Half period in *steps* of a cosine that replaces the recipe's schedule; None leaves that.
    """

    graph_safe: ClassVar[bool] = True

    def __init__(self, rho: float, adaptive: bool = True, alpha: float = 0.0, cosine_steps: int | None = None) -> None:
        self._rho, self._adaptive, self._alpha, self._cosine = rho, adaptive, alpha, cosine_steps
        self._flat: FlatParameters | None = None

    def describe(self) -> dict[str, Any]:
        names = ("rho", "adaptive", "alpha", "cosine")
        return {**super().describe(), **{name: getattr(self, f"_{name}") for name in names}}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._flat = FlatParameters([p for group in self.optimizer.param_groups for p in group["params"]])
        self._saved, self._gradient = torch.empty_like(self._flat.values), torch.empty_like(self._flat.values)
        self._before = torch.zeros((), device=device)

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._step, self._steps = epoch * steps, steps
        self._before.zero_()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        assert self._flat is not None
        flat = self._flat
        before, logits = super().loss(model, batch)
        flat.gather(torch.autograd.grad(before, flat.parameters, allow_unused=True), self._gradient)
        self._before += before.detach()
        self._saved.copy_(flat.values)
        ascend(flat.values, self._gradient, self._rho, self._adaptive)
        # Autocast keeps the casts of the weights it has seen, and these have just changed.
        torch.clear_autocast_cache()
        with frozen_statistics(model):
            value, _ = super().loss(model, batch)
        return value, logits

    def after_backward(self, model: nn.Module) -> None:
        assert self._flat is not None
        flat = self._flat
        flat.values.copy_(self._saved)
        if self._alpha:
            gradients = [p.grad for p in flat.parameters]
            total = flat.gather(gradients, torch.empty_like(self._gradient))
            remove_gap(total, self._gradient, self._alpha)
            for gradient, piece in zip(gradients, flat.views(total), strict=True):
                if gradient is not None:
                    gradient.copy_(piece)
        if self._cosine is not None:
            lr = self.recipe.lr * (1 + math.cos(math.pi * self._step / self._cosine)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def after_step(self, model: nn.Module) -> None:
        self._step += 1

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        return {"loss_before": float(self._before) / self._steps}

    def release(self) -> None:
        """Give the parameters memory of their own again; for when the training has ended, however it did."""
        if self._flat is not None:
            self._flat.release()
            self._flat = None
