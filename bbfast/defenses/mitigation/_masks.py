"""Masks on the channels of norm layers: learning them, and how many of the lowest to prune."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast._progress import bar
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.defenses.features import normalised
from bbfast.defenses.mitigation._keep import Keeper
from bbfast.defenses.mitigation._norms import Norms
from bbfast.defenses.view import DefenderView
from bbfast.errors import DivergedError
from bbfast.training.device import placed
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import deterministic, forked_rng, keep_freed_memory, seed_generators

__all__ = [
    "Learned",
    "MaskLoss",
    "accuracies",
    "by_accuracy",
    "crops",
    "grid",
    "highest_acceptable",
    "learn_masks",
    "random_batches",
]

MaskLoss = Callable[[nn.Module, Tensor, Batch], Tensor]
"""``loss(net, mask, batch)``: a scalar to minimise, differentiable in ``mask`` float ``[T]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """Masks float32 ``[T]`` in 0..1 on the model's device, and a row a block: steps so far, mean loss, mean mask."""

    masks: Tensor
    history: list[dict[str, Any]]


def learn_masks(
    norms: Norms,
    blocks: int,
    batches: Callable[[int], Iterator[Batch]],
    loss: MaskLoss,
    *,
    lr: float,
    momentum: float,
    seed: int,
    settings: dict[str, Any],
    images: ImageSet,
    channels_last: bool = False,
    deterministic_only: bool = False,
    checkpoint: Path | None = None,
    progress: bool | None = None,
    description: str = "masks",
) -> Learned:
    """SGD with momentum on a mask for each norm channel, begun at 1 and held in 0..1; nothing else is learned.

    The network runs in training mode, on batch statistics, as a copy: the model's parameters and running statistics
    stay as they are.

    Args:
        norms: The norm layers of the model.
        blocks: Blocks of steps; the state is kept between them.
        batches: The batches of a block by its number.
        loss: What is minimised.
        lr: Learning rate.
        momentum: Momentum.
        seed: Seed of what is random in the network and in ``loss``: the global generators are seeded for each block.
        settings: What else determines the outcome, for checkpoints and messages.
        images: What the batches are of, for checkpoints.
        channels_last: Memory layout.
        deterministic_only: Deterministic kernels only.
        checkpoint: Folder that keeps the state at most a minute old; a killed run goes on from there.
        progress: Show a progress bar; None decides by the terminal.
        description: What is done, for bar and messages.

    Raises:
        DivergedError: if the loss is not finite, with the step and the settings.
    """
    net = copy.deepcopy(norms.model).train().requires_grad_(False)
    device = images.device
    masks = torch.ones(len(norms), device=device)
    state = {"masks": masks, "velocity": torch.zeros_like(masks)}
    history: list[dict[str, Any]] = []
    kept = Keeper(
        checkpoint,
        norms.model,
        images,
        {**settings, "lr": lr, "momentum": momentum, "seed": seed, "blocks": blocks},
    )
    if (found := kept.find()) is not None:
        history = found[1]
        for name, value in found[0].items():
            state[name].copy_(value)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with (
        placed(net, device, layout),
        forked_rng(device),
        deterministic(deterministic_only),
        keep_freed_memory(device),
        bar(description, blocks, progress, done=len(history)) as shown,
    ):
        for block in range(len(history), blocks):
            seed_generators(derive_seed("masks", seed, block), device)
            losses = [_step(net, state, batch, loss, lr, momentum) for batch in batches(block)]
            done = history[-1]["steps"] if history else 0
            row = _row(torch.stack(losses), done, state["masks"], description, settings)
            history.append(row)
            shown.advance()
            shown.show({"loss": row["loss"], "mean mask": row["mean_mask"]})
            kept.offer(state, history)
    return Learned(state["masks"], history)


def _step(net: nn.Module, state: dict[str, Tensor], batch: Batch, loss: MaskLoss, lr: float, momentum: float) -> Tensor:
    masks, velocity = state["masks"], state["velocity"]
    leaf = masks.detach().requires_grad_()
    value = loss(net, leaf, batch)
    (gradient,) = torch.autograd.grad(value, leaf)
    velocity.mul_(momentum).add_(gradient)
    masks.add_(velocity, alpha=-lr).clamp_(0, 1)
    return value.detach()


