"""From an AttackResult to the reference's folder."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbfast import _atomic
from bbfast._hashing import to_json
from bbfast.artifact import explained
from bbfast.attacks import AttackResult, Role
from bbfast.errors import ArtifactError
from bbfast.interop import _layout as layout
from bbfast.interop import _write as write
from bbfast.interop._record import BBFAST
from bbfast.models.state import model_state

__all__ = ["save_attack_result"]

_MODES = {"all2one": "all2one", "all2all": "all2all", "clean_label": "all2one", "one2one": "all2one"}
_NO_TRAIN = ("blind", "lira")
"""Attacks that poison the loss: the reference stores no training set of theirs."""

_log = logging.getLogger(__name__)


def save_attack_result(
    result: AttackResult,
    path: str | Path,
    *,
    clean_data: str | None = None,
    data_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a result as BackdoorBench writes one: the folder is there whole or not at all.

    BackdoorBench opens results below a folder named ``record`` of its own only; if ``path`` has such a part, the paths
    in the file begin with it, as BackdoorBench's own do, and the folder may move along with it. Otherwise they are
    absolute.

    Args:
        result: The result. Indices are positions in ``result.train`` and ``result.test``, which must be the whole data
            set in its order.
        path: The folder, or ``attack_result.pt`` in it.
        clean_data: BackdoorBench's name of the data set; None takes that of ``result``.
        data_path: Where BackdoorBench finds the data set, a path with ``data`` in it; None is ``./data/<clean_data>``.
        overwrite: Replace a result that is there; a folder that holds anything else is never replaced.

    Returns:
        The folder.

    Raises:
        ArtifactError: if something stands there already, or the disk is full or read-only; nothing is left.
        TypeError: if ``result`` is no AttackResult.
        ValueError: if ``data_path`` lacks ``data``, images have neither 1 nor 3 channels, or triggered test images are
            not those of ``result.test``.
    """
    if not isinstance(result, AttackResult):
        raise TypeError(f"result must be an AttackResult, got {type(result).__name__}")
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == layout.RESULT else folder
    name = str(result.config["data"]["name"])
    clean_data = layout.DATASETS.get(name, name) if clean_data is None else clean_data
    data_path = f"./data/{clean_data}" if data_path is None else data_path
    if "data" not in data_path:
        raise ValueError(f"data_path must have 'data' in it, which BackdoorBench looks for, got {data_path!r}")
    channels, height, width = result.test.image_size
    if channels not in (1, 3):
        raise ValueError(f"result must have images of 1 or 3 channels, as PNG files have, got {channels}")
    positions = _positions(result)
    _check_place(folder, overwrite)
    place = _place(folder)
    with_train = result.config["attack"] not in _NO_TRAIN and bool((result.role != int(Role.CLEAN)).any())
    head = {
        "model_name": str(result.config["model"]["name"]),
        "num_classes": result.num_classes,
        "data_path": data_path,
        "img_size": (height, width, channels),
        "clean_data": clean_data,
    }
    with explained(folder), _atomic.new_folder(folder, replace=overwrite) as temp:
        train = _write_train(result, temp, place) if with_train else None
        test = _write_test(result, positions, temp, place)
        content = head | {"model": OrderedDict(model_state(result.model)), "bd_train": train, "bd_test": test}
        write.write_torch_file(temp / layout.RESULT, content)
        write.write_torch_file(temp / layout.INFO, _options(result, head, place))
        if train is not None:
            write.write_torch_file(temp / layout.POISON_INDEX, train["poison_indicator"])
        write.write_tables(temp, result.history, result.metrics)
        # One flush of everything: one for each of ten thousand pictures would take minutes.
        os.sync()
    return folder


def _write_train(result: AttackResult, temp: Path, place: str) -> dict[str, Any]:
    changed = (result.role != int(Role.CLEAN)).cpu().nonzero().flatten()
    index, original = changed.tolist(), result.original_labels.cpu()[changed].tolist()
    given = result.train.labels.cpu()[changed].tolist()
    write.write_pictures(temp / layout.TRAIN_FOLDER, result.train.images.cpu()[changed], index, original)
    total = len(result.train)
    where = f"{place}/{layout.TRAIN_FOLDER}"
    return write.part_state(where, total, torch.arange(total), index, given, original, result.role.cpu())


def _write_test(result: AttackResult, positions: Tensor, temp: Path, place: str) -> dict[str, Any]:
    bad = result.backdoor_test
    index, original = positions.tolist(), bad.original_labels.tolist()
    write.write_pictures(temp / layout.TEST_FOLDER, bad.images.cpu(), index, original)
    where = f"{place}/{layout.TEST_FOLDER}"
    return write.part_state(where, len(result.test), positions, index, bad.labels.tolist(), original)


def _positions(result: AttackResult) -> Tensor:
    """Positions of the triggered images in the clean test set."""
    ids, wanted = result.test.ids.cpu(), result.backdoor_test.ids.cpu()
    order = ids.argsort()
    at = torch.searchsorted(ids[order], wanted).clamp(max=max(len(ids) - 1, 0))
    positions = order[at] if len(ids) else at
    truth = result.test.labels.cpu()[positions] if len(ids) else positions
    if len(wanted) and (not len(ids) or not torch.equal(ids[positions], wanted) or len(wanted.unique()) < len(wanted)):
        raise ValueError("result.backdoor_test must hold images of result.test, each at most once, going by their ids")
    if not torch.equal(truth, result.backdoor_test.original_labels.cpu()):
        raise ValueError("result.backdoor_test must have the true labels of the images of result.test with its ids")
    return positions


def _place(folder: Path) -> str:
    """The folder as the reference shall find it."""
    absolute = folder.absolute()
    if "record" not in absolute.parts:
        _log.warning("BackdoorBench opens results below a folder named 'record' only; %s is not", absolute)
        return absolute.as_posix()
    return Path(*absolute.parts[absolute.parts.index("record") :]).as_posix()


def _check_place(folder: Path, overwrite: bool) -> None:
    with explained(folder):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"cannot write {folder}: it is a file; choose another folder")
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(names - set(layout.FILES))
    if foreign:
        # A reference's folder keeps its defenses' results in it.
        raise ArtifactError(
            f"cannot write {folder}: it holds other files ({', '.join(foreign[:3])}), which would be lost; choose "
            "another folder"
        )
    if names and not overwrite:
        raise ArtifactError(
            f"cannot write {folder}: a result is there already; remove it, choose another folder or overwrite it"
        )


def _options(result: AttackResult, head: dict[str, Any], place: str) -> dict[str, Any]:
    """The reference's options as far as they are known, and ours whole."""
    config, settings = result.config, result.config["attack_config"]
    recipe = config.get("recipe") or {}
    label_mode = settings.get("label_mode")
    options = {
        "attack": layout.ATTACKS.get(config["attack"], config["attack"]),
        "attack_target": settings.get("target"),
        "attack_label_trans": _MODES.get(label_mode, label_mode),
        "pratio": settings.get("ratio"),
        "random_seed": config.get("seed"),
        "dataset": head["clean_data"],
        "dataset_path": head["data_path"],
        "model": head["model_name"],
        "num_classes": head["num_classes"],
        "img_size": head["img_size"],
        "epochs": recipe.get("epochs"),
        "batch_size": recipe.get("batch_size"),
        "lr": recipe.get("lr"),
        "wd": recipe.get("weight_decay"),
        "save_path": place,
        BBFAST: {key: config.get(key) for key in ("attack", "attack_config", "recipe")},
    }
    return {key: to_json(value) for key, value in options.items()}
