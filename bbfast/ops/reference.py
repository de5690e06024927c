"""The operations in plain PyTorch: same names, signatures and results. Test oracle, and what runs without a build."""

from __future__ import annotations

from bbfast.ops._add import add_reference as add
from bbfast.ops._amplitude_mix import amplitude_mix
from bbfast.ops._blend import blend_reference as blend
from bbfast.ops._channel_lipschitz import channel_lipschitz_reference as channel_lipschitz
from bbfast.ops._channel_stats import channel_stats_reference as channel_stats
from bbfast.ops._class_moments import class_moments_reference as class_moments
from bbfast.ops._dct import dct2, idct2
from bbfast.ops._gather_augment import gather_augment_reference as gather_augment
from bbfast.ops._gram_powers import gram_powers_reference as gram_powers
from bbfast.ops._overlay_batch import overlay_batch_reference as overlay_batch
from bbfast.ops._patch import patch_reference as patch
from bbfast.ops._quantize import quantize_reference as quantize
from bbfast.ops._reflect import reflect
from bbfast.ops._sinusoid import sinusoid_reference as sinusoid
from bbfast.ops._softmax_entropy import softmax_entropy_reference as softmax_entropy
from bbfast.ops._spectral_add import spectral_add_reference as spectral_add
from bbfast.ops._topk_update import topk_update_reference as topk_update
from bbfast.ops._wanet_grid import wanet_grid
from bbfast.ops._warp import warp_reference as warp

__all__ = [
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
    "reflect",
    "sinusoid",
    "softmax_entropy",
    "spectral_add",
    "topk_update",
    "wanet_grid",
    "warp",
]
