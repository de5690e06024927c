"""Memory format of results."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.ops._func import is_wrapped

__all__ = ["empty_result", "result_format"]


def result_format(images: Tensor) -> torch.memory_format:
    """channels_last for images that are so and not contiguous as well; contiguous for any others.

    The same rule as ``result_format`` in csrc/common/image_batch.h.
    """
    if is_wrapped(images):  # cannot be asked, and its slices' format would not be the batch's
        return torch.contiguous_format
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_result(images: Tensor) -> Tensor:
    """What a kernel would allocate for its result."""
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=result_format(images))
