"""What a plan can know of a data set, its models, attacks and defenses before anything is read or run."""

from __future__ import annotations

import functools

import torch
from torch import nn

from bbfast.bench.grid import NO_DEFENSE, DataEntry, Entry
from bbfast.errors import DatasetError

__all__ = ["Facts", "refused"]

_CLASS_SIZES = {
    "gtsrb": (
        *(210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780),
        *(630, 420, 1110, 1200, 210, 360, 330, 390, 510, 270, 1500, 600, 240, 540, 270),
        *(450, 780, 240, 689, 420, 1200, 390, 210, 2070, 300, 360, 240, 240),
    )
}
"""Training images of each class where they are not equal: as published (Stallkamp et al. 2012, the full release)."""


class Facts:
    """What is known of a data set before it is read."""

    def __init__(self, data: DataEntry) -> None:
        from bbfast import datasets

        self._data = data
        self._info = datasets.info(data.name)

    @functools.cached_property
    def _sizes(self) -> tuple[int, tuple[int, int, int], list[int] | None] | None:
        """Classes, image size, and images of each class; None if only the files say."""
        from bbfast import datasets

        if self._info.get("train") is None or self._data.name == "digits":
            # Small, or described by nothing but its files.
            try:
                pair = datasets.load(self._data.name, self._data.root, **self._data.options)
            except DatasetError:
                return None  # the worker that runs it may have it
            counts = torch.bincount(pair.train.labels, minlength=pair.num_classes).tolist()
            return pair.num_classes, pair.train.image_size, counts
        classes, total = int(self._info["num_classes"]), int(self._info["train"])
        size = self._info["image_size"]
        even = [total // classes] * classes if total % classes == 0 else None
        sizes: list[int] | None = list(_CLASS_SIZES.get(self._data.name, ())) or even
        asked = self._data.options.get("classes")
        kept = min(classes, asked) if isinstance(asked, int) else classes
        return kept, (int(size[0]), int(size[1]), int(size[2])), sizes and sizes[:kept]

    def network(self, model: str) -> nn.Module | str | None:
        """The model without memory for its weights, or why it cannot be built; None if the images are not known."""
        from bbfast import models

        if self._sizes is None:
            return None
        try:
            with torch.device("meta"):
                return models.build(model, self._sizes[0], self._sizes[1])
        except ValueError as error:
            return str(error)

    @property
    def classes(self) -> int:
        return 10 if self._sizes is None else self._sizes[0]

    @property
    def image_size(self) -> tuple[int, int, int]:
        return (3, 32, 32) if self._sizes is None else self._sizes[1]

    def unfit(self, attack: Entry, ratio: float) -> str | None:
        """Why an attack cannot poison that share, or has no trigger without; None if it can, or if only the data
        tell."""
        from bbfast import attacks

        counts = None if self._sizes is None else self._sizes[2]
        try:
            if ratio == 0:
                method = attacks.for_control(attacks.create(attack.name, **attack.settings))
            else:
                method = attacks.create(attack.name, **{**attack.settings, "ratio": ratio})
            if counts is not None:
                labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
                method.select(labels, method.rule(labels, len(counts)), 0)
        except ValueError as error:
            return str(error)
        return None


def refused(defense: Entry, network: nn.Module | str | None, facts: Facts) -> str | None:
    """Why a defense does not take a model; None if it does, or if there is no model."""
    from bbfast import defenses

    if defense.name == NO_DEFENSE or not isinstance(network, nn.Module):
        return None
    method = defenses.create(defense.name, **defense.settings)
    return defenses.refusal(method, network, facts.classes, facts.image_size)
