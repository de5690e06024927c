from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bbfast import datasets
from bbfast.errors import DatasetError


def save(folder: Path, arrays: dict[str, Any], **changes: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("name", "classes", "train", "test"), [("cifar10_small", 10, 5000, 2000), ("gtsrb_small", 43, 6180, 2090)]
)
def test_the_project_files(shared: Path, name: str, classes: int, train: int, test: int) -> None:
    path = shared / "data" / f"{name}.npz"
    pair = datasets.load("npz", path, normalize=name.removesuffix("_small"), flip=name.startswith("cifar"))
    raw = np.load(path)
    assert pair.num_classes == classes and pair.class_names == tuple(raw["class_names"])
    assert (len(pair.train), len(pair.test)) == (train, test) and pair.image_size == (3, 32, 32)
    for part in ("train", "test"):
        images = getattr(pair, part)
        assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), raw[f"{part}_images"])
        assert np.array_equal(images.labels.numpy(), raw[f"{part}_labels"])


def test_axes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    expected = torch.from_numpy(arrays["train_images"]).permute(0, 3, 1, 2)
    pair = datasets.load("npz", save(tmp_path, arrays))
    assert torch.equal(pair.train.images, expected) and pair.name == "data"
    planes = {key: value.transpose(0, 3, 1, 2) for key, value in arrays.items() if key.endswith("images")}
    assert torch.equal(datasets.load("npz", save(tmp_path, arrays, **planes)).train.images, expected)
    gray = {key: value[..., 0] for key, value in arrays.items() if key.endswith("images")}
    assert torch.equal(datasets.load("npz", save(tmp_path, arrays, **gray)).train.images, expected[:, :1])
    six = {key: np.repeat(value, 2, axis=3) for key, value in arrays.items() if key.endswith("images")}
    path = save(tmp_path, arrays, **six)
    with pytest.raises(
        DatasetError, match=r"train_images of .* must be of 1 or 3 channels .*layout='hwc'.*\[6, 8, 9, 6\]"
    ):
        datasets.load("npz", path)
    assert datasets.load("npz", path, layout="hwc").image_size == (6, 8, 9)
    assert datasets.load("npz", path, layout="chw").image_size == (8, 9, 6)


def test_labels_of_any_whole_kind_and_the_number_of_classes(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    column = arrays["train_labels"].astype(np.uint8)[:, None]
    pair = datasets.load("npz", save(tmp_path, arrays, train_labels=column, class_names=np.array(["a", "b", "c", "d"])))
    assert pair.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and pair.train.labels.dtype == torch.int64
    assert pair.num_classes == 4 and pair.class_names == ("a", "b", "c", "d")
    path = save(tmp_path, arrays)
    assert datasets.load("npz", path).class_names == ("0", "1", "2")
    assert datasets.load("npz", path, num_classes=7).num_classes == 7
    assert datasets.load("npz", path, size=(4, 5)).image_size == (3, 4, 5)


NAMES = np.array(["a", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, r"lacks 'test_labels'; it has 'train_images', 'train_labels', 'test_images'"),
        ({"train_images": None, "test_images": None}, "lacks 'train_images', 'test_images'"),
        ({"train_images": np.zeros((6, 8, 9, 3))}, r"train_images of .* must be uint8 \(0..255\), got float64"),
        ({"test_images": np.zeros((3, 8), np.uint8)}, r"test_images of .* must be \[N, H, W, C\].*got shape \[3, 8\]"),
        ({"test_images": np.zeros((3, 8, 8, 3), np.uint8)}, r"test_images .* of the size of train_images \(3, 8, 9\)"),
        ({"train_images": np.zeros((0, 8, 9, 3), np.uint8)}, "train_images of .* must be at least one image"),
        ({"train_labels": np.zeros(5, int)}, r"train_labels of .* one label for each of 6 images, got shape \[5\]"),
        ({"train_labels": np.zeros(6)}, "train_labels of .* must be whole numbers, got float64"),
        ({"test_labels": np.array([0, -1, 2])}, "test_labels of .* must be class numbers >= 0, got -1"),
        ({"test_labels": np.array([0, 10**12, 2])}, "test_labels of .* must be class numbers below 1048576, got 10000"),
        ({"test_labels": np.array([0, 2**63, 2], np.uint64)}, "test_labels of .* must be class numbers below 1048576"),
        ({"class_names": NAMES}, r"train_labels of .* must be labels in 0..1 \(2 classes\), got 2"),
        ({"class_names": NAMES, "test_labels": np.array([0, 1, 5])}, r"test_labels of .* in 0..1 .*got 5"),
        ({"class_names": np.zeros(3)}, "class_names of .* must be a vector of text, got float64"),
        ({"train_labels": np.array([0, None, 1, 1, 1, 1])}, "is damaged: ValueError: Object arrays cannot be loaded"),
    ],
)
def test_wrong_contents_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        datasets.load("npz", save(tmp_path, arrays, **changes))


def test_its_name_is_that_of_the_file_or_as_asked(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "cifar10_small.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    assert datasets.load("npz", path).name == "cifar10_small"
    assert datasets.load("npz", path, dataset_name="signs").name == "signs"


def test_labels_outside_the_classes_asked_for(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = save(tmp_path, arrays, class_names=np.array(["a", "b", "c"]))
    with pytest.raises(DatasetError, match=r"labels in 0..1 \(2 classes\), got 2"):
        datasets.load("npz", path, num_classes=2)
    with pytest.raises(DatasetError, match=r"class_names of .* must be 4 names, got 3"):
        datasets.load("npz", path, num_classes=4)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_a_truncated_file_is_an_error(tmp_path: Path, arrays: dict[str, np.ndarray], keep: float, writer: Any) -> None:
    path = tmp_path / "data.npz"
    writer(path, **arrays)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    with pytest.raises(DatasetError, match=r"data.npz is damaged"):
        datasets.load("npz", path)


def test_a_flipped_bit_is_an_error(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = save(tmp_path, arrays)
    data = bytearray(path.read_bytes())
    data[400] ^= 4
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"data.npz is damaged: BadZipFile"):
        datasets.load("npz", path)


def test_other_files_and_folders(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DatasetError, match=r"not an .npz archive"):
        datasets.load("npz", tmp_path / "one.npy")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DatasetError, match="text is damaged"):
        datasets.load("npz", tmp_path / "text")
    with pytest.raises(DatasetError, match=r"is missing; the path of the .npz file"):
        datasets.load("npz", tmp_path)