def _row(losses: Tensor, done: int, masks: Tensor, description: str, settings: dict[str, Any]) -> dict[str, Any]:
    bad = torch.nonzero(~losses.isfinite()).flatten()
    if len(bad):
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise DivergedError(f"{description}: the loss is not finite at step {done + int(bad[0]) + 1} ({shown})")
    return {"steps": done + len(losses), "loss": float(losses.mean()), "mean_mask": float(masks.mean())}


def random_batches(
    images: ImageSet,
    size: int,
    steps: int,
    *,
    seed: int,
    block: int,
    padding: int = 0,
    flip: bool = False,
    channels_last: bool = False,
) -> Iterator[Batch]:
    """``steps`` batches of ``size`` images drawn with replacement, cropped and flipped at random.

    All draws of a block are made at once on the CPU and depend on ``(seed, block)`` alone.
    """
    g = torch.Generator().manual_seed(derive_seed("random_batches", seed, block))
    device = images.device
    index = torch.randint(len(images), (steps, size), generator=g).to(device)
    offset = torch.randint(2 * padding + 1, (steps, size, 2), generator=g).to(device) if padding else None
    mirrored = torch.rand(steps, size, generator=g).lt(0.5).to(device) if flip else None
    for i in range(steps):
        x = ops.gather_augment(
            images.images,
            index[i],
            offset=None if offset is None else offset[i],
            flip=None if mirrored is None else mirrored[i],
            padding=padding,
            mean=images.mean,
            std=images.std,
            channels_last=channels_last,
        )
        yield Batch(x=x, y=images.labels[index[i]], index=index[i], epoch=block, step=i)


def crops(view: DefenderView) -> tuple[int, bool]:
    """Padding of the random crops and whether to flip, as the attacked model was trained."""
    trained = view.recipe
    if trained is None:
        return view.padding, view.flip
    return (trained.padding, trained.flip) if trained.augment else (0, False)


def by_accuracy(
    norms: Norms, masks: Tensor, val: ImageSet, acc_ratio: float, step: float, largest: float
) -> tuple[float | None, dict[str, Any]]:
    """The highest threshold that loses at most ``acc_ratio`` of the accuracy on ``val``, and how it was found.

    None, which prunes nothing, if every one loses more.
    """
    thresholds = grid(step, largest)
    before = accuracies(norms, masks, [-1.0], val)[0]
    accuracy = accuracies(norms, masks, thresholds, val)
    chosen = highest_acceptable(accuracy, before, acc_ratio)
    threshold = None if chosen is None else thresholds[chosen]
    return threshold, {
        "criterion": f"highest threshold with at most {acc_ratio:g} of the accuracy lost",
        "data": "held-back part of the clean hold-out",
        "samples": len(val),
        "thresholds": thresholds,
        "accuracy_before": before,
        "accuracy": accuracy,
        "threshold": threshold,
    }


def grid(step: float, largest: float) -> list[float]:
    """0, ``step``, twice that, ... up to ``largest``, without the noise of adding up."""
    return [round(i * step, 10) for i in range(int(largest / step + 1e-9) + 1)]


@torch.no_grad()
def accuracies(norms: Norms, masks: Tensor, thresholds: list[float], images: ImageSet) -> list[float]:
    """Accuracy of the model with the channels pruned whose mask is at or below each threshold; eval mode.

    The model is not changed. Thresholds that prune the same channels share one run.
    """
    weights = norms.weights()
    by_count: dict[int, float] = {}
    found = []
    with evaluating(norms.model):
        for threshold in thresholds:
            pruned = masks <= threshold
            count = int(pruned.sum())
            if count not in by_count:
                by_count[count] = _accuracy(norms, weights.masked_fill(pruned, 0), images)
            found.append(by_count[count])
    return found


def highest_acceptable(accuracy: list[float], before: float, acc_ratio: float) -> int | None:
    """The last of rising thresholds whose relative loss of accuracy is ``acc_ratio`` at most; None if none is.

    A model that is right about nothing has no accuracy to judge by: None.
    """
    if before == 0:
        return None
    # Accuracies are fractions with few digits; the slack keeps a loss of exactly acc_ratio acceptable.
    fine = [i for i, value in enumerate(accuracy) if value >= before * (1 - acc_ratio) - 1e-9]
    return fine[-1] if fine else None


def _accuracy(norms: Norms, weights: Tensor, images: ImageSet, batch_size: int = 512) -> float:
    hits = torch.zeros((), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch_size):
        logits = norms.call(normalised(images.images, start, batch_size, images.mean, images.std), weights)
        hits += (logits.argmax(1) == images.labels[start : start + batch_size]).sum()
    return int(hits) / max(len(images), 1)
