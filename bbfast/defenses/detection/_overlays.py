"""Superimposing images: which overlays a sample gets, and the network's entropy over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.defenses._content import mix64

__all__ = ["draw_overlays", "mean_entropy"]

# Entries of the table samples x reserve that exist at a time.
_LOTTERY = 1 << 22
_BLENDS = ("add_clip", "add_normalised", "convex")


def draw_overlays(keys: Tensor, labels: Tensor, count: int, seed: int, exclude: Tensor | None = None) -> Tensor:
    """Overlays for each sample: drawn without replacement, stratified by class, a function of (seed, key) alone.

    The reserve's classes take turns, in an order drawn for each sample, so no class is drawn an ``n + 1``-th time while
    another still has fewer than ``n`` drawn and images left.

    Args:
        keys: int64 ``[B]``, see :func:`bbfast.defenses._content.content_keys`.
        labels: int64 ``[R]``, classes of the reserve.
        count: Overlays a sample, ``M``.
        seed: Any integer.
        exclude: int64 ``[B]``, a position of the reserve that the sample must not get; None excludes nothing.

    Returns:
        int64 ``[B, M]``, positions in the reserve.

    Raises:
        ValueError: if the reserve has fewer than ``count`` images to draw from.
    """
    size, device = labels.shape[0], labels.device
    available = size - (exclude is not None)
    if not 0 < count <= available:
        raise ValueError(f"count must lie in 1..{available}, the overlays that a sample can get, got {count}")
    step = max(1, _LOTTERY // size)
    if keys.shape[0] > step:
        starts = range(0, keys.shape[0], step)
        spared = [None if exclude is None else exclude[i : i + step] for i in starts]
        return torch.cat(
            [draw_overlays(keys[i : i + step], labels, count, seed, e) for i, e in zip(starts, spared, strict=True)]
        )
    base = mix64(keys.to(device) ^ mix64(torch.tensor(seed, device=device)))
    lottery = mix64(base[:, None] + torch.arange(size, device=device) * 0x632BE59BD9B4E019)
    if exclude is not None:
        lottery.scatter_(1, exclude[:, None], torch.iinfo(torch.int64).max)
    order = lottery.argsort(dim=1)
    # Position of each draw among those of its class: a stable sort by class keeps the drawn order within a class.
    by_class = labels[order].argsort(dim=1, stable=True)
    counts = torch.bincount(labels)
    within = torch.arange(size, device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = torch.empty_like(order).scatter_(1, by_class, within.expand_as(by_class))
    if exclude is not None:
        turn[:, -1] = size
    rounds = turn * size + torch.arange(size, device=device)
    return order.gather(1, rounds.argsort(dim=1)[:, :count])


@torch.inference_mode()
def mean_entropy(
    model: nn.Module,
    images: Tensor,
    overlays: Tensor,
    draws: Tensor,
    *,
    blend: str = "add_clip",
    alpha: float = 1.0,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean entropy of the softmax over a sample's superimposed copies, in nats.

    See :func:`bbfast.ops.overlay_batch`; at most about ``batch_size`` superimposed images exist at a time.

    Args:
        model: Normalised images to logits; in eval mode.
        images: uint8 0..255 or float 0..1, ``[N, C, H, W]``.
        overlays: ``[R, C, H, W]``, like ``images``.
        draws: int64 ``[N, M]``, positions in ``overlays``.
        blend: ``add_clip``: ``clip(x + alpha r, 0, 1)``, then normalised. ``add_normalised``: normalised ``x`` plus
            ``alpha`` times normalised ``r``. ``convex``: ``alpha x + (1 - alpha) r``, then normalised.
        alpha: Weight, see ``blend``; positive.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        batch_size: Superimposed images in a forward pass; at least one sample's copies go together.
        dtype: bfloat16 or float16 runs the network under autocast.

    Returns:
        float32 ``[N]``, 0..ln K.

    Raises:
        ValueError: if ``blend`` is unknown.
    """
    if blend not in _BLENDS:
        raise ValueError(f"blend must be one of {sorted(_BLENDS)}, got {blend!r}")
    device = overlays.device
    # Once, not for every batch: a channels-last batch is made of channels-last images.
    overlays = overlays.contiguous(memory_format=torch.channels_last)
    step = max(1, batch_size // draws.shape[1])
    entropies = []
    for start in range(0, images.shape[0], step):
        chosen = draws[start : start + step].to(device)
        own = torch.arange(chosen.shape[0], device=device)[:, None].expand_as(chosen)
        blended = ops.overlay_batch(
            images[start : start + step].to(device),
            overlays,
            torch.stack((own, chosen), 2).flatten(0, 1),
            mean=mean,
            std=std,
            dtype=dtype,
            blend=blend,
            alpha=alpha,
            channels_last=True,
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(blended)
        entropies.append(ops.softmax_entropy(logits.float()).view(chosen.shape).mean(dim=1))
    return torch.cat(entropies) if entropies else torch.zeros(0, device=device)
