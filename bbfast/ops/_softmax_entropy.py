"""Entropy of the predicted distribution, one value a sample (STRIP, Gao et al. 2019, arXiv 1902.06531, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["softmax_entropy", "softmax_entropy_reference"]


def softmax_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of ``softmax(logits)`` in nats.

    Computed as ``log S - T / S`` with ``S = sum exp(x - max x)`` and ``T = sum exp(x - max x) (x - max x)``, which
    neither overflows nor takes the logarithm of a vanished probability. A logit of ``-inf`` is a class of probability
    zero. 16-bit input is computed in float32. Differentiable. NaN gives NaN.

    Args:
        logits: ``[N, K]``, K > 0, any floating dtype.

    Returns:
        ``[N]``, dtype and device of ``logits``, in ``0..log K``.

    Raises:
        TypeError: if ``logits`` is not a floating tensor.
        ValueError: if it does not have two dimensions or has no classes.
    """
    _check_logits(logits)
    if _native.usable("softmax_entropy", logits):
        return torch.ops.bbfast.softmax_entropy(logits)
    return softmax_entropy_reference(logits)


def softmax_entropy_reference(logits: Tensor) -> Tensor:
    """:func:`softmax_entropy` in plain PyTorch."""
    _check_logits(logits)
    logp = logits.to(_check.compute_dtype(logits.dtype)).log_softmax(1)
    # A class of probability zero adds nothing, where 0 * -inf would be NaN.
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(1).to(logits.dtype)


def _check_logits(logits: Any) -> None:
    if not _check.is_dense(logits, _check.FLOATS):
        raise TypeError(f"softmax_entropy: logits must be a floating tensor [N, K], got {_check.describe(logits)}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"softmax_entropy: logits must be [N, K] with K > 0, got {_check.describe(logits)}")


def _fake(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (logits,) = ctx.saved_tensors
    compute = _check.compute_dtype(logits.dtype)
    logp = logits.to(compute).log_softmax(1)
    p = logp.exp()
    logp = logp.masked_fill(logp == -torch.inf, 0)
    entropy = -(p * logp).sum(1, keepdim=True)
    return (-grad.to(compute).unsqueeze(1) * p * (logp + entropy)).to(logits.dtype)


_native.register("softmax_entropy", _fake, _backward, _setup)
