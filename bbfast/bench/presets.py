"""Grids by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["GRIDS"]

_MODELS = ["preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"]
_DATASETS = ["cifar10", "cifar100", "gtsrb", "tiny_imagenet"]
_PUBLISHED_ATTACKS = [
    "badnets",
    "blended",
    "blind",
    "bpp",
    "input_aware",
    "lc",
    "lf",
    "lira",
    "sig",
    "ssba",
    "trojannn",
    "wanet",
]
_PUBLISHED_DEFENSES = [
    "none",
    "ft",
    "fp",
    "nad",
    "nc",
    "anp",
    "ac",
    "ss",
    "abl",
    "clp",
    "i_bau",
    "d_br",
    "d_st",
    "ep",
    "mbns",
    "dbd",
]

GRIDS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "datasets": _DATASETS,
        "models": _MODELS,
        "attacks": _PUBLISHED_ATTACKS,
        "ratios": [0.001, 0.005, 0.01, 0.05, 0.1],
        "defenses": _PUBLISHED_DEFENSES,
    },
    "paper-full": {
        "datasets": _DATASETS,
        "models": _MODELS,
        "attacks": "all",
        "ratios": [0, 0.01, 0.05, 0.1, 0.2],
        "defenses": "all",
    },
    "digits-full": {
        "datasets": ["digits"],
        "models": ["small_cnn"],
        "attacks": "all",
        "ratios": [0.05],
        "defenses": "all",
        "preset": "quick",
    },
    "smoke": {
        "datasets": ["digits"],
        "models": ["small_cnn"],
        "attacks": ["badnets", "blended"],
        "ratios": [0.1],
        "defenses": ["none", "ft", "clp", "ss"],
        "preset": "quick",
        "recipe": {"epochs": 2},
    },
}
"""``paper`` is the grid of the published leaderboard: 4 x 4 x 12 x 5 x 16 = 15,360 cells."""
