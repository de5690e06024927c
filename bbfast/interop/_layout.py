"""The reference's result folder (spec/attacks 0.9): its names, and what stands in its attack_result.pt."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bbfast.errors import CorruptArtifactError
from bbfast.interop._standins import ArrayValue, PictureValue, TensorValue
from bbfast.interop._torch_file import read_torch_file

__all__ = [
    "ATTACKS",
    "COLUMNS",
    "DATASETS",
    "FILES",
    "INFO",
    "POISON_INDEX",
    "RESULT",
    "TABLE",
    "TABLE_SUMMARY",
    "TEST_FOLDER",
    "TRAIN_FOLDER",
    "Contents",
    "Part",
    "each",
    "read_contents",
    "read_pictures",
]

RESULT = "attack_result.pt"
INFO = "info.pickle"
POISON_INDEX = "train_poison_index_list.pickle"
TABLE = "attack_df.csv"
TABLE_SUMMARY = "attack_df_summary.csv"
TRAIN_FOLDER = "bd_train_dataset"
TEST_FOLDER = "bd_test_dataset"
FILES = (RESULT, INFO, POISON_INDEX, TABLE, TABLE_SUMMARY, TRAIN_FOLDER, TEST_FOLDER)

ATTACKS = {"badnets": "badnet", "input_aware": "inputaware"}
"""Attacks that the reference calls by another name."""
DATASETS = {"tiny_imagenet": "tiny"}
"""Data sets that the reference calls by another name."""
COLUMNS = {
    "loss": "train_epoch_loss_avg_over_batch",
    "train_acc_clean": "train_acc_clean_only",
    "train_asr": "train_asr_bd_only",
    "train_cross_acc": "train_cross_acc_only",
    "c_acc": "test_acc",
    "asr": "test_asr",
    "r_acc": "test_ra",
    "cross_acc": "test_cross_acc",
}
"""Figures of an epoch whose column has another name."""

_KEYS = ("model_name", "num_classes", "model", "img_size", "clean_data", "bd_train", "bd_test")
_PATH = (re.compile(r"bd_\w*dataset\w*", re.ASCII), re.compile(r"[0-9]+"), re.compile(r"[0-9]+\.png"))
_CHUNK = 64
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The poisoned samples of the training or the test set, in the order in which the set shows them.

    Args:
        total: Size of the clean set.
        shown: Clean index of every sample of the set, int64 ``[M]``.
        index: Clean index of the poisoned ones, int64 ``[P]``.
        sources: Their pictures: a PNG file, or ``[H, W, C]`` in memory.
        given: Their labels as the learner gets them, or as the attacker wants them, int64 ``[P]``.
        original: Their true labels, int64 ``[P]``.
        role: Of every sample of the clean set, int8 ``[total]``; None in files that bbfast did not write.
    """

    total: int
    shown: Tensor
    index: Tensor
    sources: list[Path | np.ndarray]
    given: Tensor
    original: Tensor
    role: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What an attack_result.pt holds.

    Args:
        path: The file.
        model_name: Architecture.
        num_classes: K.
        state: Tensors of the model in the order of the file, ``module.`` taken off; memory of the file.
        image_size: ``(C, H, W)``.
        clean_data: Name of the data set.
        train: Poisoned training samples; None of an attack that leaves no poisoned training set.
        test: Poisoned test samples.
    """

    path: Path
    model_name: str
    num_classes: int
    state: dict[str, Tensor]
    image_size: tuple[int, int, int]
    clean_data: str
    train: Part | None
    test: Part


def read_contents(path: Path) -> Contents:
    """Read an attack_result.pt; no picture is opened yet.

    Raises:
        ArtifactError: as :func:`bbfast.interop._torch_file.read_torch_file`, and CorruptArtifactError if the file is no
            attack result or its parts do not fit together.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict):
        _bad(path, f"it holds a {type(content).__name__}, expected a dict")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        _bad(path, f"it has no {', '.join(missing)} (a result of another program, of a defense, or of its version 1?)")
    height, width, channels = _triple(path, content["img_size"])
    num_classes = _whole(path, content["num_classes"], "num_classes")
    if num_classes < 2:
        _bad(path, f"num_classes is {num_classes}")
    train = content["bd_train"]
    return Contents(
        path=path,
        model_name=_text(path, content["model_name"], "model_name"),
        num_classes=num_classes,
        state=_state(path, content["model"]),
        image_size=(channels, height, width),
        clean_data=_text(path, content["clean_data"], "clean_data"),
        train=None if train is None else _part(path, train, "bd_train", num_classes),
        test=_part(path, content["bd_test"], "bd_test", num_classes),
    )


