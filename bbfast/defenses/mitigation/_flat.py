"""The parameters of a model as one vector, so that a step over all of them is a few kernels instead of hundreds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FlatParameters"]


class FlatParameters:
    """Parameters that share one vector, each as a view with its own shape and strides.

    The :class:`torch.nn.Parameter` objects stay, so that an optimiser made before goes on working; only where their
    values lie changes. :meth:`release` gives each its own memory back.

    Args:
        parameters: Dense parameters of one dtype on one device.

    Raises:
        ValueError: if there are none, or they differ in dtype or device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f"parameters must have one dtype and device, got {sorted(map(str, kinds)) or 'none'}")
        ((dtype, device),) = kinds
        self.parameters = list(parameters)
        self._ends = torch.tensor([p.numel() for p in self.parameters]).cumsum(0).tolist()
        self.values = torch.empty(self._ends[-1], dtype=dtype, device=device)
        for p, view in zip(self.parameters, self.views(self.values), strict=True):
            view.copy_(p.detach())
            p.data = view

    def views(self, vector: Tensor) -> list[Tensor]:
        """Pieces of a vector ``[P]`` in the shapes and strides of the parameters."""
        starts = [0, *self._ends[:-1]]
        return [
            vector.as_strided(p.shape, p.stride(), vector.storage_offset() + start)
            for p, start in zip(self.parameters, starts, strict=True)
        ]

    def gather(self, tensors: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """Write tensors shaped like the parameters (None: zeros) into the vector ``out`` ``[P]``."""
        views = self.views(out)
        if any(tensor is None for tensor in tensors):
            out.zero_()
        pairs = [(view, tensor) for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
        torch._foreach_copy_([view for view, _ in pairs], [tensor for _, tensor in pairs])
        return out

    def release(self) -> None:
        """Every parameter in memory of its own again."""
        for p in self.parameters:
            p.data = p.data.clone()
