"""Streaming top-k samples of each channel: what the activation tools show, without a samples x channels matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["TopK", "topk_update", "topk_update_reference"]


class TopK(NamedTuple):
    """The k largest values of C channels, best first; give it back to :func:`topk_update` to go on with more samples.

    Attributes:
        values: ``[C, k]`` in the activations' dtype; minus infinity where there were fewer than k samples.
        ids: int64 ``[C, k]``, the samples they come from; -1 where there were fewer than k.
        nans: int64 ``[C]``, how often NaN came; it counts as minus infinity.
    """

    values: Tensor
    ids: Tensor
    nans: Tensor


def topk_update(state: TopK | None, activations: Tensor, index: Tensor, k: int) -> TopK:
    """Join a batch with the k largest activations of each channel so far.

    Larger values come first, of equal ones the smaller id: a strict order, so the result depends neither on how the
    samples are cut into batches nor on their order nor on the number of threads. Reads the batch once; a sample enters
    a channel only if it beats the worst one kept there. Not differentiable.

    Args:
        state: What an earlier call returned; None starts. Not modified.
        activations: Floating ``[N, C]``, one value a sample and channel (feature maps: their sum or maximum over
            space).
        index: int64 ``[N]``, ids of the samples, >= 0. An id that comes twice is kept twice.
        k: Samples to keep for each channel, > 0; more than have come leaves places free.

    Returns:
        :class:`TopK` on the device of ``activations``; new memory.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit, or ``k`` is not positive or not that of ``state``.
        IndexError: on the CPU, if an id is negative. On CUDA looking would make the host wait: there the kernel prints
            the id and stops with a device-side error.
    """
    _check_arguments(state, activations, index, k)
    activations = activations.detach()
    if _native.usable("topk_update", activations):
        old = (None, None, None) if state is None else state
        return TopK(*torch.ops.bbfast.topk_update(*old, activations, index, k))
    return _compute(state, activations, index, k)


def topk_update_reference(state: TopK | None, activations: Tensor, index: Tensor, k: int) -> TopK:
    """:func:`topk_update` in plain PyTorch. (``torch.topk`` alone breaks ties at random.)"""
    _check_arguments(state, activations, index, k)
    return _compute(state, activations.detach(), index, k)


def _compute(state: TopK | None, activations: Tensor, index: Tensor, k: int) -> TopK:
    if _check.inspectable(index) and len(index) and int(index.min()) < 0:
        raise IndexError(f"topk_update: index must not be negative, got {int(index.min())}")
    c = activations.shape[1]
    if state is None:
        free = activations.new_full((c, k), -torch.inf)
        zeros = torch.zeros(c, dtype=torch.int64, device=index.device)
        state = TopK(free, torch.full_like(free, -1, dtype=torch.int64), zeros)
    nan = activations.isnan()
    values = torch.cat((state.values, activations.masked_fill(nan, -torch.inf).T), 1)
    ids = torch.cat((state.ids, index.expand(c, -1)), 1)
    # By id, free places last; then by value, where equal ones stay in that order.
    by_id = torch.where(ids == -1, torch.iinfo(torch.int64).max, ids).argsort(dim=1, stable=True)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    best = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return TopK(values.gather(1, best), ids.gather(1, best), state.nans + nan.sum(0))


def _check_arguments(state: Any, activations: Any, index: Any, k: Any) -> None:
    op = "topk_update"
    if not _check.is_dense(activations, _check.FLOATS):
        raise TypeError(f"{op}: activations must be a floating tensor [N, C], got {_check.describe(activations)}")
    if activations.dim() != 2:
        raise ValueError(f"{op}: activations must be [N, C], got {_check.describe(activations)}")
    n, c = activations.shape
    _check.vector(op, "index", index, torch.int64, n, activations)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{op}: k must be a positive integer, got {k!r}")
    if state is None:
        return
    if not isinstance(state, tuple) or len(state) != len(TopK._fields):
        raise TypeError(f"{op}: state must be a TopK or None, got {_check.describe(state)}")
    dtypes = (activations.dtype, torch.int64, torch.int64)
    for name, value, shape, dtype in zip(TopK._fields, state, ((c, k), (c, k), (c,)), dtypes, strict=True):
        if not _check.is_dense(value, (dtype,)):
            kind = str(dtype).removeprefix("torch.")
            raise TypeError(f"{op}: state.{name} must be a {kind} tensor, got {_check.describe(value)}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{op}: state.{name} must be {list(shape)}, got {_check.describe(value)}")
        _check.same_device(op, f"state.{name}", value, activations)


def _fake(
    values: Tensor | None, ids: Tensor | None, nans: Tensor | None, activations: Tensor, index: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    c = activations.shape[1]
    return (
        activations.new_empty((c, k)),
        activations.new_empty((c, k), dtype=torch.int64),
        activations.new_empty(c, dtype=torch.int64),
    )


_native.register("topk_update", _fake)
