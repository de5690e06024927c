"""BackdoorBench results in and out: what we write opens as its own loader opens it, what it writes becomes a result."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_kit import (
    CLASSES,
    as_reference_opens_it,
    attacked,
    logits,
    make_pair,
    same_data,
    stamped,
    write_as_reference,
)
from torch import nn

import bbfast
from bbfast import datasets, models
from bbfast.attacks import AttackResult, Role
from bbfast.data import DataPair
from bbfast.errors import ArtifactError, DataRequirementError
from bbfast.interop import _write
from bbfast.interop.backdoorbench import load_attack_result, save_attack_result


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("badnets", {"ratio": 0.2, "target": 1}),
            ("badnets", {"ratio": 0.2, "label_mode": "all2all"}),
            ("badnets", {"ratio": 0.2, "label_mode": "clean_label", "target": 2}),
            ("badnets", {"ratio": 0.1, "label_mode": "one2one", "source_classes": (1, 3)}),
            ("wanet", {"ratio": 0.2, "mode": "data"}),
        ],
    )
    def test_everything_comes_back(self, name: str, settings: Any, pair: DataPair, tmp_path: Path) -> None:
        pair = make_pair(size=(16, 16)) if name == "wanet" else pair
        before = attacked(pair, name, **settings)
        folder = save_attack_result(before, tmp_path / "record" / "run")
        assert folder == tmp_path / "record" / "run"
        after = load_attack_result(folder / "attack_result.pt", pair, device="cpu")
        same_data(before, after)
        assert torch.equal(logits(before.model, pair), logits(after.model, pair)) and not after.model.training
        assert {k: after.metrics[k] for k in ("c_acc", "asr", "r_acc", "poison_ratio")} == pytest.approx(
            {k: before.metrics[k] for k in ("c_acc", "asr", "r_acc", "poison_ratio")}
        )
        for key in ("attack", "attack_config", "model", "recipe", "data", "seed"):
            assert after.config[key] == before.config[key], key
        assert after.history == before.history and len(after.history) == 1
        assert after.config["imported"]["absent"] == ["trigger"]
        assert (name == "wanet") == bool((after.role == int(Role.CROSS)).any())
        again = load_attack_result(save_attack_result(after, tmp_path / "record" / "again"), pair, device="cpu")
        same_data(before, again)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_papers_model_and_grey_images(self, channels: int, tmp_path: Path) -> None:
        pair = make_pair(channels)
        before = attacked(pair, model="preactresnet18", ratio=0.2)
        after = load_attack_result(save_attack_result(before, tmp_path / "run"), pair, device="cpu")
        same_data(before, after)
        assert torch.equal(logits(before.model, pair), logits(after.model, pair))

    def test_the_data_set_is_loaded_by_its_name(self, tmp_path: Path) -> None:
        digits = datasets.load("digits")
        some = DataPair(digits.train, digits.test[:40], name="digits")
        before = dataclasses.replace(attacked(some, ratio=0.1), test=digits.test)
        after = load_attack_result(save_attack_result(before, tmp_path / "run"), measure=False)
        same_data(before, after)
        assert after.config["data"]["fingerprint"] == digits.fingerprint

    def test_saved_again_in_our_own_format(self, result: AttackResult, pair: DataPair, tmp_path: Path) -> None:
        after = load_attack_result(save_attack_result(result, tmp_path / "run"), pair, device="cpu")
        after.save(tmp_path / "ours")
        back = AttackResult.load(tmp_path / "ours")
        same_data(after, back)
        assert back.config == after.config and back.trigger_state == {}
        with pytest.raises(
            DataRequirementError, match="holds no trigger that could be put on other images: it was imp"
        ):
            back.trigger(pair.test.images)


class TestOursInTheReference:
    def test_opens(self, result: AttackResult, pair: DataPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_attack_result(result, tmp_path / "somewhere" / "record" / "run" / "attack_result.pt")
        os.rename(tmp_path / "somewhere", tmp_path / "reference")
        monkeypatch.chdir(tmp_path / "reference")  # where the reference is run from
        found = as_reference_opens_it(Path("record/run/attack_result.pt"), pair.train, pair.test)
        assert torch.equal(logits(found["model"], pair), logits(result.model, pair))
        assert found["data_path"] == f"{tmp_path.resolve()}/reference/data/tiny_data"
        train, test = found["bd_train"], found["bd_test"]
        assert [item[2] for item in train] == list(range(len(pair.train)))
        assert np.array_equal(np.stack([i[0] for i in train]), result.train.images.permute(0, 2, 3, 1).numpy())
        assert [i[1] for i in train] == result.train.labels.tolist()
        assert [i[3] for i in train] == result.poisoned.int().tolist()
        assert [i[4] for i in train] == result.original_labels.tolist()
        bad = result.backdoor_test
        assert np.array_equal(np.stack([i[0] for i in test]), bad.images.permute(0, 2, 3, 1).numpy())
        assert [i[1] for i in test] == bad.labels.tolist() and [i[4] for i in test] == bad.original_labels.tolist()
        assert [i[2] for i in test] == bad.ids.tolist() and {i[3] for i in test} == {1}

    def test_types_and_files(self, result: AttackResult, tmp_path: Path) -> None:
        folder = save_attack_result(result, tmp_path / "record" / "run")
        assert sorted(p.name for p in folder.iterdir()) == [
            "attack_df.csv",
            "attack_df_summary.csv",
            "attack_result.pt",
            "bd_test_dataset",
            "bd_train_dataset",
            "info.pickle",
            "train_poison_index_list.pickle",
        ]
        content = torch.load(folder / "attack_result.pt", weights_only=False)
        assert list(content) == [
            "model_name", "num_classes", "data_path", "img_size", "clean_data", "model", "bd_train", "bd_test"
        ]  # fmt: skip
        assert (content["model_name"], content["num_classes"], content["img_size"]) == ("small_cnn", 4, (12, 16, 3))
        assert content["data_path"] == "./data/tiny_data" and content["clean_data"] == "tiny_data"
        assert list(content["model"]) == list(result.model.state_dict())
        part = content["bd_train"]
        assert part["poison_indicator"].dtype == np.float64 and part["original_index_array"].dtype == np.int64
        box = part["bd_data_container"]
        assert {type(key) for key in box["data_dict"]} == {int} and box["save_file_format"] == ".png"
        index, entry = next(iter(box["data_dict"].items()))
        truth = int(result.original_labels[index])
        assert entry == {"path": f"record/run/bd_train_dataset/{truth}/{index}.png", "other_info": [1, truth]}
        assert part["sample_role"].tolist() == result.role.tolist()
        marks = torch.load(folder / "train_poison_index_list.pickle", weights_only=False)
        assert marks.dtype == np.float64 and marks.tolist() == result.poisoned.double().tolist()
        info = torch.load(folder / "info.pickle", weights_only=False)
        assert (info["attack"], info["attack_target"], info["attack_label_trans"]) == ("badnet", 1, "all2one")
        assert (info["pratio"], info["random_seed"], info["epochs"]) == (0.2, 0, 1)

    def test_the_models_names_are_the_references(self) -> None:
        names = list(models.build("preactresnet18", 10, 32).state_dict())
        assert names[0] == "conv1.weight" and names[-2:] == ["linear.weight", "linear.bias"]
        block = [n.split(".", 2)[2] for n in names if n.startswith("layer2.0.") and n.endswith("weight")]
        assert block == ["bn1.weight", "conv1.weight", "bn2.weight", "conv2.weight", "shortcut.0.weight"]
        with torch.device("meta"):
            assert next(iter(models.build("vit_b_16", 10, 32).state_dict())) == "1.class_token"

    def test_numpy_1_and_old_torch_can_read_it(self, result: AttackResult, tmp_path: Path) -> None:
        folder = save_attack_result(result, tmp_path / "record" / "run")
        for name in ("attack_result.pt", "info.pickle", "train_poison_index_list.pickle"):
            with zipfile.ZipFile(folder / name) as archive:
                entry = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                data = archive.read(entry)
            assert data[:2] == b"\x80\x02" and b"numpy._core" not in data
            assert (b"numpy.core.multiarray" in data) == (name != "info.pickle")

    def test_outside_of_record(
        self, result: AttackResult, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with caplog.at_level(logging.WARNING):
            folder = save_attack_result(result, "run", data_path="/mnt/data/c10", clean_data="cifar10")
        assert "BackdoorBench opens results below a folder named 'record' only" in caplog.text
        content = torch.load(folder / "attack_result.pt", weights_only=False)
        assert content["bd_test"]["save_folder_path"] == f"{tmp_path}/run/bd_test_dataset"
        assert (content["clean_data"], content["data_path"]) == ("cifar10", "/mnt/data/c10")

    def test_tables(self, result: AttackResult, tmp_path: Path) -> None:
        changed = dataclasses.replace(
            result, history=[{"epoch": 0, "loss": 2.0, "c_acc": 0.9}, {"epoch": 1, "loss": 1.5}]
        )
        folder = save_attack_result(changed, tmp_path / "record" / "run")
        rows = list(csv.DictReader((folder / "attack_df.csv").read_text().splitlines()))
        assert list(rows[0]) == ["", "epoch", "train_epoch_loss_avg_over_batch", "test_acc", "test_asr", "test_ra"]
        assert [r["train_epoch_loss_avg_over_batch"] for r in rows] == ["2.0", "1.5"]
        assert rows[0]["test_asr"] == "" and float(rows[1]["test_asr"]) == result.metrics["asr"]
        summary = {r[""]: r for r in csv.DictReader((folder / "attack_df_summary.csv").read_text().splitlines())}
        assert list(summary) == ["last", "valid_max", "exist_nan_value"]
        assert (
            float(summary["last"]["test_acc"]) == result.metrics["c_acc"] and summary["valid_max"]["test_acc"] == "0.9"
        )

    def test_undefined_figures(self, tmp_path: Path) -> None:
        _write.write_tables(tmp_path, [{"epoch": 0, "asr": float("nan")}], {})
        assert (tmp_path / "attack_df.csv").read_text() == ",epoch,test_asr\n0,0,nan_value\n"
        text = (tmp_path / "attack_df_summary.csv").read_text()
        assert text == ",epoch,test_asr\nlast,0,nan_value\nvalid_max,0,\nexist_nan_value,False,True\n"

    @pytest.mark.parametrize("name", ["blind", "lira"])
    def test_attacks_without_a_training_set(
        self, name: str, result: AttackResult, pair: DataPair, tmp_path: Path
    ) -> None:
        other = dataclasses.replace(result, config={**result.config, "attack": name})
        folder = save_attack_result(other, tmp_path / "record" / "run")
        content = torch.load(folder / "attack_result.pt", weights_only=False)
        assert content["bd_train"] is None and not (folder / "bd_train_dataset").exists()
        assert not (folder / "train_poison_index_list.pickle").exists()
        back = load_attack_result(folder, pair, measure=False)
        assert torch.equal(back.train.images, pair.train.images) and not back.role.any()


class TestTheirsInOurs:
    @pytest.mark.parametrize(
        "form",
        [
            {},
            {"root": "/home/somebody/BackdoorBench/record/badnet_0_1"},
            {"root": "C:\\Users\\x\\record\\run"},
            {"key": np.int64, "indicator": np.int64},
            {"key": np.int32, "indicator": np.float32},
            {"in_memory": True},
            {"in_memory": True, "key": np.int64, "_use_new_zipfile_serialization": False},
            {"prefix": "module."},
            {"rename": True},
            {"prefix": "module.", "rename": True, "pickle_protocol": 4},
            {"_use_new_zipfile_serialization": False},
            {"pickle_protocol": 5, "key": np.int64},
        ],
        ids=str,
    )
    def test_forms(self, form: dict[str, Any], pair: DataPair, tmp_path: Path) -> None:
        torch.manual_seed(0)
        name = "preactresnet18" if {"prefix", "rename"} & form.keys() else "small_cnn"
        model = models.build(name, CLASSES, (12, 16)).eval()
        chosen = [int(i) for i in torch.arange(60)[::7]]
        others = (pair.test.labels != 0).nonzero().flatten().tolist()
        path = write_as_reference(
            tmp_path / "run",
            pair,
            model,
            name,
            train=stamped(pair.train, chosen, 0),
            test=stamped(pair.test, others, 0),
            **form,
        )
        found = load_attack_result(path, pair, device="cpu")
        expected = pair.train.images.clone()
        expected[chosen] = 255 - expected[chosen]
        assert torch.equal(found.train.images, expected) and torch.equal(found.test.images, pair.test.images)
        assert torch.equal(found.original_labels, pair.train.labels)
        assert found.poisoned.nonzero().flatten().tolist() == chosen and not found.train.labels[chosen].any()
        assert torch.equal(found.clean_images, pair.train.images[chosen])
        assert torch.equal(found.clean_train.images, pair.train.images)
        assert torch.equal(found.backdoor_test.images, 255 - pair.test.images[others])
        assert found.backdoor_test.ids.tolist() == others and not found.backdoor_test.labels.any()
        assert torch.equal(found.backdoor_test.original_labels, pair.test.labels[others])
        assert torch.equal(logits(found.model, pair), logits(model, pair))
        measured = bbfast.evaluate(found.model, found.test, found.backdoor_test, device="cpu")
        assert {k: found.metrics[k] for k in measured} == measured
        assert found.config["attack"] == "unknown" and found.target == 0 and found.num_classes == CLASSES
        assert found.config["imported"]["absent"] == ["recipe", "seed", "trigger"]
        assert found.config["recipe"] is None and found.config["seed"] is None and found.history == []

    def load(self, pair: DataPair, folder: Path, **given: Any) -> AttackResult:
        options = given.pop("options", {})
        known = {k: given.pop(k) for k in ("attack", "measure") if k in given}
        model = models.build("small_cnn", CLASSES, (12, 16))
        path = write_as_reference(folder, pair, model, "small_cnn", **given)
        if options:
            torch.save(options, folder / "info.pickle")
        return load_attack_result(path, pair, device="cpu", **known)

    def test_roles_without_ours(self, pair: DataPair, tmp_path: Path) -> None:
        labels = pair.train.labels
        moved = (labels != 2).nonzero().flatten().tolist()[:5]
        target = (labels == 2).nonzero().flatten().tolist()[:2]
        kept = (labels != 2).nonzero().flatten().tolist()[5:12]
        train = stamped(pair.train, moved + target, 2) | stamped(pair.train, kept, labels[kept].tolist())
        test = stamped(pair.test, (pair.test.labels != 2).nonzero().flatten().tolist(), 2)
        found = self.load(pair, tmp_path / "run", train=train, test=test)
        role = torch.zeros(60, dtype=torch.int8)
        role[moved + target], role[kept] = 1, 2
        assert torch.equal(found.role, role) and torch.equal(found.poisoned, role == 1)
        assert torch.equal(found.train.images[kept], 255 - pair.train.images[kept])
        assert found.metrics["poison_ratio"] == pytest.approx(7 / 60)

    def test_roles_of_all_to_all(self, pair: DataPair, tmp_path: Path) -> None:
        labels = pair.train.labels
        train = stamped(pair.train, [0, 1, 2], ((labels[:3] + 1) % 4).tolist()) | stamped(
            pair.train, [3, 4], labels[3:5].tolist()
        )
        test = stamped(pair.test, list(range(24)), ((pair.test.labels + 1) % 4).tolist())
        found = self.load(pair, tmp_path / "run", train=train, test=test, options={"attack": "wanet"})
        assert found.role[:6].tolist() == [1, 1, 1, 2, 2, 0]
        config = found.config["attack_config"]
        assert found.config["attack"] == "wanet" and (config["label_mode"], config["shift"]) == ("all2all", 1)

    @pytest.mark.parametrize(
        ("options", "attack", "name"),
        [
            ({"attack": "badnet", "pratio": 0.1, "random_seed": 7, "device": torch.device("cuda:0")}, None, "badnets"),
            ({"attack": "hidden_trigger"}, None, "unknown"),
            ({"attack": ["badnet"]}, None, "unknown"),
            ({}, "badnet", "badnets"),
            ({"attack": "blended"}, "badnets", "badnets"),
            ({"attack": "badnet", "bbfast": {"attack": "badnets", "attack_config": {"target": "x"}}}, None, "badnets"),
            ({"bbfast": {"attack": "badnets", "attack_config": {}, "recipe": {"epochs": -1}}}, None, "badnets"),
            ({"bbfast": 5, "attack": "wanet"}, None, "wanet"),
        ],
        ids=str,
    )
    def test_settings_beside_it(
        self, options: dict[str, Any], attack: str | None, name: str, pair: DataPair, tmp_path: Path
    ) -> None:
        test = stamped(pair.test, (pair.test.labels != 3).nonzero().flatten().tolist(), 3)
        train = stamped(pair.train, list(range(12)), 3)
        found = self.load(pair, tmp_path / "run", train=train, test=test, options=options, attack=attack, measure=False)
        assert found.config["attack"] == name and found.config["seed"] == options.get("random_seed")
        assert found.config["recipe"] is None and not {"c_acc", "asr"} & found.metrics.keys()
        if name == "badnets" and "bbfast" not in options:
            assert found.config["attack_config"]["target"] == 3 and found.config["attack_config"]["ratio"] == 0.2
            assert found.config["attack_config"]["compat"] == "reference"

    def test_label_modes_are_told_from_the_labels(self, pair: DataPair, tmp_path: Path) -> None:
        y, z = pair.train.labels, pair.test.labels
        cases = {
            "clean_label": (stamped(pair.train, (y == 1).nonzero().flatten().tolist()[:3], 1), (z != 1), {"target": 1}),
            "one2one": (stamped(pair.train, [0, 1], 1), (z == 2) | (z == 3), {"target": 1, "source_classes": [2, 3]}),
            "all2one": (stamped(pair.train, [0, 1], 1), (z != 1), {"target": 1}),
        }
        for mode, (train, test, expected) in cases.items():
            held = stamped(pair.test, test.nonzero().flatten().tolist(), 1)
            found = self.load(pair, tmp_path / mode, train=train, test=held, attack="badnets", measure=False)
            config = found.config["attack_config"]
            assert config["label_mode"] == mode and {k: config[k] for k in expected} == expected

    def test_a_dangerous_file_of_settings_is_left_out(
        self, pair: DataPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Payload:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        test = stamped(pair.test, [0], 3)
        with caplog.at_level(logging.WARNING):
            found = self.load(pair, tmp_path / "run", test=test, options={"attack": "badnet", "x": Payload()})
        assert "info.pickle was refused: it asks for posix.mkdir" in caplog.text and not (tmp_path / "ran").exists()
        assert found.config["attack"] == "unknown" and found.config["imported"]["options"] == {}

    def test_settings_without_end(self, pair: DataPair, tmp_path: Path) -> None:
        endless: list[Any] = []
        endless += [endless] * 1000
        test = stamped(pair.test, [0], 3)
        options = {
            "attack": "badnet",
            "x": endless,
            "many": list(range(20_000)),
            "note": {"$float": "nan"},
            "y": [1, "z"],
        }
        found = self.load(pair, tmp_path / "run", test=test, options=options, measure=False)
        assert found.config["imported"]["options"] == {"attack": "badnet", "y": [1, "z"]}

    def test_figures_beside_it(self, pair: DataPair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "run").mkdir()
        test = stamped(pair.test, (pair.test.labels != 3).nonzero().flatten().tolist(), 3)
        self.load(pair, tmp_path / "run" / "x", test=test)
        table = ",epoch,train_epoch_loss_avg_over_batch,test_acc,test_asr,test_ra,note\n"
        table += "0,1,2.5,0.5,0.25,nan_value,x\n1,2,1.5,9.0,,0.125,\n"
        (tmp_path / "run" / "x" / "attack_df.csv").write_text(table)
        with caplog.at_level(logging.WARNING):
            found = load_attack_result(tmp_path / "run" / "x", pair, device="cpu")
        assert found.history == [
            {"epoch": 1, "loss": 2.5, "c_acc": 0.5, "asr": 0.25},
            {"epoch": 2, "loss": 1.5, "c_acc": 9.0, "r_acc": 0.125},
        ]
        assert "c_acc is" in caplog.text and "9.0000 in attack_df.csv; is the clean data the same" in caplog.text

    def test_test_images_without_trigger_are_left_out(
        self, pair: DataPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write_as_reference(
            tmp_path / "run",
            pair,
            models.build("small_cnn", 4, (12, 16)),
            "small_cnn",
            test=stamped(pair.test, [3, 5], 0),
        )
        content = torch.load(path, weights_only=False)
        content["bd_test"]["original_index_array"] = np.array([5, 1, 3])
        torch.save(content, path)
        found = load_attack_result(path, pair, measure=False)
        assert found.backdoor_test.ids.tolist() == [5, 3]
        assert "1 test images of bd_test carry no trigger and are left out" in caplog.text

    def test_a_model_of_ones_own(self, pair: DataPair, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, CLASSES))
        path = write_as_reference(tmp_path / "run", pair, model, "resnet34", test=stamped(pair.test, [0, 1], 3))
        with pytest.raises(
            ArtifactError, match=r"unknown model 'resnet34'.*pass a module of that architecture: model="
        ):
            load_attack_result(path, pair)
        fresh = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, CLASSES))
        found = load_attack_result(path, pair, model=fresh, device="cpu")
        assert torch.equal(found.model[1].weight, model[1].weight) and found.config["model"] == {"name": "resnet34"}

    def test_another_architecture(self, pair: DataPair, tmp_path: Path) -> None:
        model = nn.Linear(2, 2)
        path = write_as_reference(tmp_path / "run", pair, model, "small_cnn", test=stamped(pair.test, [0], 3))
        with pytest.raises(ArtifactError, match=r"its model is no small_cnn .*missing: conv1.weight"):
            load_attack_result(path, pair)
