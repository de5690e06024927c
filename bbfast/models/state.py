"""A model's tensors out and in, with errors that say which tensor does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["load_state", "model_state"]

_SHOWN = 5


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: contiguous copies on the CPU that share no memory with the model."""
    return {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in model.state_dict().items()
    }


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of :func:`model_state` into ``model``, all of them or none.

    Args:
        model: A model with the same layers; keeps its device.
        tensors: Every parameter and buffer by name.

    Raises:
        ValueError: naming the tensors that are missing, unexpected, or of another shape or kind.
    """
    own = model.state_dict()
    problems = [
        *_listed("missing", sorted(set(own) - set(tensors))),
        *_listed("unexpected", sorted(set(tensors) - set(own))),
        *_listed("of another shape", [_shapes(k, own[k], tensors[k]) for k in own if _misshapen(k, own, tensors)]),
        *_listed("of another kind", [_kinds(k, own[k], tensors[k]) for k in own if _unlike(k, own, tensors)]),
    ]
    if problems:
        spec = getattr(model, "bbfast_spec", None)
        name = spec.name if spec is not None else type(model).__name__
        raise ValueError(f"tensors must be the state of a {name}: {'; '.join(problems)}")
    model.load_state_dict(dict(tensors))


def _misshapen(key: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    return key in given and own[key].shape != given[key].shape


def _unlike(key: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    return key in given and own[key].is_floating_point() != given[key].is_floating_point()


def _shapes(key: str, own: Tensor, given: Tensor) -> str:
    return f"{key} (expected {list(own.shape)}, got {list(given.shape)})"


def _kinds(key: str, own: Tensor, given: Tensor) -> str:
    return f"{key} (expected {own.dtype}, got {given.dtype})"


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]
