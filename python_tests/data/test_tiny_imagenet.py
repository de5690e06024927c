from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bbfast import datasets
from bbfast.errors import DatasetError


def values(images: object) -> list[int]:
    """The gray value of every image (JPEG keeps a constant image within 1)."""
    return [int(image.float().mean().round()) for image in images]  # type: ignore[attr-defined]


def test_order_is_wnid_then_file_name(tiny_root: Path) -> None:
    pair = datasets.load("tiny_imagenet", tiny_root)
    assert pair.image_size == (3, 64, 64) and pair.num_classes == 2
    assert pair.class_names == ("goldfish", "n02")
    assert pair.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # n01_0, n01_10, n01_2, then n02_0, n02_10, n02_2: as text.
    assert values(pair.train.images) == [100, 110, 102, 0, 10, 2]
    # n01: val_10, val_2; n02: val_0.
    assert pair.test.labels.tolist() == [0, 0, 1] and values(pair.test.images) == [200, 40, 0]
    assert pair.mean == (0.4802, 0.4481, 0.3975) and not pair.flip


def test_roots_alias_and_size(tiny_root: Path) -> None:
    pair = datasets.load("tiny", tiny_root / "tiny-imagenet-200", size=32)
    assert pair.image_size == (3, 32, 32) and pair.name == "tiny_imagenet"


@pytest.mark.parametrize("inner", ["images", "."])
def test_val_in_class_folders(tiny_root: Path, inner: str) -> None:
    before = datasets.load("tiny_imagenet", tiny_root)
    val = tiny_root / "tiny-imagenet-200" / "val"
    for number, wnid in ((0, "n02"), (2, "n01"), (10, "n01")):
        target = val / wnid / inner
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(val / "images" / f"val_{number}.JPEG", target)
    (val / "images").rmdir()
    (val / "val_annotations.txt").unlink()
    assert datasets.load("tiny_imagenet", tiny_root).fingerprint == before.fingerprint


def _rows(text: str) -> Callable[[Path], object]:
    return lambda base: (base / "val" / "val_annotations.txt").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: shutil.rmtree(base / "train"), "train is missing"),
        (lambda base: shutil.rmtree(base / "val"), "val is missing"),
        (lambda base: (base / "val" / "val_annotations.txt").unlink(), "val_annotations.txt is missing"),
        (lambda base: (base / "val" / "images" / "val_2.JPEG").unlink(), "val_2.JPEG is missing"),
        (lambda base: shutil.rmtree(base / "train" / "n02" / "images"), "n02 is damaged: it holds no images"),
        (_rows(""), "val_annotations.txt is damaged: it has no lines"),
        (_rows("val_0.JPEG\tn99\t0\t0\t0\t0\n"), "line 1 names the class 'n99'"),
        (
            lambda base: (base / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe"),
            "val_annotations.txt is damaged",
        ),
        (
            lambda base: (base / "train" / "n01" / "images" / "n01_2.JPEG").write_bytes(
                (base / "train" / "n01" / "images" / "n01_2.JPEG").read_bytes()[:200]
            ),
            "n01_2.JPEG cannot be decoded as an image",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(tiny_root: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tiny_root / "tiny-imagenet-200")
    with pytest.raises(DatasetError, match=f"{message}.*download=True"):
        datasets.load("tiny_imagenet", tiny_root)
