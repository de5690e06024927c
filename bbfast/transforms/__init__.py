"""Triggers as modules for ``torchvision.transforms.v2`` pipelines; each needs nothing else of bbfast.

They apply one trigger to any images. Choosing samples, changing labels and keeping a record of both is what
:mod:`bbfast.attacks` does.
"""

from __future__ import annotations

from bbfast.transforms._additive import LF, SIG, TUAP, Additive, Narcissus
from bbfast.transforms._frequency import CTRL, FIBA, FTrojan
from bbfast.transforms._mix import Blended
from bbfast.transforms._patch import BadNets
from bbfast.transforms._quantize import BPP
from bbfast.transforms._reflect import Refool
from bbfast.transforms._trigger import Trigger
from bbfast.transforms._warp import WaNet

__all__ = [
    "BPP",
    "CTRL",
    "FIBA",
    "LF",
    "SIG",
    "TUAP",
    "Additive",
    "BadNets",
    "Blended",
    "FTrojan",
    "Narcissus",
    "Refool",
    "Trigger",
    "WaNet",
]
