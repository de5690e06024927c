"""Which convolution feeds which BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["by_dataflow", "by_registration"]


def by_registration(model: nn.Module, norms: Sequence[str]) -> dict[str, str]:
    """For each norm layer the convolution registered last before it, as BackdoorBench pairs them.

    Where a pre-activation block has a shortcut convolution, which is registered last, that one is taken for the next
    block's first norm layer, and not the block's main path.

    Args:
        model: The model.
        norms: Names of the norm layers.

    Returns:
        Norm layer to convolution, of those that have as many channels as the layer.
    """
    pairs, last = {}, ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif name in norms and last:
            pairs[name] = last
    return _fitting(model, pairs)


def by_dataflow(model: nn.Module, norms: Sequence[str], image_size: tuple[int, int, int]) -> dict[str, str]:
    """For each norm layer the convolution whose output reaches it; where several do, the one that ran last.

    An output reaches the layer if no other convolution, norm or linear layer lies between: through activations,
    poolings and residual sums. Read from the graph that autograd builds for one blank image in eval mode; names and
    the order of registration play no part.

    Args:
        model: The model, in eval mode.
        norms: Names of the norm layers.
        image_size: ``(C, H, W)``.

    Returns:
        Norm layer to convolution, of those that have as many channels as the layer.
    """
    made: dict[Any, tuple[int, str]] = {}
    pairs: dict[str, str] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = _sources(inputs[0].grad_fn, made)
            if found:
                pairs[name] = max(found)[1]

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # What is not a convolution ends the search too, with a name that is none.
            made[output.grad_fn] = (len(made), name if isinstance(module, nn.Conv2d) else "")

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name in norms:
            hooks.append(module.register_forward_pre_hook(before(name)))
        if name in norms or isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(after(name)))
    device = next(model.parameters()).device
    try:
        with torch.enable_grad():
            model(torch.zeros(1, *image_size, device=device, requires_grad=True))
    finally:
        for hook in hooks:
            hook.remove()
    return _fitting(model, pairs)


def _sources(node: Any, made: dict[Any, tuple[int, str]]) -> list[tuple[int, str]]:
    """The convolutions reached by walking back from ``node``, each path up to the first layer that is known."""
    found, seen, stack = [], set(), [node]
    while stack:
        here = stack.pop()
        if here is None or here in seen:
            continue
        seen.add(here)
        if here in made:
            found += [made[here]] if made[here][1] else []
        else:
            stack += [following for following, _ in here.next_functions]
    return found


def _fitting(model: nn.Module, pairs: dict[str, str]) -> dict[str, str]:
    def channels(name: str) -> int:
        return model.get_parameter(f"{name}.weight").shape[0]

    return {norm: conv for norm, conv in pairs.items() if channels(norm) == channels(conv)}