def read_pictures(part: Part, size: tuple[int, int, int]) -> Tensor:
    """The pictures of a part, uint8 ``[P, C, H, W]`` as they are stored.

    Raises:
        CorruptArtifactError: naming a file that is missing, damaged, no PNG or of another size.
    """
    channels, height, width = size
    out = np.empty((len(part.sources), height, width, channels), dtype=np.uint8)

    def decode(start: int) -> None:
        for position in range(start, min(start + _CHUNK, len(part.sources))):
            source = part.sources[position]
            pixels = _decoded(source, size) if isinstance(source, Path) else source
            if pixels.shape != out.shape[1:]:
                raise CorruptArtifactError(
                    f"the picture of sample {int(part.index[position])} must be {height}x{width} with {channels} "
                    f"channels, as img_size says, got {list(pixels.shape)}"
                )
            out[position] = pixels

    each(decode, range(0, len(part.sources), _CHUNK))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def each(work: Any, items: Any) -> None:
    """Call ``work`` with each item on all cores; Pillow and files release the interpreter lock."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(work, items):
            pass


def _decoded(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = size
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            # Asked before the pixels are unpacked: a small file can claim any size.
            if picture.size != (width, height) or picture.mode != mode:
                raise CorruptArtifactError(
                    f"{path} must be a PNG of {height}x{width} and mode {mode}, as img_size says, got "
                    f"{picture.height}x{picture.width} and {picture.mode}"
                )
            return np.asarray(picture).reshape(height, width, channels)
    except FileNotFoundError:
        raise CorruptArtifactError(
            f"{path} is missing; the folders of poisoned images must lie beside {RESULT}: copy them together"
        ) from None
    except _DECODE_ERRORS as error:
        raise CorruptArtifactError(f"{path} cannot be decoded as PNG ({type(error).__name__}: {error})") from error


def _part(path: Path, state: Any, name: str, num_classes: int) -> Part:
    box = state.get("bd_data_container") if isinstance(state, dict) else None
    entries = box.get("data_dict") if isinstance(box, dict) else None
    if not isinstance(state, dict) or not isinstance(entries, dict):
        _bad(path, f"{name} must hold bd_data_container with a data_dict")
    marks = _numbers(path, state.get("poison_indicator"), f"{name}'s poison_indicator")
    if not np.isin(marks, (0, 1)).all():
        _bad(path, f"{name}'s poison_indicator must hold 0 and 1 only")
    shown = _numbers(path, state.get("original_index_array"), f"{name}'s original_index_array")
    if not np.issubdtype(shown.dtype, np.integer) or (len(shown) and not 0 <= shown.min() <= shown.max() < len(marks)):
        _bad(path, f"{name}'s original_index_array must hold positions in 0..{len(marks) - 1}")
    index = shown[marks[shown] == 1]
    found = [_entry(path, entries, int(i), f"{name}'s sample {int(i)}", num_classes) for i in index]
    return Part(
        total=len(marks),
        shown=torch.from_numpy(shown.astype(np.int64)),
        index=torch.from_numpy(index.astype(np.int64)),
        sources=[source for source, _, _ in found],
        given=torch.tensor([given for _, given, _ in found], dtype=torch.int64),
        original=torch.tensor([original for _, _, original in found], dtype=torch.int64),
        role=_role(path, state.get("sample_role"), marks, name),
    )


def _role(path: Path, value: Any, marks: np.ndarray, name: str) -> Tensor | None:
    if value is None:
        return None
    role = _numbers(path, value, f"{name}'s sample_role")
    if len(role) != len(marks) or not np.isin(role, (0, 1, 2)).all() or not np.array_equal(role != 0, marks == 1):
        _bad(path, f"{name}'s sample_role does not fit its poison_indicator")
    return torch.from_numpy(role.astype(np.int8))


def _entry(
    path: Path, entries: Mapping[Any, Any], key: int, name: str, num_classes: int
) -> tuple[Path | np.ndarray, int, int]:
    entry = entries.get(key)
    if isinstance(entry, dict) and isinstance(entry.get("path"), str):
        source: Path | np.ndarray = _beside(path, entry["path"], name)
        labels = entry.get("other_info")
    elif isinstance(entry, (tuple, list)) and len(entry) == 3 and isinstance(entry[0], PictureValue):
        if entry[0].pixels is None:
            _bad(path, f"{name} is a picture without pixels")
        source, labels = entry[0].pixels, entry[1:]
    else:
        _bad(path, f"{name} is marked as poisoned, but has no picture in the data_dict")
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        _bad(path, f"{name} must have two labels, the new and the true one")
    given, original = (_whole(path, label, f"{name}'s label") for label in labels)
    if not (0 <= given < num_classes and 0 <= original < num_classes):
        _bad(path, f"{name} has labels {given} and {original}, expected 0..{num_classes - 1}")
    return source, given, original


def _beside(path: Path, stored: str, name: str) -> Path:
    """Where a stored path lies now: its last three parts, below the folder of the file and nowhere else."""
    parts = re.split(r"[\\/]+", stored)[-3:]
    if len(parts) != 3 or not all(form.fullmatch(part) for form, part in zip(_PATH, parts, strict=True)):
        _bad(path, f"{name} lies at {stored[-120:]!r}, expected .../bd_*_dataset/<label>/<index>.png")
    folder = path.parent.resolve()
    place = folder.joinpath(*parts)
    if not place.resolve().is_relative_to(folder):
        _bad(path, f"{name} lies at {place}, a link that leads out of the folder")
    return place


def _state(path: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, TensorValue) for name, value in state.items()
    ):
        _bad(path, "model must be a state dict: names and tensors")
    tensors = {name.removeprefix("module."): value.tensor() for name, value in state.items()}
    if len(tensors) != len(state):
        _bad(path, "model names tensors twice, with and without module.")
    return tensors


def _numbers(path: Path, value: Any, name: str) -> np.ndarray:
    if isinstance(value, TensorValue):
        value = value.tensor().numpy() if value.storage.dtype != torch.bfloat16 else None
    elif isinstance(value, ArrayValue):
        value = value.array
    elif isinstance(value, list) and all(isinstance(item, (int, float)) for item in value):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype == object:
        _bad(path, f"{name} must be a one-dimensional array of numbers")
    return value


def _whole(path: Path, value: Any, name: str) -> int:
    if isinstance(value, TensorValue):
        value = value.tensor().numpy() if value.storage.dtype != torch.bfloat16 else None
    elif isinstance(value, ArrayValue):
        value = value.array
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 62:
        _bad(path, f"{name} must be a whole number, got {type(value).__name__}")
    return value


def _triple(path: Path, value: Any) -> tuple[int, int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        _bad(path, "img_size must be (H, W, C)")
    height, width, channels = (_whole(path, item, "img_size") for item in value)
    if min(height, width) < 1 or channels not in (1, 3):
        _bad(path, f"img_size must be (H, W, C) with 1 or 3 channels, got {(height, width, channels)}")
    return height, width, channels


def _text(path: Path, value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or len(value) > 200:
        _bad(path, f"{name} must be a short text, got {type(value).__name__}")
    return value


def _bad(path: Path, what: str) -> NoReturn:
    raise CorruptArtifactError(f"{path} is no complete BackdoorBench result: {what}")
