"""What ``torch.func`` and forward-mode differentiation are doing around a call.

torch has no public way to ask. Where a later torch has other names than these, nothing is seen at work, and torch's own
rules and messages remain.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import _functorch
except ImportError:  # pragma: no cover
    _functorch = None  # type: ignore[assignment]

__all__ = ["gradient_beyond_backward", "holds_nothing", "is_wrapped"]


def is_wrapped(tensor: Tensor) -> bool:
    """Whether ``torch.func`` has wrapped it: it then stands for a batch (``vmap``) or is being differentiated."""
    ask = getattr(_functorch, "is_functorch_wrapped_tensor", None)
    return not torch.compiler.is_compiling() and ask is not None and ask(tensor)


def holds_nothing(tensor: Tensor) -> bool:
    """Whether it has no elements, or stands for an empty batch of ``vmap`` (its own shape then does not show it)."""
    while tensor.numel() and is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.numel() == 0


def gradient_beyond_backward() -> bool:
    """Whether ``torch.func.grad`` or one of its kin is at work, or forward-mode differentiation. The first refuses a
    registered operator, the second would take its derivative for zero."""
    if torch.compiler.is_compiling():
        return False
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    stack, kinds = (getattr(_functorch, name, None) for name in ("get_interpreter_stack", "TransformType"))
    return stack is not None and kinds is not None and any(t.key() == kinds.Grad for t in stack() or ())
