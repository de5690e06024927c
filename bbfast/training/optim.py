"""Optimisers and learning-rate schedules of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bbfast.training.recipe import Recipe

__all__ = ["Schedule", "load_optimizer_state", "make_optimizer", "optimizer_state"]


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the trainable parameters; one kernel for all of them where the device has it.

    Raises:
        ValueError: if no parameter is trainable.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter (all have requires_grad=False)")
    lr, decay = recipe.lr, recipe.weight_decay
    fused = True if all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable) else None
    if recipe.optimizer == "sgd":
        momentum, nesterov = recipe.momentum, recipe.nesterov
        return torch.optim.SGD(trainable, lr=lr, momentum=momentum, weight_decay=decay, nesterov=nesterov, fused=fused)
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(trainable, lr=lr, weight_decay=decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(trainable, lr=lr, betas=recipe.betas, weight_decay=decay, amsgrad=recipe.amsgrad, fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser carries from step to step, flat: ``"<parameter>.<name>"`` to a tensor."""
    state = optimizer.state_dict()["state"]
    flat = {}
    for index, entries in state.items():
        for name, value in entries.items():
            if value is not None:
                flat[f"{index}.{name}"] = torch.as_tensor(value).detach().clone()
    return flat


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what :func:`optimizer_state` gave, each tensor in the memory layout of its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape and value.dim():
            # Fused kernels walk parameter and state side by side in memory.
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Schedule:
    """Learning rate as a function of the epoch and the step; only ``plateau`` remembers anything.

    Args:
        recipe: Gives the kind and its settings.
        steps: Steps an epoch.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self._recipe, self._steps = recipe, steps
        self._lr, self._best, self._bad_epochs = recipe.lr, math.inf, 0

    def lr(self, epoch: int, step: int = 0) -> float:
        """Learning rate of a step; ``epoch`` and ``step`` count from 0."""
        r = self._recipe
        if r.schedule == "cosine":
            t_max = r.t_max or max(r.epochs, 1)
            return r.eta_min + (r.lr - r.eta_min) * (1 + math.cos(math.pi * epoch / t_max)) / 2
        if r.schedule == "multistep":
            return r.lr * r.gamma ** sum(epoch >= milestone for milestone in r.milestones)
        if r.schedule == "step":
            return r.lr * r.gamma ** (epoch // r.step_size)
        if r.schedule == "onecycle":
            return self._one_cycle(epoch * self._steps + step)
        return self._lr

    def epoch_done(self, loss: float) -> None:
        """Tell the schedule the mean training loss of an epoch.

        ``plateau``: as ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with its defaults (relative threshold 1e-4, no
        cool-down).
        """
        if self._recipe.schedule != "plateau":
            return
        if loss < self._best * (1 - 1e-4):
            self._best, self._bad_epochs = loss, 0
        else:
            self._bad_epochs += 1
        if self._bad_epochs > self._recipe.patience:
            reduced = self._lr * self._recipe.gamma
            self._lr, self._bad_epochs = (reduced if self._lr - reduced > 1e-8 else self._lr), 0

    def state(self) -> dict[str, float]:
        """What :meth:`load_state` needs to go on."""
        return {"lr": self._lr, "best": self._best, "bad_epochs": self._bad_epochs}

    def load_state(self, state: dict[str, float]) -> None:
        """Take back what :meth:`state` gave."""
        self._lr, self._best, self._bad_epochs = state["lr"], state["best"], int(state["bad_epochs"])

    def _one_cycle(self, step: int) -> float:
        total = max(self._recipe.epochs * self._steps, 1)
        top = self._recipe.lr
        start, end = top / 25, top / 25e4
        peak = self._recipe.pct_start * total - 1
        if step <= peak and peak > 0:
            return _cosine(start, top, step / peak)
        return _cosine(top, end, (step - peak) / max(total - 1 - peak, 1))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
