"""Gradients of a logit by the activations of many layers, from one backward pass, averaged over space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError
from bbfast.models import roles
from bbfast.training.prediction import evaluating

__all__ = ["gradient_layers", "layer_gradients"]


def gradient_layers(view: DefenderView) -> list[str]:
    """Names of the layers whose gradients are taken, early to late.

    Depthwise convolutions where there are any (ConvNeXt); else the convolutions wider than 1x1, without the stem where
    the stages hold them (ResNets: the blocks' ``conv1`` and ``conv2``; VGG: all); else the blocks (ViT).

    Raises:
        UnsupportedModelError: if the model has neither.
    """
    found = roles(view.model)
    wide = {n: m for n, m in found.model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1}
    depthwise = [name for name, m in wide.items() if m.groups == m.in_channels > 1]
    stages = [name for i in range(1, 6) if found.has(f"stage{i}") for name in found.names(f"stage{i}")]
    inside = [name for name in wide if any(name.startswith(f"{stage}.") for stage in stages)]
    if depthwise or inside:
        return depthwise or inside
    last = found.model.get_submodule(stages[-1]) if stages else nn.Identity()
    if any(True for _ in last.parameters()):  # a block; a stage of VGG is named by its pooling
        return [name for name, m in found.model.named_modules() if type(m) is type(last)]
    if not wide:
        reason = "it has neither convolutions wider than 1x1 nor stages of blocks"
        raise UnsupportedModelError(view.method, found.label, reason)
    return list(wide)


def layer_gradients(
    view: DefenderView, images: Tensor, labels: Tensor, order: Tensor, layers: list[str], batch_size: int
) -> tuple[list[Tensor], Tensor]:
    """``d z_y / d output`` of each layer, averaged over positions; one forward and one backward pass.

    Full gradients live for one batch and one layer at a time; no parameter gets one.

    Args:
        view: Grants the model.
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``, whose logits are taken.
        order: int64 ``[n]``, the images to take, in this order.
        layers: Names of modules with outputs ``[B, C, H, W]`` or ``[B, T, C]``.
        batch_size: Images in a pass.

    Returns:
        float32 ``[n, C]`` for each layer, and the predicted classes int64 ``[n]``, in the order of ``order``.

    Raises:
        UnsupportedModelError: if the forward pass leaves a layer out or a gradient is NaN or infinite.
    """
    model = view.model
    label = roles(model).label
    parts: list[list[Tensor]] = [[] for _ in layers]
    predicted, now = [], dict[int, Tensor]()

    def watch(number: int) -> Any:
        def on_gradient(gradient: Tensor) -> None:
            now[number] = gradient.flatten(2).mean(dim=2) if gradient.dim() == 4 else gradient.mean(dim=1)

        def on_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(on_gradient)

        return on_output

    modules = dict(roles(model).model.named_modules())
    handles = [modules[name].register_forward_hook(watch(number)) for number, name in enumerate(layers)]
    try:
        for index in order.split(batch_size):
            now.clear()
            x = ops.gather_augment(images, index, mean=view.mean, std=view.std).requires_grad_()
            with evaluating(model), torch.enable_grad():
                logits = model(x)
                own = logits.gather(1, labels[index, None]).sum()
                torch.autograd.grad(own, x)  # for the hooks on the way
            if len(now) != len(layers):
                missing = next(name for number, name in enumerate(layers) if number not in now)
                raise UnsupportedModelError(view.method, label, f"its logits do not depend on layer {missing!r}")
            for number, gradient in now.items():
                parts[number].append(gradient.float())
            predicted.append(logits.detach().argmax(dim=1))
    finally:
        for handle in handles:
            handle.remove()
    gradients = [torch.cat(part) for part in parts]
    broken = sum((~g.isfinite().all(dim=1)).long() for g in gradients)
    if isinstance(broken, Tensor) and bool(broken.any()):
        reason = f"its gradients are NaN or infinite on {int((broken > 0).sum())} of {len(broken)} images"
        raise UnsupportedModelError(view.method, label, reason, "its training diverged")
    return gradients, torch.cat(predicted)
