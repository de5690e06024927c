"""From the reference's folder to an AttackResult."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbfast import attacks, datasets, models
from bbfast._hashing import sha256_file, to_json
from bbfast._record import versions
from bbfast.attacks import AttackResult, Role
from bbfast.attacks.run import data_record
from bbfast.data import BackdoorSet, DataPair, ImageSet
from bbfast.errors import ArtifactError, BBFastError, DataRequirementError, UnknownNameError
from bbfast.evaluation import evaluate
from bbfast.interop import _layout as layout
from bbfast.interop import _record as record
from bbfast.models.state import load_state

__all__ = ["load_attack_result"]

_TOLERANCE = 0.02
"""Largest difference of an accuracy between our measurement and the one stored: other kernels move a few samples."""

_log = logging.getLogger(__name__)


def load_attack_result(
    path: str | Path,
    data: DataPair | None = None,
    dataset_root: str | Path | None = None,
    *,
    attack: str | None = None,
    model: nn.Module | None = None,
    measure: bool = True,
    device: torch.device | str = "auto",
) -> AttackResult:
    """Read a result of BackdoorBench; nothing in it is executed.

    The folder holds the poisoned images only, so the clean data set is needed, with its images in BackdoorBench's order
    (that of :func:`bbfast.datasets.load`). Paths in the file are taken by their last three parts, below its folder.

    Args:
        path: ``attack_result.pt``, or its folder.
        data: The clean data; None loads the data set that the file names from ``dataset_root``.
        dataset_root: Where that data set lies, as for :func:`bbfast.datasets.load`.
        attack: Name of the attack; None takes the one in ``info.pickle``. It is only recorded.
        model: A module to load the weights into, for an architecture that :func:`bbfast.models.build` does not know.
        measure: Measure C-Acc, ASR and R-Acc; if they differ from those in ``attack_df.csv``, the log says so. False
            leaves ``metrics`` without them.
        device: Where to measure.

    Returns:
        The result, on the CPU. What the folder does not say is None or empty: ``config["recipe"]``, ``config["seed"]``,
        ``trigger_state``; ``config["imported"]["absent"]`` names it. Without a poisoned training set in the file
        ``train`` is the clean one, and defenses that ask for a poisoned one are not applicable.

    Raises:
        UnsafeFileError: if the file asks for anything but plain values, tensors, arrays and pictures.
        CorruptArtifactError: if it is damaged or malformed, or a picture is missing or has another size.
        ArtifactError: if there is no file, or its model is none that bbfast can build.
        DataRequirementError: if the clean data is missing, or is not what the result was made of.
        UnknownNameError: if ``attack`` is no known attack.
    """
    attack = None if attack is None else str(attacks.info(attack)["name"])
    path = Path(path).expanduser()
    path = path / layout.RESULT if path.is_dir() else path
    found = layout.read_contents(path)
    data = _matching(found, _clean_data(found, data, dataset_root))
    built = _model(found, model)
    parts = {"train": found.train, "test": found.test}
    pictures = {k: layout.read_pictures(part, found.image_size) for k, part in parts.items() if part is not None}
    options = record.read_options(path.parent)
    labels = record.label_settings(found.train, found.test, data.test.labels, found.num_classes)

    images, given = data.train.images.cpu(), data.train.labels.cpu()
    truth, role = given, torch.zeros(len(given), dtype=torch.int8)
    if found.train is not None:
        images, given = images.clone(), given.clone()
        images[found.train.index], given[found.train.index] = pictures["train"], found.train.given
        role = _roles(found.train, None if labels["label_mode"] == "all2all" else int(labels["target"]))
    poisoned = role == int(Role.POISON)
    ratio = float(poisoned.double().mean()) if len(poisoned) else 0.0
    name, settings = record.attack_settings(attack, options, labels, ratio)
    norm: dict[str, Any] = {"mean": data.mean, "std": data.std}
    result = AttackResult(
        model=built.eval(),
        train=ImageSet(images, given, ids=data.train.ids.cpu(), **norm),
        poisoned=poisoned,
        original_labels=truth,
        role=role,
        clean_images=data.train.images.cpu()[role != int(Role.CLEAN)],
        test=data.test.to("cpu"),
        backdoor_test=BackdoorSet(
            pictures["test"],
            found.test.given,
            ids=data.test.ids.cpu()[found.test.index],
            original_labels=found.test.original,
            **norm,
        ),
        metrics={"seconds": float("nan"), "seconds_per_epoch": float("nan")},
        config=_config(found, data, built, options, name, settings),
        history=record.read_history(path.parent),
    )
    if found.train is not None:
        result.metrics["poison_ratio"] = ratio
    if measure:
        result.metrics |= evaluate(result.model, result.test, result.backdoor_test, device=device)
        _compare(result, path)
    return result


def _clean_data(found: layout.Contents, data: DataPair | None, root: str | Path | None) -> DataPair:
    if data is not None:
        if not isinstance(data, DataPair):
            raise TypeError(f"data must be a DataPair, from bbfast.datasets.load, got {type(data).__name__}")
        return data
    try:
        return datasets.load(found.clean_data, root)
    except BBFastError as error:
        raise DataRequirementError(
            f"{found.path} holds the poisoned images only; the clean {found.clean_data!r} is needed: pass data=, or "
            f"dataset_root=, the folder of that data set ({error})"
        ) from error


def _matching(found: layout.Contents, data: DataPair) -> DataPair:
    problems = []
    if data.num_classes != found.num_classes:
        problems.append(f"{found.num_classes} classes, got {data.num_classes}")
    if data.train.image_size != found.image_size:
        problems.append(f"images of (C, H, W) = {found.image_size}, got {data.train.image_size}")
    for name, part, clean in (("training", found.train, data.train), ("test", found.test, data.test)):
        if part is None:
            continue
        if part.total != len(clean):
            problems.append(f"{part.total} {name} images, got {len(clean)}")
        elif not torch.equal(clean.labels.cpu()[part.index], part.original):
            at = int((clean.labels.cpu()[part.index] != part.original).nonzero()[0])
            i, label, came = int(part.index[at]), int(part.original[at]), int(clean.labels[part.index[at]])
            problems.append(f"label {label} at {name} image {i}, got {came} (another data set, or another order)")
    if problems:
        raise DataRequirementError(
            f"the clean data {data.name!r} is not the {found.clean_data!r} of {found.path}: expected "
            f"{'; expected '.join(problems)}; pass the same data set in BackdoorBench's order"
        )
    if found.train is not None and not torch.equal(found.train.shown, torch.arange(len(data.train))):
        raise DataRequirementError(
            f"{found.path}: bd_train must show the whole training set in its order, got {len(found.train.shown)} of it"
        )
    if len(found.test.index) < len(found.test.shown):
        left = len(found.test.shown) - len(found.test.index)
        _log.warning("%s: %d test images of bd_test carry no trigger and are left out", found.path, left)
    return data


def _roles(part: layout.Part, target: int | None) -> Tensor:
    """The stored roles; else poison, or cross where a sample keeps a label that is not the target."""
    if part.role is not None:
        return part.role
    role = torch.zeros(part.total, dtype=torch.int8)
    kept = part.given == part.original
    cross = kept if target is None else kept & (part.original != target)
    role[part.index] = torch.where(cross, int(Role.CROSS), int(Role.POISON)).to(torch.int8)
    return role


def _model(found: layout.Contents, model: nn.Module | None) -> nn.Module:
    channels, *size = found.image_size
    if model is None:
        try:
            with torch.random.fork_rng(devices=[]):
                model = models.build(found.model_name, found.num_classes, size, in_channels=channels)
        except UnknownNameError as error:
            raise ArtifactError(f"{found.path}: {error}; pass a module of that architecture: model=...") from error
        except ValueError as error:
            raise ArtifactError(f"{found.path}: its model cannot be built: {error}") from error
    state, own = found.state, model.state_dict()
    same_shapes = [v.shape for v in state.values()] == [v.shape for v in own.values()]
    if state.keys() != own.keys() and same_shapes:
        # As the reference's loader does: names differ between versions, the order does not.
        _log.info("%s: %d tensors are taken by their position", found.path, len(state.keys() - own.keys()))
        state = dict(zip(own, state.values(), strict=True))
    try:
        load_state(model, state)
    except ValueError as error:
        raise ArtifactError(f"{found.path}: its model is no {found.model_name} as bbfast builds it: {error}") from error
    return model


def _config(
    found: layout.Contents,
    data: DataPair,
    model: nn.Module,
    options: dict[str, Any],
    attack: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    spec = getattr(model, "bbfast_spec", None)
    recipe, seed = record.stored_recipe(options), options.get("random_seed")
    seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    absent = [key for key, value in (("recipe", recipe), ("seed", seed)) if value is None] + ["trigger"]
    return {
        "attack": attack,
        "attack_config": settings,
        "attack_files": {},
        "model": {"name": found.model_name} if spec is None else spec.to_dict(),
        "recipe": recipe,
        "data": data_record(data),
        "seed": seed,
        "versions": versions(),
        "imported": {
            "from": "BackdoorBench",
            "sha256": sha256_file(found.path),
            "clean_data": found.clean_data,
            "options": to_json({key: value for key, value in options.items() if key != record.BBFAST}),
            "poisoned_train": found.train is not None,
            "absent": absent + ([] if found.train is not None else ["poisoned_train"]),
        },
    }


def _compare(result: AttackResult, path: Path) -> None:
    stored = result.history[-1] if result.history else {}
    for key in ("c_acc", "asr", "r_acc"):
        # "not" also catches NaN, which there is without triggered images.
        if key in stored and not abs(result.metrics[key] - stored[key]) <= _TOLERANCE:
            _log.warning(
                "%s: %s is %.4f here and %.4f in %s; is the clean data the same, and normalised alike?",
                path,
                key,
                result.metrics[key],
                stored[key],
                layout.TABLE,
            )
