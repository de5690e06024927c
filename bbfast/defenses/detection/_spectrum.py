"""Which frequencies of an image a prediction is sensitive to, as sets of frequencies that can be compared exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbfast._progress import Bar
from bbfast.defenses.features import normalised
from bbfast.training.device import Numerics

__all__ = ["conjugate_pairs", "sensitive_frequencies", "sensitivity"]


def conjugate_pairs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The frequencies of a real image up to conjugation: ``(u, v)`` and ``(-u, -v)`` always have the same modulus.

    Returns:
        Positions in the flattened half spectrum of ``rfft2`` (``[H, W // 2 + 1]``), int64 ``[R]``, rising, and how many
        frequencies of the whole grid each stands for, 1 or 2: int64 ``[R]``; they sum to ``H W``.
    """
    u, v = torch.meshgrid(torch.arange(height), torch.arange(width // 2 + 1), indexing="ij")
    whole = u * width + v
    partner = (-u % height) * width + (-v % width)
    # Where both ends of a pair lie in the half spectrum (columns 0 and W / 2), the first of them stands for it.
    first = (whole <= partner) | (-v % width > width // 2)
    return first.flatten().nonzero()[:, 0], torch.where(whole == partner, 1, 2)[first]


def sensitivity(gradient: Tensor) -> Tensor:
    """``mean over channels |dz / dX|``, up to a constant, for the 2-d discrete Fourier transform ``X`` of the image.

    Args:
        gradient: float ``[N, C, H, W]``, of the logit with respect to the pixels.

    Returns:
        float ``[N, R]``, at the frequencies of :func:`conjugate_pairs`.
    """
    places, _ = conjugate_pairs(*gradient.shape[2:])
    return torch.fft.rfft2(gradient).abs().mean(dim=1).flatten(1)[:, places.to(gradient.device)]


def sensitive_frequencies(
    model: nn.Module,
    images: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    topk: int,
    batch_size: int,
    numerics: Numerics,
    progress: Bar | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``topk`` frequencies of the whole grid that each image's predicted logit is most sensitive to.

    A pair of conjugates is taken or left as one, so there are ``topk`` or ``topk + 1``.

    Args:
        model: Normalised images to logits; in eval mode, without gradients of its weights.
        images: uint8 ``[N, C, H, W]``.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        topk: Frequencies, 1..H W.
        batch_size: Images in a pass forward and backward.
        numerics: Number format and layout of the network.
        progress: Told of every image done.

    Returns:
        Membership, bool ``[N, R]``, at the frequencies of :func:`conjugate_pairs`; and bool ``[N]``, whether logits and
        gradient are finite.
    """
    weights = conjugate_pairs(*images.shape[2:])[1].to(images.device)
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    members = [torch.zeros(0, len(weights), dtype=torch.bool, device=images.device)]
    finite = [torch.zeros(0, dtype=torch.bool, device=images.device)]
    for start in range(0, images.shape[0], batch_size):
        x = normalised(images, start, batch_size, mean, std, numerics.channels_last).requires_grad_()
        with numerics.autocast(x.device):
            # A network may begin with an operation in place, which a leaf does not allow.
            logits = model(x.view_as(x)).float()
        (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), x)
        values = sensitivity(gradient.float() / scale)
        finite.append(values.isfinite().all(dim=1) & logits.detach().isfinite().all(dim=1))
        order = values.argsort(dim=1, descending=True, stable=True)
        width = weights[order]
        taken = width.cumsum(dim=1) - width < topk
        members.append(torch.zeros_like(taken).scatter_(1, order, taken))
        if progress is not None:
            progress.advance(len(x))
    return torch.cat(members), torch.cat(finite)
