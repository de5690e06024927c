"""The self-supervised stage that DBD and NAB share: what it makes depends on the images alone, not on the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from bbfast._hashing import content_hash
from bbfast.data.imageset import ImageSet
from bbfast.defenses._diverged import lower
from bbfast.defenses._rows import pack, unpack
from bbfast.defenses.base import DefenseConfig
from bbfast.defenses.training._contrastive import Encoder, Rate, SimClr, pretrain
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.training._views import Views
from bbfast.defenses.view import DefenderView
from bbfast.models import roles

__all__ = ["DIGITS_SIMCLR", "SimClrConfig", "self_supervised"]

DIGITS_SIMCLR: dict[str, Any] = {"ssl_batch": 128, "ssl_lr": 0.1, "mirror": False}
"""Ours: 1,442 images are three steps an epoch in batches of 512; a quarter of the batch at a quarter of the rate. A
mirrored digit is no digit."""


class SimClrConfig(DefenseConfig):
    """Settings of the self-supervised stage.

    Args:
        ssl_epochs: Epochs of contrast.
        ssl_lr: First rate of a cosine.
        ssl_t_max: Its half period in epochs; None is ``ssl_epochs``.
        ssl_batch: Samples a step, two views of each.
        ssl_weight_decay: L2 penalty.
        temperature: Divides the cosines.
        mirror: Views are mirrored half of the time.
    """

    ssl_epochs: int = Field(100, ge=0)
    ssl_lr: float = Field(0.4, gt=0)
    ssl_t_max: int | None = Field(None, ge=1)
    ssl_batch: int = Field(512, ge=2)
    ssl_weight_decay: float = Field(1e-4, ge=0)
    temperature: float = Field(0.5, gt=0)
    mirror: bool = True


def self_supervised(view: DefenderView, data: ImageSet, config: SimClrConfig) -> tuple[Encoder, list[dict[str, Any]]]:
    """Train a fresh encoder by SimCLR, or find in the run's store the one that another method trained.

    Args:
        view: Grants ``fresh_model``.
        data: In an order that storage has no part in; labels are not read.
        config: Settings.

    Returns:
        The encoder in eval mode, and one dict an epoch.

    Raises:
        DivergedError: if the loss stops being finite.
    """
    unlabelled = data.with_labels(data.labels.new_zeros(len(data)))
    encoder = Encoder(view.fresh_model(), norm=True, seed=view.derive_seed("projection"), method=view.method)
    recipe = sgd_recipe(view, config.ssl_batch, config.ssl_weight_decay).replace(
        epochs=config.ssl_epochs, lr=config.ssl_lr, augment=False, compile=False
    )
    rate = Rate(config.ssl_lr, config.ssl_t_max or max(config.ssl_epochs, 1))
    program = SimClr(Views(mirror=config.mirror), rate, config.temperature)

    def make(folder: Path) -> dict[str, Tensor]:
        done = pretrain(view, encoder, unlabelled, recipe, program, folder, lower(config, "ssl_lr"))
        return {**encoder.state_dict(), **pack(done.history)}

    settings = {
        "images": content_hash({"images": data.images}),
        "normalisation": [data.mean, data.std],
        # Two architectures may have the same weights.
        "model": roles(encoder.model).label,
        "start": content_hash(encoder.state_dict()),
        "recipe": recipe.model_dump(mode="json"),
        "program": program.describe(),
    }
    found = view.obtain("simclr", settings, make, seed=view.derive_seed("ssl"))
    rows, state = unpack(found)
    encoder.load_state_dict(state)
    return encoder.eval(), rows
