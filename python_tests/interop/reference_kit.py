"""What the tests of BackdoorBench's results share: its loader and its way of writing, told from spec/attacks 0.9."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import bbfast
from bbfast import attacks, models
from bbfast.attacks import AttackResult
from bbfast.data import DataPair, ImageSet
from bbfast.training import Recipe

CLASSES = 4
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, augment=False, precision="fp32", deterministic=True)


def make_pair(channels: int = 3, size: tuple[int, int] = (12, 16), n: int = 60) -> DataPair:
    g = torch.Generator().manual_seed(0)
    sets = []
    for count in (n, 24):
        images = torch.randint(0, 256, (count, channels, *size), generator=g, dtype=torch.uint8)
        sets.append(ImageSet(images, torch.randperm(count, generator=g) % CLASSES))
    return DataPair(*sets, name="tiny_data", mean=(0.5,) * channels, std=(0.25,) * channels)


def attacked(pair: DataPair, name: str = "badnets", model: str = "small_cnn", **settings: Any) -> AttackResult:
    recipe = RECIPE if model == "small_cnn" else RECIPE.replace(epochs=0)
    return bbfast.attack(attacks.create(name, **settings), pair, model, recipe, device="cpu", progress=False)


def as_reference_opens_it(path: Path, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """The reference's loader as spec/attacks 0.9 tells it: plain torch.load, paths opened as they are stored.

    Its model is made here; keys are matched by position. The two sets are lists of its items:
    (picture, label, original index, poison flag, original label).
    """
    content = torch.load(path, weights_only=False)
    root = str(path.resolve())[: str(path.resolve()).index("record")]
    data_path = root + content["data_path"][content["data_path"].index("data") :]
    height, width, channels = content["img_size"]
    state = {key[7:] if key.startswith("module.") else key: value for key, value in content["model"].items()}
    model = models.build(content["model_name"], content["num_classes"], (channels, height, width))
    own = list(model.state_dict())
    assert len(own) == len(state)
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))

    def items(state: dict[str, Any] | None, clean: ImageSet) -> list[tuple[Any, ...]] | None:
        if state is None:
            return None
        assert len(state["poison_indicator"]) == len(clean)
        box, found = state["bd_data_container"], []
        for original_index in state["original_index_array"]:
            if state["poison_indicator"][original_index] == 0:
                picture = clean.images[original_index].permute(1, 2, 0).numpy()
                label = truth = int(clean.labels[original_index])
                flag = 0
            else:
                entry = box["data_dict"][original_index]
                if box["save_folder_path"] is None:
                    picture, label, truth = entry
                else:
                    with Image.open(entry["path"]) as opened:
                        picture = np.asarray(opened)
                    label, truth = entry["other_info"]
                flag = 1
            pixels = np.asarray(picture).reshape(height, width, channels)
            pair = (truth, label) if state["getitem_all_switch"] else (label, truth)
            found.append((pixels, pair[0], original_index, flag, pair[1]))
        return found

    return {
        "model": model.eval(),
        "data_path": data_path,
        "bd_train": items(content["bd_train"], train),
        "bd_test": items(content["bd_test"], test),
        "content": content,
    }


def write_as_reference(
    folder: Path,
    pair: DataPair,
    model: nn.Module,
    name: str,
    *,
    root: str = "./record/run",
    key: type = int,
    indicator: type = float,
    in_memory: bool = False,
    prefix: str = "",
    rename: bool = False,
    train: dict[int, tuple[Tensor, int]] | None = None,
    test: dict[int, tuple[Tensor, int]] | None = None,
    **options: Any,
) -> Path:
    """A folder as the reference writes one: each poisoned sample is index -> (uint8 [C, H, W], new label)."""
    folder.mkdir(parents=True)

    def part(poisoned: dict[int, tuple[Tensor, int]], clean: ImageSet, sub: str, subset: bool) -> dict[str, Any]:
        marks, entries = np.zeros(len(clean), dtype=indicator), {}
        for index, (image, label) in poisoned.items():
            marks[index] = 1
            truth = int(clean.labels[index])
            pixels = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
            if in_memory:
                entries[key(index)] = (picture, label, truth)
            else:
                (folder / sub / str(truth)).mkdir(parents=True, exist_ok=True)
                picture.save(folder / sub / str(truth) / f"{index}.png")
                place = f"{root}/{sub}/{truth}/{index}.png"
                entries[key(index)] = {"path": place, "other_info": [label, torch.tensor(truth)]}
        where = None if in_memory else f"{root}/{sub}"
        return {
            "bd_data_container": {"save_folder_path": where, "data_dict": entries, "save_file_format": ".png"},
            "getitem_all": True,
            "getitem_all_switch": False,
            "original_index_array": np.where(marks == 1)[0] if subset else np.arange(len(clean)),
            "poison_indicator": marks,
            "save_folder_path": where,
        }

    state = OrderedDict((prefix + (f"t{i}" if rename else k), v) for i, (k, v) in enumerate(model.state_dict().items()))
    channels, height, width = pair.image_size
    content = {
        "model_name": name,
        "num_classes": pair.num_classes,
        "model": state,
        "data_path": "./data/tiny_data",
        "img_size": [height, width, channels],
        "clean_data": "tiny_data",
        "bd_train": None if train is None else part(train, pair.train, "bd_train_dataset", False),
        "bd_test": part(test or {}, pair.test, "bd_test_dataset", True),
    }
    torch.save(content, folder / "attack_result.pt", **options)
    return folder / "attack_result.pt"


def stamped(images: ImageSet, index: list[int], labels: int | list[int]) -> dict[int, tuple[Tensor, int]]:
    wanted = [labels] * len(index) if isinstance(labels, int) else labels
    return {i: (255 - images.images[i], label) for i, label in zip(index, wanted, strict=True)}


def same_data(a: AttackResult, b: AttackResult) -> None:
    for part in ("train", "test", "backdoor_test"):
        ours, theirs = getattr(a, part), getattr(b, part)
        for field in dataclasses.fields(ours):
            x, y = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, (part, field.name)
    for name in ("poisoned", "original_labels", "role", "clean_images"):
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) and x.dtype == y.dtype, name


def logits(model: nn.Module, pair: DataPair) -> Tensor:
    with torch.no_grad():
        return model((pair.test.images[:8].float() / 255 - 0.5) / 0.25)
