"""The operations in plain PyTorch: same names, signatures and results. Test oracle, and what runs without a build."""

from __future__ import annotations

from bbfast.ops._blend import blend_reference as blend
from bbfast.ops._class_moments import class_moments_reference as class_moments
from bbfast.ops._gather_augment import gather_augment_reference as gather_augment
from bbfast.ops._patch import patch_reference as patch
from bbfast.ops._softmax_entropy import softmax_entropy_reference as softmax_entropy
from bbfast.ops._wanet_grid import wanet_grid
from bbfast.ops._warp import warp_reference as warp

__all__ = ["blend", "class_moments", "gather_augment", "patch", "softmax_entropy", "wanet_grid", "warp"]
