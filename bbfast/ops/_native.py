"""Loads the compiled kernels, once, and knows which devices they serve. Never touches the CUDA driver."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from pathlib import Path

import torch

__all__ = ["Status", "has", "status", "usable"]


@dataclasses.dataclass(frozen=True)
class Status:
    """Which compiled kernels are in use.

    Attributes:
        cpu: Whether CPU tensors run compiled kernels.
        cuda: Whether CUDA tensors do.
        kernels: Names of the compiled operators.
        reason: Why a kind of kernel is not in use; empty if all are.
    """

    cpu: bool
    cuda: bool
    kernels: frozenset[str]
    reason: str


def _load() -> Status:
    try:
        core = importlib.import_module("bbfast._C")
    except ImportError as error:
        reason = f"bbfast._C could not be loaded ({error})"
        warnings.warn(
            f"{reason}; bbfast.ops runs the slower pure PyTorch reference. Rebuild with 'pip install .' beside the "
            "installed torch; 'bbfast doctor' shows the state.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Status(False, False, frozenset(), reason)
    kernels = frozenset(core.kernels())
    if torch.version.cuda is None:
        return Status(True, False, kernels, "this torch has no CUDA")
    built = core.build_info()["cuda"]
    library = Path(str(core.__file__)).with_name("_C_cuda.so")
    if built is None or not library.exists():
        return Status(
            True, False, kernels, "bbfast was built without nvcc; CUDA tensors run the pure PyTorch reference"
        )
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return Status(True, False, kernels, f"built for CUDA {built}, but torch has CUDA {torch.version.cuda}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return Status(True, False, kernels, f"{library.name} could not be loaded ({error})")
    return Status(True, True, kernels, "")


_STATUS = _load()


def status() -> Status:
    """Which compiled kernels are in use."""
    return _STATUS


def has(op: str) -> bool:
    """Whether the compiled module holds the operator ``op``, so that its fake kernel and gradient can be registered."""
    return op in _STATUS.kernels


def usable(op: str, tensor: torch.Tensor) -> bool:
    """Whether a compiled kernel of ``op`` serves the device of ``tensor``; elsewhere the reference runs."""
    kind = tensor.device.type
    return op in _STATUS.kernels and (kind in ("cpu", "meta") or (kind == "cuda" and _STATUS.cuda))
