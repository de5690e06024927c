"""Matrix products at the precision of their arguments."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["full_precision"]


def full_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast: it would round pixels and cosines to 16 bits before they are multiplied."""
    known = device in ("cpu", "cuda", "mps", "xpu")  # autocast refuses a device that it does not know
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
