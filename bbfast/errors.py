"""Errors of bbfast.

Bad arguments raise the built-in ``ValueError``, ``TypeError`` and ``IndexError``; the classes here are for state: an
unknown name, a damaged artefact, a model that lacks what a method needs. All derive from :class:`BBFastError`, so a
caller (the command line is one) can tell a foreseen failure from a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AccessDeniedError",
    "ArtifactError",
    "BBFastError",
    "ConfigError",
    "CorruptArtifactError",
    "DataRequirementError",
    "DatasetError",
    "DetectionError",
    "DivergedError",
    "MissingExtraError",
    "NewerFormatError",
    "UnknownNameError",
    "UnsafeFileError",
    "UnsupportedModelError",
    "nearest",
]


class BBFastError(Exception):
    """Base class of every foreseen failure that is not a bad argument."""


class UnknownNameError(BBFastError, LookupError):
    """No method, model, data set or layer role of that name; the message lists the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = nearest(name, known)
        hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"known: {', '.join(known) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")
        self.kind, self.name, self.known = kind, name, known

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as their message alone; a worker process must be able to hand this one back.
        return type(self), (self.kind, self.name, self.known)


class ConfigError(BBFastError, ValueError):
    """A setting is unknown, has the wrong type or is out of range."""


class DatasetError(BBFastError):
    """A data set's files are missing or damaged; the message says which file and how to get it."""


class MissingExtraError(BBFastError):
    """An optional package is not installed; the message says what to install."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'bbfast[{extra}]'")
        self.what, self.package, self.extra = what, package, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.package, self.extra)


class DivergedError(BBFastError):
    """A training's loss is no longer finite.

    Args:
        what: What stopped being finite, and at which step.
        remedy: What to do about it.
        last_good: From :func:`bbfast.train`, directly or through a defense: the state dict of the network in training,
            on its device, as it was after the last epoch with a finite loss and finite weights, or before the first.
            None if there were no finite ones, and from loops of a method's own (masks, triggers). It does not travel
            between processes.
    """

    def __init__(self, what: str, remedy: str = "", last_good: dict[str, Tensor] | None = None) -> None:
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what, self.remedy, self.last_good = what, remedy, last_good

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.remedy)


class ArtifactError(BBFastError):
    """A result folder cannot be read or written."""


class CorruptArtifactError(ArtifactError):
    """A file of a result folder is missing, truncated or does not match its recorded checksum."""


class NewerFormatError(ArtifactError):
    """A result folder was written by a newer bbfast than this one."""


class UnsafeFileError(ArtifactError):
    """A file of somebody else's asks for code to be run; it was not."""


class UnsupportedModelError(BBFastError):
    """A method cannot work on this model; raised before any work is done."""

    def __init__(self, method: str, model: str, reason: str, hint: str = "") -> None:
        super().__init__(f"{method} cannot work on {model}: {reason}" + (f" ({hint})" if hint else ""))
        self.method, self.model, self.reason, self.hint = method, model, reason, hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.method, self.model, self.reason, self.hint)


class DataRequirementError(BBFastError):
    """A method needs data that the run does not provide, or more of it than there is."""


class AccessDeniedError(BBFastError):
    """A defense asked its view for something that its threat model does not grant."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` names of ``known`` closest to ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)


class DetectionError(BBFastError):
    """Some of several detectors failed; what the others found is in ``results``.

    Args:
        results: Name to result of those that ran.
        failures: Name to exception of those that did not.
    """

    def __init__(self, results: dict[str, Any], failures: dict[str, Exception]) -> None:
        said = "; ".join(f"{name}: {error}" for name, error in failures.items())
        super().__init__(f"{len(failures)} of {len(results) + len(failures)} detectors failed: {said}")
        self.results, self.failures = results, failures

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.results, self.failures)
