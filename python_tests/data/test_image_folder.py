from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bbfast import datasets
from bbfast.errors import ConfigError, DatasetError


def test_order_and_pixels(folder_root: Path) -> None:
    pair = datasets.load("image_folder", folder_root)
    assert pair.class_names == ("ant", "cat") and pair.image_size == (3, 12, 16)
    assert pair.name == "photos" and datasets.load("image_folder", folder_root, dataset_name="me").name == "me"
    assert pair.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and pair.test.labels.tolist() == [1, 1, 1]
    files = [folder_root / "train" / name / file for name in ("ant", "cat") for file in ("a.PNG", "b.png", "c.bmp")]
    for row, path in zip(pair.train.images, files, strict=True):
        assert np.array_equal(row.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    assert pair.mean == pytest.approx((pair.train.images / 255.0).mean((0, 2, 3)).tolist(), abs=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(8, (3, 8, 8)), ((6, 9), (3, 6, 9))])
def test_size_resizes_as_pillow(folder_root: Path, size: Any, expected: tuple[int, ...]) -> None:
    pair = datasets.load("image_folder", folder_root, size=size)
    assert pair.image_size == expected
    first = Image.open(folder_root / "train" / "ant" / "a.PNG").resize(expected[:0:-1], Image.Resampling.BILINEAR)
    assert np.array_equal(pair.train.images[0].permute(1, 2, 0).numpy(), np.asarray(first))


def test_gray_palette_and_transparent_images_become_rgb(folder_root: Path) -> None:
    folder = folder_root / "train" / "ant"
    rgb = Image.open(folder / "a.PNG").copy()
    rgb.convert("L").save(folder / "b.png")
    rgb.convert("RGBA").save(folder / "a.PNG")
    rgb.convert("P").save(folder / "c.png")
    pair = datasets.load("image_folder", folder_root)
    assert pair.train.images.shape[1] == 3 and len(pair.train) == 7


def test_val_stands_in_for_test(folder_root: Path) -> None:
    before = datasets.load("image_folder", folder_root)
    (folder_root / "test").rename(folder_root / "val")
    assert datasets.load("image_folder", folder_root).fingerprint == before.fingerprint


def _save(path: str, height: int, width: int) -> Callable[[Path], object]:
    def do(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(root / path)

    return do


def _deep(path: str, dtype: Any) -> Callable[[Path], object]:
    return lambda root: Image.fromarray(np.full((12, 16), 1000, dtype)).save(root / path)


def _shrink_test(root: Path) -> None:
    for path in (root / "test" / "cat").iterdir():
        _save(f"test/cat/{path.name}", 5, 5)(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "train is missing"),
        (lambda root: shutil.rmtree(root / "test"), "test is missing"),
        (lambda root: shutil.rmtree(root / "test" / "cat"), "test is damaged: it holds no images"),
        (lambda root: (root / "train" / "bee").mkdir(), "bee is damaged: it holds no images"),
        (_save("test/dog/a.png", 12, 16), "dog is damaged: this class has no folder in train"),
        (_save("train/cat/z.png", 12, 17), r"different sizes: .*a.PNG is 12x16, .*z.png is 12x17; pass size="),
        (_shrink_test, "are 12x16, test images 5x5; pass size="),
        (lambda root: (root / "test" / "cat" / "a.PNG").write_bytes(b"no image"), "a.PNG cannot be decoded"),
        (lambda root: (root / "train" / "ant" / "a.PNG").write_bytes(b""), "a.PNG cannot be decoded"),
        (_deep("train/cat/deep.png", np.uint16), "deep.png must have 8 bits a channel, got Pillow's mode 'I"),
        (_deep("train/cat/deep.tif", np.float32), "deep.tif must have 8 bits a channel, got Pillow's mode 'F'"),
    ],
)
def test_missing_and_damaged_files_are_named(folder_root: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder_root)
    with pytest.raises(DatasetError, match=message):
        datasets.load("image_folder", folder_root)


@pytest.mark.parametrize("size", [0, (3, 0), "large", (1, 2, 3)])
def test_bad_size(folder_root: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="size"):
        datasets.load("image_folder", folder_root, size=size)
