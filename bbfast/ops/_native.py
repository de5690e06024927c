"""Loads the compiled kernels, once, and knows which devices they serve. Never touches the CUDA driver."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbfast.ops._func import gradient_beyond_backward

__all__ = ["Status", "register", "status", "usable"]


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


_DIFFERENTIABLE: set[str] = set()


def register(
    op: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Gives the compiled operator ``op`` its fake kernel, its gradient if it has one, and its rule for
    ``torch.func.vmap``; does nothing where no kernel was compiled."""
    if op not in _STATUS.kernels:
        return
    name = f"bbfast::{op}"
    torch.library.register_fake(name, fake)
    torch.library.register_vmap(name, _slice_by_slice(op))
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        _DIFFERENTIABLE.add(op)


def _slice_by_slice(op: str) -> Callable[..., Any]:
    """The rule for ``torch.func.vmap``: a call for each slice, the results stacked. The operators take batches
    themselves, so a loop inside them is all that there is to gain. (torch would loop too, but warns of it, and refuses
    an empty dimension.)"""
    operator = getattr(torch.ops.bbfast, op)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def call(take: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
            given = (take(a, d) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True))
            result = operator(*given)
            return (result,) if isinstance(result, Tensor) else tuple(result)

        if info.batch_size:
            slices = [call(lambda a, d, i=i: a.select(d, i)) for i in range(info.batch_size)]  # type: ignore[misc]
            stacked = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        else:
            one = call(lambda a, d: a.new_zeros((*a.shape[:d], *a.shape[d + 1 :])))
            stacked = tuple(part.new_empty((0, *part.shape)) for part in one)
        return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)

    return rule


def usable(op: str, tensor: Tensor) -> bool:
    """Whether a compiled kernel of ``op`` serves the device of ``tensor``; elsewhere the reference runs, and so it does
    where a gradient is wanted that a registered operator cannot give."""
    kind = tensor.device.type
    served = op in _STATUS.kernels and (kind in ("cpu", "meta") or (kind == "cuda" and _STATUS.cuda))
    return served and not (op in _DIFFERENTIABLE and gradient_beyond_backward())
