"""Random numbers that are a function of (key, sample) and nothing else.

A draw does not depend on call order, batch composition or device: sample 17 gets the same numbers whether it is
poisoned alone, in a batch of 4096 or on a GPU. Counter-based: two rounds of splitmix64 (Steele, Lea and Flood, 2014) in
int64 tensors, whose arithmetic wraps modulo 2**64 on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bbfast.data.loader import derive_seed

__all__ = ["integers", "make_key", "uniform"]


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_A = _signed(0xBF58476D1CE4E5B9)
_MIX_B = _signed(0x94D049BB133111EB)
_PIECE = 1 << 15


def make_key(*parts: int | str) -> int:
    """A 63-bit key that depends on every part, e.g. ``make_key("wanet", seed, epoch)``."""
    return derive_seed("sample", *parts)


def uniform(key: int, index: Tensor, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in ``[low, high)`` for each sample.

    Args:
        key: From :func:`make_key`.
        index: Sample numbers, int64 ``[B]``.
        shape: Numbers wanted for each sample.
        low: Lower end.
        high: Upper end.

    Returns:
        float32 ``[B, *shape]`` on the device of ``index``, in steps of ``(high - low) / 2**24``.
    """
    count = math.prod(shape)
    # Each 64-bit word gives two numbers of 24 bits. Small pieces on the CPU: the words then never leave its cache.
    rows = max(1, _PIECE // max(1, count)) if index.device.type == "cpu" else max(1, len(index))
    unit = torch.empty(len(index), (count + 1) // 2, 2, device=index.device)
    for part, out in zip(index.split(rows), unit.split(rows), strict=True):
        words = _bits(key, part, out.shape[1])
        out[..., 0] = _shift_right(words, 40)
        out[..., 1] = _shift_right(words, 8) & 0xFFFFFF
    unit = unit.flatten(1)[:, :count] * 2.0**-24
    return (unit * (high - low) + low).reshape(len(index), *shape)


def integers(key: int, index: Tensor, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Integers in ``low..high`` (both included) for each sample, int64 ``[B, *shape]``.

    The span is at most 2**31; the bias of the multiply-shift is below ``span / 2**32``.
    """
    drawn = _shift_right(_bits(key, index, math.prod(shape)), 32)
    return (_shift_right(drawn * (high - low + 1), 32) + low).reshape(index.shape[0], *shape)


def _bits(key: int, index: Tensor, count: int) -> Tensor:
    """64 random bits, int64 ``[B, count]``."""
    stream = _mix(index[:, None] * _GOLDEN + _signed(key))
    counter = torch.arange(1, count + 1, device=index.device)
    return _mix(stream + counter * _GOLDEN)


def _mix(z: Tensor) -> Tensor:
    z = _shift_right(z, 30).bitwise_xor_(z).mul_(_MIX_A)
    z = _shift_right(z, 27).bitwise_xor_(z).mul_(_MIX_B)
    return _shift_right(z, 31).bitwise_xor_(z)


def _shift_right(z: Tensor, by: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 repeats the sign bit."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)
