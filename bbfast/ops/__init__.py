"""The fast native operations of backdoor learning. Needs torch alone; each works on its own in any PyTorch code.

Every operation has a CPU and a CUDA kernel, works under ``torch.compile(fullgraph=True)``, gives gradients where they
make sense, and has a twin in plain PyTorch in :mod:`bbfast.ops.reference`, which runs where no kernel was compiled.

``torch.func.vmap`` gives what a loop over the slices gives, and a kernel is called once a slice: the operations take
batches already, and one call on a batch is faster. Inside ``torch.func.grad``, ``jvp`` and their kin, and under
forward-mode differentiation, differentiable operations run in plain PyTorch. What is done in plain PyTorch inside
``torch.func`` is not looked through for NaN and values out of range.
"""

from __future__ import annotations

from bbfast.ops import reference
from bbfast.ops._add import add
from bbfast.ops._amplitude_mix import amplitude_mix
from bbfast.ops._blend import blend
from bbfast.ops._channel_lipschitz import channel_lipschitz
from bbfast.ops._channel_stats import ChannelStats, channel_stats
from bbfast.ops._class_moments import Moments, class_moments
from bbfast.ops._dct import dct2, idct2
from bbfast.ops._gather_augment import gather_augment
from bbfast.ops._gram_powers import gram_powers
from bbfast.ops._native import Status, status
from bbfast.ops._overlay_batch import overlay_batch
from bbfast.ops._patch import patch
from bbfast.ops._quantize import quantize
from bbfast.ops._reflect import reflect
from bbfast.ops._sinusoid import sinusoid
from bbfast.ops._softmax_entropy import softmax_entropy
from bbfast.ops._spectral_add import spectral_add
from bbfast.ops._topk_update import TopK, topk_update
from bbfast.ops._wanet_grid import wanet_grid
from bbfast.ops._warp import warp

__all__ = [
    "ChannelStats",
    "Moments",
    "Status",
    "TopK",
    "add",
    "amplitude_mix",
    "blend",
    "channel_lipschitz",
    "channel_stats",
    "class_moments",
    "dct2",
    "gather_augment",
    "gram_powers",
    "idct2",
    "overlay_batch",
    "patch",
    "quantize",
    "reference",
    "reflect",
    "sinusoid",
    "softmax_entropy",
    "spectral_add",
    "status",
    "topk_update",
    "wanet_grid",
    "warp",
]
