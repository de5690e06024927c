"""The fast native operations of backdoor learning. Needs torch alone; each works on its own in any PyTorch code.

Every operation has a CPU and a CUDA kernel, works under ``torch.compile(fullgraph=True)``, gives gradients where they
make sense, and has a twin in plain PyTorch in :mod:`bbfast.ops.reference`, which runs where no kernel was compiled.
"""

from __future__ import annotations

from bbfast.ops import reference
from bbfast.ops._blend import blend
from bbfast.ops._class_moments import Moments, class_moments
from bbfast.ops._gather_augment import gather_augment
from bbfast.ops._native import Status, status
from bbfast.ops._patch import patch
from bbfast.ops._softmax_entropy import softmax_entropy
from bbfast.ops._wanet_grid import wanet_grid
from bbfast.ops._warp import warp

__all__ = [
    "Moments",
    "Status",
    "blend",
    "class_moments",
    "gather_augment",
    "patch",
    "reference",
    "softmax_entropy",
    "status",
    "wanet_grid",
    "warp",
]
