"""BackdoorBench results that are damaged, malicious or of other data, and folders that cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference_kit import attacked, make_pair, same_data
from torch import nn

from bbfast.attacks import AttackResult
from bbfast.data import DataPair, ImageSet
from bbfast.errors import ArtifactError, CorruptArtifactError, DataRequirementError, UnknownNameError, UnsafeFileError
from bbfast.interop import _write
from bbfast.interop.backdoorbench import load_attack_result, save_attack_result


class TestCleanData:
    @pytest.fixture
    def path(self, result: AttackResult, tmp_path: Path) -> Path:
        return save_attack_result(result, tmp_path / "record" / "run") / "attack_result.pt"

    def test_is_needed(self, path: Path, result: AttackResult, tmp_path: Path) -> None:
        with pytest.raises(
            DataRequirementError, match="holds the poisoned images only; the clean 'tiny_data' is needed"
        ):
            load_attack_result(path)
        other = save_attack_result(result, tmp_path / "record" / "other", clean_data="cifar10")
        with pytest.raises(DataRequirementError, match=r"pass data=, or dataset_root=.*data set 'cifar10' needs root="):
            load_attack_result(other)
        with pytest.raises(DataRequirementError, match=r"dataset_root=.* is missing"):
            load_attack_result(other, dataset_root=tmp_path)
        with pytest.raises(TypeError, match=r"data must be a DataPair, from bbfast.datasets.load, got ImageSet"):
            load_attack_result(path, result.train)  # type: ignore[arg-type]

    def test_must_be_the_same(self, path: Path, pair: DataPair) -> None:
        train, test = pair.train, pair.test
        small = make_pair(n=40)
        turned = dataclasses.replace(train, labels=(train.labels + 1) % 4)
        wide = make_pair(size=(16, 16))
        for data, match in (
            (DataPair(small.train, test), "expected 60 training images, got 40"),
            (DataPair(train, small.test[:9]), "expected 24 test images, got 9"),
            (DataPair(turned, test), r"expected label \d at training image \d+, got \d \(another data set, or another"),
            (wide, r"expected images of \(C, H, W\) = \(3, 12, 16\), got \(3, 16, 16\)"),
            (DataPair(train, test, num_classes=5), "expected 4 classes, got 5"),
        ):
            with pytest.raises(DataRequirementError, match=match):
                load_attack_result(path, data)

    def test_an_attack_that_there_is_not(self, path: Path, pair: DataPair) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'badnet"):
            load_attack_result(path, pair, attack="badnetz")


class TestMalformed:
    @pytest.fixture
    def content(self, result: AttackResult, tmp_path: Path) -> dict[str, Any]:
        folder = save_attack_result(result, tmp_path / "record" / "run")
        content: dict[str, Any] = torch.load(folder / "attack_result.pt", weights_only=False)
        return content

    def refused(self, content: Any, tmp_path: Path, pair: DataPair, match: str) -> None:
        path = tmp_path / "record" / "run" / "attack_result.pt"
        torch.save(content, path)
        with pytest.raises(CorruptArtifactError, match=match):
            load_attack_result(path, pair)

    def test_parts(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        box = {"bd_data_container": {"data_dict": []}}
        for change, match in (
            ({"model_name": 5}, "model_name must be a short text, got int"),
            ({"num_classes": 1.5}, "num_classes must be a whole number, got float"),
            ({"num_classes": 1}, "num_classes is 1"),
            ({"img_size": (12, 16)}, r"img_size must be \(H, W, C\)"),
            ({"img_size": (12, 16, 4)}, "with 1 or 3 channels"),
            ({"img_size": (12, -16, 3)}, "with 1 or 3 channels"),
            ({"model": [1]}, "model must be a state dict"),
            ({"model": {"x": 1}}, "model must be a state dict"),
            ({"model": {"x": torch.ones(1), "module.x": torch.ones(1)}}, "names tensors twice"),
            ({"bd_test": None}, "bd_test must hold bd_data_container"),
            ({"bd_test": box}, "bd_test must hold bd_data_container"),
            ({"bd_train": 3}, "bd_train must hold bd_data_container"),
        ):
            self.refused({**content, **change}, tmp_path, pair, match)
        self.refused([content], tmp_path, pair, "it holds a list, expected a dict")
        self.refused(
            {"model_name": "x", "num_classes": 2, "model": {}}, tmp_path, pair, "no img_size, clean_data, bd_tra"
        )

    def test_sets(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        part = content["bd_train"]
        for change, match in (
            ({"poison_indicator": np.full(60, 2.0)}, "poison_indicator must hold 0 and 1 only"),
            ({"poison_indicator": np.full(60, np.nan)}, "poison_indicator must hold 0 and 1 only"),
            ({"poison_indicator": np.zeros((6, 10))}, "poison_indicator must be a one-dimensional array"),
            ({"poison_indicator": "1" * 60}, "poison_indicator must be a one-dimensional array"),
            ({"poison_indicator": np.ones(60)}, "is marked as poisoned, but has no picture"),
            ({"original_index_array": np.arange(61)}, r"original_index_array must hold positions in 0\.\.59"),
            ({"original_index_array": np.arange(-1, 59)}, "original_index_array must hold positions"),
            ({"original_index_array": np.arange(60.0)}, "original_index_array must hold positions"),
            ({"original_index_array": None}, "original_index_array must be a one-dimensional"),
            ({"sample_role": np.zeros(60)}, "sample_role does not fit its poison_indicator"),
            ({"sample_role": np.full(60, 3)}, "sample_role does not fit its poison_indicator"),
        ):
            self.refused({**content, "bd_train": {**part, **change}}, tmp_path, pair, match)
        torch.save(
            {**content, "bd_train": {**part, "original_index_array": np.arange(60)[::-1].copy()}}, tmp_path / "a.pt"
        )
        (tmp_path / "bd_train_dataset").symlink_to(tmp_path / "record" / "run" / "bd_train_dataset")

    def test_a_training_set_in_another_order(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        content["bd_train"]["original_index_array"] = np.arange(60)[::-1].copy()
        path = tmp_path / "record" / "run" / "attack_result.pt"
        torch.save(content, path)
        with pytest.raises(DataRequirementError, match="bd_train must show the whole training set in its order"):
            load_attack_result(path, pair)

    @pytest.mark.parametrize(
        ("entry", "match"),
        [
            (None, "has no picture in the data_dict"),
            ({"path": "x"}, "lies at 'x', expected"),
            ({"path": 5, "other_info": [1, 1]}, "has no picture"),
            ({"path": "bd_train_dataset/1/2.png"}, "must have two labels"),
            ({"path": "bd_train_dataset/1/2.png", "other_info": [1]}, "must have two labels"),
            ({"path": "bd_train_dataset/1/2.png", "other_info": [1, "x"]}, "label must be a whole number, got str"),
            ({"path": "bd_train_dataset/1/2.png", "other_info": [4, 0]}, r"has labels 4 and 0, expected 0\.\.3"),
            ({"path": "bd_train_dataset/1/2.png", "other_info": [-1, 0]}, r"has labels -1 and 0"),
            ({"path": "record/run/../../../../etc/passwd", "other_info": [1, 1]}, "lies at"),
            ({"path": "bd_train_dataset/../1.png", "other_info": [1, 1]}, "lies at"),
            ({"path": "/etc/1/2.png", "other_info": [1, 1]}, "lies at"),
            ({"path": "bd_train_dataset/1/..", "other_info": [1, 1]}, "lies at"),
            ({"path": "bd_..dataset/1/2.png", "other_info": [1, 1]}, "lies at"),
            ({"path": "bd_train_dataset/1/2.png\x00", "other_info": [1, 1]}, "lies at"),
            ({"path": "bd_train_dataset\\..\\..\\1\\2.png", "other_info": [1, 1]}, "lies at"),
            ((Image.new("RGB", (16, 12)), 1), "has no picture"),
            (("picture", 1, 1), "has no picture"),
        ],
    )
    def test_entries(self, entry: Any, match: str, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        entries = content["bd_train"]["bd_data_container"]["data_dict"]
        entries[next(iter(entries))] = entry
        self.refused(content, tmp_path, pair, match)

    def test_pictures(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        entries = content["bd_train"]["bd_data_container"]["data_dict"]
        key = next(iter(entries))
        truth = int(pair.train.labels[key])
        place = tmp_path / "record" / "run" / "bd_train_dataset" / str(truth) / f"{key}.png"
        good = place.read_bytes()

        def wrong(picture: Image.Image, form: str = "PNG") -> None:
            picture.save(place, form)

        for make, match in (
            (lambda: place.write_bytes(good[:60]), "cannot be decoded as PNG"),
            (lambda: place.write_bytes(b"x"), "cannot be decoded as PNG"),
            (lambda: wrong(Image.new("RGB", (16, 12)), "BMP"), "cannot be decoded as PNG"),
            (lambda: wrong(Image.new("L", (16, 12))), r"must be a PNG of 12x16 and mode RGB.*got 12x16 and L"),
            (lambda: wrong(Image.new("RGB", (12, 16))), r"as img_size says, got 16x12"),
            (lambda: wrong(Image.new("RGB", (4000, 4000))), r"as img_size says, got 4000x4000"),
            (place.unlink, "is missing; the folders of poisoned images must lie beside attack_result.pt"),
        ):
            make()
            self.refused(content, tmp_path, pair, match)
        place.write_bytes(good)
        load_attack_result(tmp_path / "record" / "run", pair, measure=False)
        entries[key] = (Image.new("RGB", (12, 16)), 1, truth)
        self.refused(content, tmp_path, pair, rf"the picture of sample {key} must be 12x16 with 3 channels")

    def test_a_link_out_of_the_folder(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        folder = tmp_path / "record" / "run" / "bd_train_dataset"
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        self.refused(content, tmp_path, pair, "a link that leads out of the folder")

    def test_malicious(self, content: dict[str, Any], tmp_path: Path, pair: DataPair) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        path = tmp_path / "record" / "run" / "attack_result.pt"
        for new in (True, False):
            torch.save({**content, "model_name": Payload()}, path, _use_new_zipfile_serialization=new)
            with pytest.raises(UnsafeFileError, match=r"was refused: it asks for posix.mkdir"):
                load_attack_result(path, pair)
        path.write_bytes(pickle.dumps(Payload()))
        with pytest.raises(UnsafeFileError):
            load_attack_result(path, pair)
        assert not (tmp_path / "ran").exists()

    def test_no_file(self, tmp_path: Path, pair: DataPair) -> None:
        with pytest.raises(
            ArtifactError, match=r"cannot read .*attack_result.pt: No such file or directory; check that"
        ):
            load_attack_result(tmp_path, pair)


class TestSaving:
    def test_what_is_there_is_kept(self, result: AttackResult, tmp_path: Path) -> None:
        folder = save_attack_result(result, tmp_path / "record" / "run")
        with pytest.raises(
            ArtifactError, match="a result is there already; remove it, choose another folder or overwr"
        ):
            save_attack_result(result, folder)
        (folder / "bd_train_dataset" / "mark").mkdir()
        save_attack_result(result, folder, overwrite=True)
        assert not (folder / "bd_train_dataset" / "mark").exists()
        (folder / "defense").mkdir()
        with pytest.raises(ArtifactError, match=r"it holds other files \(defense\), which would be lost"):
            save_attack_result(result, folder, overwrite=True)
        assert (folder / "attack_result.pt").exists() and (folder / "defense").exists()
        (tmp_path / "file").write_text("x")
        with pytest.raises(ArtifactError, match="it is a file; choose another folder"):
            save_attack_result(result, tmp_path / "file")

    def test_a_failure_leaves_nothing(
        self, result: AttackResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for name in ("write_tables", "write_pictures", "write_torch_file"):
            with (
                monkeypatch.context() as patch,
                pytest.raises(ArtifactError, match="No space left on device; free some"),
            ):
                patch.setattr(_write, name, full)
                save_attack_result(result, tmp_path / "record" / "run")
            assert not list((tmp_path / "record").iterdir())

    def test_full_disk(self, small_disk: Path) -> None:
        large = attacked(make_pair(n=60), model="small_cnn", ratio=0.2)
        big = dataclasses.replace(large, model=nn.Linear(1000, 1000))
        with pytest.raises(ArtifactError, match=f"cannot write {small_disk}/record/run: No space left on device"):
            save_attack_result(big, small_disk / "record" / "run")
        assert not list((small_disk / "record").iterdir())
        save_attack_result(large, small_disk / "record" / "run")

    def test_bad_arguments(self, result: AttackResult, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="result must be an AttackResult, got dict"):
            save_attack_result({}, tmp_path / "a")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"data_path must have 'data' in it.*got '/mnt/cifar'"):
            save_attack_result(result, tmp_path / "a", data_path="/mnt/cifar")
        bad = result.backdoor_test
        for ids, match in (
            (bad.ids + 100, "must hold images of result.test"),
            (bad.ids * 0 + bad.ids[0], "must hold images of result.test"),
            (bad.ids.flip(0), "must have the true labels of the images"),
        ):
            moved = dataclasses.replace(result, backdoor_test=dataclasses.replace(bad, ids=ids))
            with pytest.raises(ValueError, match=match):
                save_attack_result(moved, tmp_path / "a")
        two = torch.zeros(4, 2, 8, 8, dtype=torch.uint8)
        odd = dataclasses.replace(result, test=ImageSet(two, torch.zeros(4, dtype=torch.int64)))
        with pytest.raises(ValueError, match="images of 1 or 3 channels, as PNG files have, got 2"):
            save_attack_result(odd, tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_ids_that_are_no_positions(self, result: AttackResult, pair: DataPair, tmp_path: Path) -> None:
        test = dataclasses.replace(result.test, ids=result.test.ids.flip(0) * 10)
        bad = dataclasses.replace(result.backdoor_test, ids=test.ids[result.backdoor_test.ids])
        moved = dataclasses.replace(result, test=test, backdoor_test=bad)
        back = load_attack_result(save_attack_result(moved, tmp_path / "run"), pair, device="cpu")
        same_data(result, back)
