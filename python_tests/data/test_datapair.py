from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bbfast import DataPair, ImageSet


def images(n: int, size: int = 4, classes: int = 3, seed: int = 0) -> ImageSet:
    g = torch.Generator().manual_seed(seed)
    return ImageSet(
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g),
        torch.arange(n) % classes,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
    )


def test_everything_but_the_sets_is_taken_from_them() -> None:
    pair = DataPair(images(6), images(4))
    assert (pair.name, pair.num_classes, pair.class_names) == ("custom", 3, ("0", "1", "2"))
    assert (pair.image_size, pair.mean, pair.std) == ((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (pair.flip, pair.padding) == (False, 4)
    assert len(pair.fingerprint) == 64


def test_given_normalisation_reaches_both_sets() -> None:
    pair = DataPair(images(6), images(4), mean=(0.5,) * 3, std=(0.25,) * 3, num_classes=5)
    assert pair.train.mean == pair.test.mean == pair.mean == (0.5,) * 3
    assert pair.train.std == pair.test.std == pair.std == (0.25,) * 3
    assert pair.class_names == ("0", "1", "2", "3", "4")


def test_fingerprint_is_of_pixels_and_labels_alone() -> None:
    pair = DataPair(images(6), images(4))
    assert DataPair(images(6), images(4), name="other", mean=(0.5,) * 3, std=(1.0,) * 3).fingerprint == pair.fingerprint
    assert DataPair(images(4), images(6)).fingerprint != pair.fingerprint
    changed = pair.train.images.clone()
    changed[5, 2, 3, 3] += 1
    assert DataPair(dataclasses.replace(pair.train, images=changed), pair.test).fingerprint != pair.fingerprint
    relabelled = pair.test.with_labels(pair.test.labels.flip(0))
    assert DataPair(pair.train, relabelled).fingerprint != pair.fingerprint


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_to_moves_both_sets(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pair = DataPair(images(6), images(4), name="mine", class_names=("a", "b", "c"))
    moved = pair.to(device)
    assert moved.train.device.type == moved.test.device.type == device
    assert (moved.name, moved.class_names, moved.fingerprint) == ("mine", ("a", "b", "c"), pair.fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, r"labels must lie in 0..1, got 2"),
        ({"num_classes": 10**12}, r"num_classes must be at most 1048576, got 1000000000000 for labels of up to 2"),
        ({"class_names": ("a", "b")}, "class_names must have 3 names, got 2"),
        ({"padding": -1}, "padding must be >= 0, got -1"),
        ({"image_size": (3, 5, 4)}, r"image_size must be that of the images, \(3, 4, 4\), got \(3, 5, 4\)"),
        ({"mean": (0.5,)}, "one value for each of 3 channels"),
        ({"test": images(2, size=5)}, r"one size, got \(3, 4, 4\) and \(3, 5, 5\)"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataPair(**{"train": images(6), "test": images(4), **options})
