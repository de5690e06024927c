"""The error classes: one base, useful messages, and they survive a process boundary."""

from __future__ import annotations

import pickle

import pytest

from bbfast import errors
from bbfast.errors import BBFastError, UnknownNameError, UnsupportedModelError, nearest

CLASSES = [getattr(errors, name) for name in errors.__all__ if name != "nearest"]

OWN = (UnknownNameError, UnsupportedModelError, errors.DetectionError, errors.MissingExtraError)
"""Those that are made of more than a message."""


@pytest.mark.parametrize("cls", CLASSES)
def test_one_base_class(cls: type[Exception]) -> None:
    assert issubclass(cls, BBFastError)


def test_kinds_that_builtin_handlers_catch() -> None:
    assert issubclass(UnknownNameError, LookupError) and issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.CorruptArtifactError, errors.ArtifactError)
    assert issubclass(errors.NewerFormatError, errors.ArtifactError)


def test_unknown_name_suggests_the_nearest() -> None:
    error = UnknownNameError("attack", "badnet5", ["wanet", "badnets", "blended"])
    assert str(error) == "unknown attack 'badnet5'; did you mean 'badnets', 'wanet'?"
    assert (error.kind, error.name, error.known) == ("attack", "badnet5", ["badnets", "blended", "wanet"])


def test_unknown_name_without_a_near_one_lists_all() -> None:
    assert str(UnknownNameError("attack", "zzz", ["b", "a"])) == "unknown attack 'zzz'; known: a, b"
    assert str(UnknownNameError("attack", "zzz", [])) == "unknown attack 'zzz'; known: none"


def test_unsupported_model() -> None:
    error = UnsupportedModelError("bnp", "vit_b_16", "it has no BatchNorm2d layer")
    assert str(error) == "bnp cannot work on vit_b_16: it has no BatchNorm2d layer"
    hinted = UnsupportedModelError("bnp", "vit_b_16", "it has no BatchNorm2d layer", "use ft")
    assert str(hinted).endswith("BatchNorm2d layer (use ft)") and hinted.hint == "use ft"


@pytest.mark.parametrize(
    "error",
    [
        UnknownNameError("attack", "badnet5", ["badnets"]),
        UnsupportedModelError("bnp", "vit_b_16", "no BatchNorm2d", "use ft"),
        errors.DetectionError({"ac": "a result"}, {}),
        errors.MissingExtraError("umap", "umap-learn", "analysis"),
        *(cls("what happened") for cls in CLASSES if cls not in OWN),
    ],
)
def test_survive_a_process_boundary(error: BBFastError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_nearest() -> None:
    assert nearest("ratoi", ["ratio", "target", "rate"]) == ["ratio", "rate"]
    assert nearest("ratio", ["ratio", "ratios", "ration", "ratio2"], n=2) == ["ratio", "ratios"]
    assert nearest("x", []) == [] == nearest("qqq", ["ratio"])
