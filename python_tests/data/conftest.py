"""Small data sets in the published folder layouts, and a cache folder of the test's own."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BBFAST_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(os.environ.get("BBFAST_SHARED", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"the shared folder {folder} is not here; set BBFAST_SHARED")
    return folder


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def cifar10_root(tmp_path: Path) -> Path:
    root = tmp_path / "cifar"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        entry = {
            "data": pixels(number, 4, 3072),
            "labels": [(number + k) % 10 for k in range(4)],
            "filenames": ["a"] * 4,
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"name{k}" for k in range(10)]}, protocol=2))
    return root


@pytest.fixture
def cifar100_root(tmp_path: Path) -> Path:
    root = tmp_path / "cifar"
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for seed, name in enumerate(["train", "test"]):
        entry = {b"data": pixels(seed, 5, 3072), b"fine_labels": [99, 0, 5, 7, seed], b"coarse_labels": [0] * 5}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=4))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine{k}" for k in range(100)]}))
    return root


@pytest.fixture
def gtsrb_root(tmp_path: Path) -> Path:
    """One image a class, two in class 7, whose csv lists them against the order of their names."""
    root = tmp_path / "signs"
    base = root / "gtsrb"
    for label in range(43):
        folder = base / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}"
        names = ["00001_00000.ppm", "00000_00000.ppm"] if label == 7 else ["00000_00000.ppm"]
        rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
        for k, name in enumerate(names):
            write_image(folder / name, np.full((40 + k, 36, 3), 5 * label + k, dtype=np.uint8))
            rows.append(f"{name};36;{40 + k};5;5;30;30;{label}")
        (folder / f"GT-{label:05d}.csv").write_text("\n".join(rows) + "\n")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, label in ((2, 42), (0, 3), (1, 3)):
        write_image(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", pixels(number, 30, 50, 3))
        rows.append(f"{number:05d}.ppm;50;30;5;5;30;30;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """Two classes; file names whose order as text is not that of their numbers."""
    root = tmp_path / "tiny"
    base = root / "tiny-imagenet-200"
    for label, wnid in enumerate(["n02", "n01"]):
        for number in (0, 2, 10):
            gray = np.full((64, 64, 3), 100 * label + number, dtype=np.uint8)
            write_image(base / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", gray)
    rows = []
    for number, wnid in ((0, "n02"), (2, "n01"), (10, "n01")):
        write_image(base / "val" / "images" / f"val_{number}.JPEG", np.full((64, 64), 20 * number, dtype=np.uint8))
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62")
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn05\tother\n")
    return root


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for part, classes in (("train", ["cat", "ant"]), ("test", ["cat"])):
        for seed, name in enumerate(classes):
            for file in ("b.png", "a.PNG", "c.bmp"):
                write_image(root / part / name / file, pixels(seed + ord(file[0]), 12, 16, 3))
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    write_image(root / "train" / "ant" / ".hidden.png", pixels(0, 3, 3, 3))
    return root


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return {
        "train_images": pixels(1, 6, 8, 9, 3),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": pixels(2, 3, 8, 9, 3),
        "test_labels": np.array([2, 1, 0]),
    }
