"""The network of detectors that differentiate with respect to pixels only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from bbfast._progress import Bar, bar
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError
from bbfast.training.device import Numerics, choose_numerics, placed
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import keep_freed_memory

__all__ = ["Precision", "demand_finite", "frozen"]

Precision = Literal["auto", "fp32", "bf16"]


@contextlib.contextmanager
def frozen(view: DefenderView, precision: str, steps: int) -> Iterator[tuple[nn.Module, Numerics, Bar]]:
    """The view's model in eval mode, no gradients of its weights, laid out for speed; a progress bar of ``steps``."""
    model, device = view.model, view.device
    numerics = choose_numerics(precision, "auto", model, device)
    with (
        evaluating(model),
        trainable(model, False),
        placed(model, device, numerics.memory_format),
        keep_freed_memory(device),
        bar(view.method, steps, view.progress) as shown,
    ):
        yield model, numerics, shown


def demand_finite(view: DefenderView, values: Tensor, what: str) -> None:
    """Refuse a model that gives NaN.

    Raises:
        UnsupportedModelError: if one of ``values`` is NaN or infinite.
    """
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        name = type(view.model).__name__
        reason = f"its outputs or gradients are NaN or infinite on {broken} of {values.numel()} {what}"
        raise UnsupportedModelError(view.method, name, reason, "its training diverged")
