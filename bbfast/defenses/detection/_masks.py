"""Cognitive masks: the pixels that a prediction needs, distilled for many images at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbfast._progress import Bar
from bbfast.defenses._content import content_keys, mix64
from bbfast.defenses.features import normalised
from bbfast.training.device import Numerics

__all__ = ["distill", "mask_gradient", "random_colours"]

_BETAS = (0.1, 0.1)
_EPS = 1e-8


def distill(
    model: nn.Module,
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    gamma: float,
    beta: float,
    lr: float,
    steps: int,
    seed: int,
    batch_size: int,
    numerics: Numerics,
    progress: Bar | None = None,
) -> Tensor:
    """L1 norm of each image's mask after ``steps`` steps of Adam; see :class:`bbfast.defenses.detection.cd.CD`.

    Images do not touch one another: the losses are summed, not averaged, so the batch has no say in the result beyond
    the network's rounding, and the colours come from the images' pixels.

    Args:
        model: Normalised images to logits; in eval mode, without gradients of its weights.
        images: uint8 ``[N, C, H, W]``.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        gamma: Weight of the mask's L1 norm.
        beta: Weight of its total variation.
        lr: Adam's learning rate.
        steps: Steps.
        seed: Seed of the colours.
        batch_size: Images in a forward pass.
        numerics: Number format and layout of the network; masks are float32.
        progress: Told of every image done.

    Returns:
        float32 ``[N]`` on the images' device, 0..H W; NaN where the network gave NaN.
    """
    keys = content_keys(images)
    norms = []
    for start in range(0, images.shape[0], batch_size):
        x = normalised(images, start, batch_size, mean, std, numerics.channels_last)
        norms.append(
            _distill(model, x, keys[start : start + batch_size], mean, std, gamma, beta, lr, steps, seed, numerics)
        )
        if progress is not None:
            progress.advance(len(x))
    return torch.cat(norms) if norms else torch.zeros(0, device=images.device)


def _distill(
    model: nn.Module,
    x: Tensor,
    keys: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    gamma: float,
    beta: float,
    lr: float,
    steps: int,
    seed: int,
    numerics: Numerics,
) -> Tensor:
    n, channels, height, width = x.shape
    shift, scale = (x.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    with torch.no_grad(), numerics.autocast(x.device):
        wanted = model(x).float()
    raw = torch.ones(n, 1, height, width, device=x.device)
    first, second = torch.zeros_like(raw), torch.zeros_like(raw)
    for step in range(1, steps + 1):
        # Normalising is affine: blending normalised images is blending images.
        colour = (random_colours(keys, channels, step, seed) - shift) / scale
        squashed = torch.tanh(raw)
        mask = squashed.add(1).mul_(0.5).requires_grad_()
        blended = torch.addcmul(colour, mask, x - colour)
        with numerics.autocast(x.device):
            logits = model(blended)
        loss = (logits.float() - wanted).abs().mean(dim=1).sum()
        (grad,) = torch.autograd.grad(loss, mask)
        grad = mask_gradient(grad, mask.detach(), squashed, gamma, beta)
        first.lerp_(grad, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        denominator = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPS)
        raw.addcdiv_(first, denominator, value=-lr / (1 - _BETAS[0] ** step))
    norms = torch.tanh(raw).add_(1).mul_(0.5).flatten(1).sum(dim=1)
    # The gradient of |NaN| is 0: such an image would get the mask of one that needs nothing.
    return norms.where(wanted.isfinite().all(dim=1), torch.nan)


def mask_gradient(grad: Tensor, mask: Tensor, squashed: Tensor, gamma: float, beta: float) -> Tensor:
    """Gradient of one image's whole loss with respect to ``w``, where ``mask = (tanh(w) + 1) / 2``.

    Args:
        grad: ``[N, 1, H, W]``, gradient of the network's part of the loss with respect to the mask.
        mask: ``[N, 1, H, W]``.
        squashed: ``[N, 1, H, W]``, ``tanh(w)``.
        gamma: Weight of ``sum |m|``.
        beta: Weight of ``sum (squared vertical and horizontal differences) / (H W)``.
    """
    total = grad + gamma
    weight = 2 * beta / (mask.shape[2] * mask.shape[3])
    for dim in (2, 3):
        difference = mask.diff(dim=dim).mul_(weight)
        total.narrow(dim, 1, mask.shape[dim] - 1).add_(difference)
        total.narrow(dim, 0, mask.shape[dim] - 1).sub_(difference)
    return total.mul_(torch.addcmul(torch.ones_like(squashed), squashed, squashed, value=-1).mul_(0.5))


def random_colours(keys: Tensor, channels: int, step: int, seed: int) -> Tensor:
    """One uniform colour an image, a function of (seed, image, step, channel) alone: float32 ``[N, C, 1, 1]``, 0..1.

    Args:
        keys: int64 ``[N]``, see :func:`bbfast.defenses._content.content_keys`.
        channels: Number of channels.
        step: Number of the step.
        seed: Any 64-bit number.
    """
    counter = torch.arange(channels, device=keys.device) + step * channels
    base = keys ^ mix64(torch.tensor(seed, device=keys.device))
    bits = mix64(base[:, None] + mix64(counter))
    # The top 24 bits are what a float32 in 0..1 holds.
    return ((bits >> 40) & ((1 << 24) - 1)).float().div_(1 << 24)[:, :, None, None]
