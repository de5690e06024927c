from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast import datasets
from bbfast.data.datasets import gtsrb
from bbfast.data.datasets._base import Archive
from bbfast.data.datasets.cifar import _md5
from bbfast.errors import DatasetError


def images_of(root: Path) -> Path:
    return root / "gtsrb" / "GTSRB" / "Final_Training" / "Images"


def test_order_labels_and_pixels(gtsrb_root: Path) -> None:
    pair = datasets.load("gtsrb", gtsrb_root)
    assert pair.image_size == (3, 32, 32) and pair.num_classes == 43 and len(pair.train) == 44
    assert pair.class_names[14] == "Stop" and pair.class_names[42] == "End of no passing for vehicles over 3.5 t"
    assert pair.train.labels.tolist() == [*range(8), 7, *range(8, 43)]
    # The csv of class 7 names 00001 (gray 35) before 00000 (gray 36).
    assert pair.train.images[7].unique().tolist() == [35] and pair.train.images[8].unique().tolist() == [36]
    # The test csv lists 2, 0, 1; the whole rectangle is resized, not the region of interest.
    assert pair.test.labels.tolist() == [42, 3, 3]
    for row, number in zip(pair.test.images, (2, 0, 1), strict=True):
        path = gtsrb_root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm"
        expected = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.array_equal(row.permute(1, 2, 0).numpy(), expected)
    assert (pair.mean, pair.std, pair.flip) == ((0.0,) * 3, (1.0,) * 3, False)


def test_size_and_root(gtsrb_root: Path) -> None:
    assert datasets.load("gtsrb", gtsrb_root, size=48).image_size == (3, 48, 48)
    inner = datasets.load("gtsrb", gtsrb_root / "gtsrb")
    assert inner.fingerprint == datasets.load("gtsrb", gtsrb_root).fingerprint


def test_folder_of_torchvision_without_tables(gtsrb_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.move(images_of(gtsrb_root), gtsrb_root / "gtsrb" / "GTSRB" / "Training")
    for table in (gtsrb_root / "gtsrb" / "GTSRB" / "Training").rglob("*.csv"):
        table.unlink()
    pair = datasets.load("gtsrb", gtsrb_root)
    assert pair.train.images[7].unique().tolist() == [36] and pair.train.images[8].unique().tolist() == [35]
    assert "taken by file name" in caplog.text


def test_table_of_the_test_set_beside_its_images(gtsrb_root: Path) -> None:
    base = gtsrb_root / "gtsrb"
    shutil.move(base / "GT-final_test.csv", base / "GTSRB" / "Final_Test" / "Images" / "GT-final_test.csv")
    assert datasets.load("gtsrb", gtsrb_root).test.labels.tolist() == [42, 3, 3]


def _remove(path: str) -> Callable[[Path], None]:
    def do(base: Path) -> None:
        target = base / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return do


def _write(path: str, text: str) -> Callable[[Path], None]:
    return lambda base: (base / path).write_text(text) and None


def _truncate(path: str) -> Callable[[Path], None]:
    return lambda base: (base / path).write_bytes((base / path).read_bytes()[:60]) and None


TRAIN = "GTSRB/Final_Training/Images"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("GTSRB"), "Images is missing"),
        (_remove(f"{TRAIN}/00012"), "00012 is missing"),
        (_remove(f"{TRAIN}/00012/00000_00000.ppm"), "00012/00000_00000.ppm is missing"),
        (_remove("GT-final_test.csv"), "GT-final_test.csv is missing"),
        (_remove("GTSRB/Final_Test/Images"), "Final_Test/Images is missing"),
        (_remove("GTSRB/Final_Test/Images/00001.ppm"), "00001.ppm is missing"),
        (_truncate(f"{TRAIN}/00012/00000_00000.ppm"), "00012/00000_00000.ppm cannot be decoded as an image"),
        (_write("GTSRB/Final_Test/Images/00001.ppm", ""), "00001.ppm cannot be decoded as an image"),
        (_write("GT-final_test.csv", ""), "GT-final_test.csv is damaged: it has no rows"),
        (_write(f"{TRAIN}/00002/GT-00002.csv", "Filename;ClassId\n"), "GT-00002.csv is damaged: it has no rows"),
        (_write("GT-final_test.csv", "a;b\n1;2\n"), "not a table with the columns Filename and ClassId"),
        (_write("GT-final_test.csv", "Filename;ClassId\n00001.ppm;x\n"), "not a table with the columns"),
        (_write("GT-final_test.csv", "Filename;ClassId\n00001.ppm;43\n"), "ClassId must lie in 0..42, got 43"),
        (
            _write(f"{TRAIN}/00002/GT-00002.csv", "Filename;ClassId\n00000_00000.ppm;3\n"),
            "rows of other classes than 2",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(gtsrb_root: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(gtsrb_root / "gtsrb")
    with pytest.raises(DatasetError, match=f"{message}.*download=True"):
        datasets.load("gtsrb", gtsrb_root)


def test_download_unpacks_into_the_same_places(
    gtsrb_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = tmp_path / "fresh" / "gtsrb"
    fresh.mkdir(parents=True)
    parts = {
        "GTSRB_Final_Training_Images.zip": ["GTSRB/Final_Training"],
        "GTSRB_Final_Test_Images.zip": ["GTSRB/Final_Test"],
        "GTSRB_Final_Test_GT.zip": ["GT-final_test.csv"],
    }
    archives = {}
    for name, members in parts.items():
        with zipfile.ZipFile(fresh / name, "w") as archive:
            for member in members:
                top = gtsrb_root / "gtsrb" / member
                for path in [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]:
                    archive.write(path, path.relative_to(gtsrb_root / "gtsrb"))
        archives[name] = Archive(gtsrb._HOST + name, _md5(fresh / name) or "")
    training, *test = archives.values()
    monkeypatch.setattr(gtsrb.GTSRB, "training_archive", training)
    monkeypatch.setattr(gtsrb.GTSRB, "test_archives", tuple(test))
    fetched = datasets.load("gtsrb", fresh.parent, download=True)
    assert torch.equal(fetched.train.images, datasets.load("gtsrb", gtsrb_root).train.images)
    # Nothing is fetched or unpacked a second time.
    for name in parts:
        (fresh / name).unlink()
    assert datasets.load("gtsrb", fresh.parent, download=True).fingerprint == fetched.fingerprint


def test_published_archives() -> None:
    assert gtsrb.GTSRB.training_archive.name == "GTSRB_Final_Training_Images.zip"
    assert [archive.name for archive in gtsrb.GTSRB.test_archives] == [
        "GTSRB_Final_Test_Images.zip",
        "GTSRB_Final_Test_GT.zip",
    ]
    assert len(gtsrb._NAMES) == 43 and not any("\n" in name or "  " in name for name in gtsrb._NAMES)
