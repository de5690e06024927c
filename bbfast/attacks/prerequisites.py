"""What an attack needs to make its trigger (a surrogate, an encoder, a pattern): made once, kept, found again.

Nobody has to bring a file: an attack asks :meth:`AttackContext.obtain` for what it needs and says how it is made. The
result lies in a store under the hash of everything it depends on, so that ratios, label modes and runs share it. One
that was interrupted goes on from its checkpoints or starts again; nothing half-made is ever used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbfast._prerequisite import obtain
from bbfast.data.cache import cache_root
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.models import build
from bbfast.store import Store
from bbfast.training.device import resolve_device
from bbfast.training.recipe import Recipe

__all__ = ["AttackContext", "default_context", "open_store", "seeded_model"]

_DEFAULT_MODEL = "preactresnet18"


@dataclasses.dataclass(frozen=True)
class AttackContext:
    """What an attack may use to make its prerequisites.

    Args:
        device: Where to work.
        fresh_model: Builds a model of the victim's architecture, newly initialised from a seed. A victim that was given
            as a module starts from the weights that it has: then a copy of it.
        recipe: The victim's recipe.
        dataset: Name of the data set, which presets go by.
        test: The clean test set, for attacks whose paper measures progress on it; None if there is none.
        store: Where prerequisites are kept and found; None keeps none.
        progress: As in :func:`bbfast.train`.
        model: Name of the victim's architecture, which presets go by.
    """

    device: torch.device
    fresh_model: Callable[[int], nn.Module]
    recipe: Recipe
    dataset: str = "custom"
    test: ImageSet | None = None
    store: Store | None = None
    progress: bool | None = None
    model: str | None = None

    def obtain(
        self,
        kind: str,
        config: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Tensor]],
        *,
        seed: int = 0,
        version: int = 1,
    ) -> dict[str, Tensor]:
        """The prerequisite of these settings, made now if it is not in the store.

        Args:
            kind: What it is ("surrogate", "lf_pattern"); part of its folder's name.
            config: Everything it depends on, fit for JSON, the data it is made from included (``content_hash``).
            make: Makes it; called with a folder for checkpoints.
            seed: Of its random numbers.
            version: Raised when the way it is made changes.

        Returns:
            Its tensors on the CPU. Do not write to them.

        Raises:
            ArtifactError: if the store cannot be read or written.
        """
        return obtain(self.store, kind, config, make, seed=seed, version=version)


def open_store(choice: Store | str | Path | bool | None) -> Store | None:
    """The store of prerequisites.

    Args:
        choice: A store or its folder; None or True for ``prerequisites`` in the user's cache folder (``BBFAST_CACHE``);
            False for none.
    """
    if choice is False:
        return None
    if isinstance(choice, Store):
        return choice
    if isinstance(choice, (str, Path)):
        return Store(choice)
    root = cache_root()
    return None if root is None else Store(root / "prerequisites")


def default_context(train: ImageSet, num_classes: int, compat: str = "paper") -> AttackContext:
    """The context of an attack that is used by itself, without a victim: the benchmark's first model, its recipe."""

    def fresh_model(seed: int) -> nn.Module:
        return seeded_model(_DEFAULT_MODEL, num_classes, train.image_size, seed)

    recipe = Recipe.preset("paper", model=_DEFAULT_MODEL, compat="reference" if compat == "reference" else "paper")
    return AttackContext(resolve_device("auto"), fresh_model, recipe, store=open_store(None), model=_DEFAULT_MODEL)


def seeded_model(name: str, num_classes: int, image_size: tuple[int, int, int], seed: int) -> nn.Module:
    """A new model, the same one for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("model", seed))
        return build(name, num_classes, image_size, in_channels=image_size[0])
