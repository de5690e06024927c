"""Handwritten digits that come with scikit-learn: the embedded default, no download and no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bbfast._config import build_config
from bbfast.data.cache import Decoded
from bbfast.data.datapair import DataPair
from bbfast.data.datasets._base import Dataset, DatasetInfo, DatasetOptions, register
from bbfast.data.resize import resize_u8

__all__ = ["Digits"]

_TEST_EVERY = 5


@register("digits")
class Digits(Dataset):
    """1,797 handwritten digits as 32x32 colour images.

    Pixels: the 8x8 images of 0..16 are scaled to 0..255 (round half to even), enlarged to 32x32 with Pillow's BILINEAR
    and repeated on three channels.

    Split: stratified and without random numbers. In the order of scikit-learn, the 5th, 10th, 15th ... image of each
    class is for testing, the others for training: 1,442 and 355 images. Both parts keep that order. Both parts hold
    images of the same writers, so accuracies are not those of the original, writer-disjoint split.
    """

    info = DatasetInfo(
        title="Optical Recognition of Handwritten Digits",
        year=1998,
        paper="E. Alpaydin, C. Kaynak, UCI Machine Learning Repository (the copy of scikit-learn)",
        summary="Handwritten digits, 32x32; embedded: no download, no files.",
        layout="root is not needed: the images come with scikit-learn",
        num_classes=10,
        image_size=(3, 32, 32),
        train=1442,
        test=355,
    )

    def load(self, root: str | Path | None = None, **options: Any) -> DataPair:
        """The pair; ``root`` is not used. See :func:`bbfast.datasets.load`."""
        settings = build_config(self.Options, f"data set {self.name!r}", options)
        return self.pair(self.decode(Path(), settings), settings, self.name)

    def sources(self, root: Path, options: DatasetOptions) -> list[Path]:
        """No files: the images are part of scikit-learn."""
        return []

    def decode(self, root: Path, options: DatasetOptions) -> Decoded:
        """Enlarge and split scikit-learn's images."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)
        images = resize_u8(list(pixels), 32).repeat(1, 3, 1, 1)
        labels = torch.from_numpy(raw.target.astype(np.int64))
        rank = torch.zeros_like(labels)
        for label in range(10):
            members = labels == label
            rank[members] = torch.arange(int(members.sum()))
        test = rank % _TEST_EVERY == _TEST_EVERY - 1
        return Decoded(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))
