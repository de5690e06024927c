"""The named recipes: ``paper`` (spec/attacks 0.7) and ``quick``."""

from __future__ import annotations

import re
from typing import Any

from bbfast.errors import ConfigError, UnknownNameError

__all__ = ["dataset_key", "preset"]

# One row a data set, "" for all others (npz, image_folder, digits); what a row does not name is the Recipe's default:
# SGD .01, momentum .9, weight decay 5e-4, batch 128, crop padding 4. Flips for cifar10 only (not cifar100). The same
# for every model. AMP is off in the published runs; here precision stays "auto": bf16 made no difference to accuracy
# where it was measured (small_cnn, 5,000 CIFAR-10 images, three seeds: 54.6 % against 54.4 % in float32).
_PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 100, "schedule": "cosine", "flip": True},
    "cifar100": {"epochs": 100, "schedule": "cosine"},
    "gtsrb": {"epochs": 50, "schedule": "cosine"},
    "tiny_imagenet": {"epochs": 200, "schedule": "plateau", "gamma": 0.1, "patience": 10},
    "": {"epochs": 100, "schedule": "cosine"},
}
_REFERENCE_T_MAX = 100

_QUICK: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 15, "batch_size": 64, "lr": 0.1, "padding": 2},
    "cifar10": {"epochs": 20, "flip": True},
    "": {"epochs": 20},
}
_QUICK_COMMON: dict[str, Any] = {"batch_size": 64, "lr": 0.05, "schedule": "onecycle"}
# Models whose last layers have no BatchNorm stay at the paper's rate.
_QUICK_SLOW_MODELS = ("vgg19", "vgg19_bn", "convnext_tiny", "vit_b_16")

# Longest first: "cifar100" must not be taken for "cifar10".
_DATASETS = {
    "cifar100": "cifar100",
    "cifar10": "cifar10",
    "gtsrb": "gtsrb",
    "tiny": "tiny_imagenet",
    "digits": "digits",
}


def dataset_key(name: str | None) -> str:
    """The data set whose recipe fits ``name`` ("CIFAR-10", "cifar10_small", "data/gtsrb.npz"), or "" for none."""
    stem = re.split(r"[\\/]", (name or "").rstrip("\\/"))[-1]
    plain = re.sub(r"[^a-z0-9]", "", stem.lower())
    return next((key for start, key in _DATASETS.items() if plain.startswith(start)), "")


def preset(name: str, dataset: str | None, model: str | None, *, compat: str = "paper") -> dict[str, Any]:
    """Settings of a named recipe, to be validated by :class:`~bbfast.training.recipe.Recipe`."""
    if compat not in ("paper", "reference"):
        raise ConfigError(f"compat must be 'paper' or 'reference', got {compat!r}")
    key = dataset_key(dataset)
    if name == "paper":
        settings = {"drop_last": True, **_PAPER.get(key, _PAPER[""])}
        if compat == "reference" and settings["schedule"] == "cosine":
            settings["t_max"] = _REFERENCE_T_MAX
        return settings
    if name == "quick":
        slow = {"lr": 0.01} if model in _QUICK_SLOW_MODELS else {}
        return {**_QUICK_COMMON, **_QUICK.get(key, _QUICK[""]), **slow}
    raise UnknownNameError("recipe preset", name, ["paper", "quick"])
