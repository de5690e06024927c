"""Trigger inversion for all classes in one batch: the optimisation of Neural Cleanse."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import artifact
from bbfast._hashing import content_hash
from bbfast._progress import bar
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.mitigation._schedule import CostSchedule
from bbfast.defenses.mitigation._stamp import stamp
from bbfast.errors import ArtifactError, BBFastError
from bbfast.training.device import Numerics, choose_numerics, placed
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import deterministic, keep_freed_memory

__all__ = ["InversionSettings", "Triggers", "adam_step", "auto_chunk", "invert", "squash"]

_log = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 60.0
_CPU_IMAGES = 128
"""Images a forward pass on a CPU: enough to keep the cores busy, few enough for a layer's output to stay in cache."""
_GPU_MEMORY_PART = 0.4
_SQUASH = 2 + 1e-7


@dataclasses.dataclass(frozen=True)
class InversionSettings:
    """See :class:`bbfast.defenses.mitigation.nc.NCConfig`, which documents them."""

    mask_lr: float
    init_cost: float
    asr_threshold: float
    patience: int
    multiplier: float
    early_stop_threshold: float
    early_stop_patience: int
    inversion_epochs: int
    norm_p: int
    augment: bool
    class_chunk: int | None
    fallback: str
    batch_size: int
    precision: str
    channels_last: bool | str


@dataclasses.dataclass(frozen=True, eq=False)
class Triggers:
    """Recovered triggers of ``K`` classes.

    Args:
        classes: int64 ``[K]``.
        mask: float32 ``[K, 1, H, W]``, 0..1.
        pattern: float32 ``[K, C, H, W]``, 0..1, pixel space.
        norm: float32 ``[K]``, L1 norm of the mask.
        success: float32 ``[K]``, success rate in the pass the trigger is from.
        found: bool ``[K]``, whether that rate reached the threshold.
        passes: int64 ``[K]``, passes over the images until the class was finished.
        cost: float64 ``[K]``, last weight of the mask's size.
    """

    classes: Tensor
    mask: Tensor
    pattern: Tensor
    norm: Tensor
    success: Tensor
    found: Tensor
    passes: Tensor
    cost: Tensor


class _State:
    """What changes from pass to pass: raw triggers and Adam's moments ``[K, 1 + C, H, W]``, best triggers, schedule."""

    def __init__(self, classes: Tensor, shape: tuple[int, int, int], settings: InversionSettings) -> None:
        (c, h, w), k = shape, classes.numel()
        raw = torch.ones(k, 1 + c, h, w, device=classes.device)
        self.raw, self.first, self.second = raw, torch.zeros_like(raw), torch.zeros_like(raw)
        self.best = squash(raw)
        self.success = torch.zeros(k, dtype=torch.float64)
        self.step, self.epoch = 0, 0
        self.schedule = CostSchedule.start(
            k,
            init_cost=settings.init_cost,
            asr_threshold=settings.asr_threshold,
            patience=settings.patience,
            multiplier=settings.multiplier,
            early_stop_threshold=settings.early_stop_threshold,
            early_stop_patience=settings.early_stop_patience,
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        state = {
            "raw": self.raw,
            "first": self.first,
            "second": self.second,
            "best": self.best,
            "success": self.success,
        }
        return {"state": state, "schedule": self.schedule.tensors()}

    def load(self, found: artifact.Artifact) -> None:
        for name, value in found.tensors("state").items():
            setattr(self, name, value.clone().to(getattr(self, name).device))
        self.schedule.load(found.tensors("schedule"))
        self.step, self.epoch = int(found.extra["step"]), int(found.extra["epoch"])


def invert(
    model: nn.Module,
    images: ImageSet,
    classes: Tensor,
    settings: InversionSettings,
    *,
    seed: int,
    padding: int = 0,
    flip: bool = False,
    deterministic_only: bool = False,
    checkpoint: Path | None = None,
    progress: bool | None = None,
    description: str = "trigger inversion",
) -> Triggers:
    """Find for each class the smallest trigger that turns clean images into it.

    For class k, with ``m = tanh(m') / (2 + 1e-7) + 0.5`` and ``p`` likewise, Adam minimises
    ``mean CE(f((1 - m) x + m p), k) + c_k |m|``. All unfinished classes are stamped on the same batch and go through
    the network together. The network is frozen and in eval mode, so samples do not touch one another and the gradients
    of the summed losses are those of each class alone: the outcome is that of one class after another on the same order
    of batches.

    Args:
        model: On the images' device; in eval mode for the run.
        images: The clean images.
        classes: Classes to invert, int64 ``[K]``, on the images' device.
        settings: Settings.
        seed: Seed of the order of batches, and of crops and flips if ``settings.augment``.
        padding: Zero padding of the crops.
        flip: Whether to flip.
        deterministic_only: Deterministic kernels only.
        checkpoint: Folder that keeps the state at most a minute old; a killed run goes on from there.
        progress: Show a progress bar; None decides by the terminal.
        description: What the bar says.

    Returns:
        The triggers, on the CPU.

    Raises:
        BBFastError: if a loss is not finite, naming the pass and the class.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, sections IV-A and V-A; BackdoorBench ``defense/nc.py``.
    """
    device = images.device
    numerics = choose_numerics(settings.precision, settings.channels_last, model, device)
    loader = BatchLoader(
        images,
        settings.batch_size,
        seed=seed,
        channels_last=numerics.channels_last,
        augment=settings.augment,
        padding=padding,
        flip=flip,
    )
    state = _State(classes, images.image_size, settings)
    identity: dict[str, Any] = {}
    if checkpoint is not None:
        identity = _identity(model, images, classes, settings, seed)
        _resume(state, checkpoint, identity)
    saved = time.monotonic()
    with (
        evaluating(model),
        trainable(model, False),
        placed(model, device, numerics.memory_format),
        deterministic(deterministic_only),
        keep_freed_memory(device),
        bar(description, settings.inversion_epochs, progress, done=state.epoch) as shown,
    ):
        chunk = settings.class_chunk or auto_chunk(model, images, settings.batch_size, numerics)
        while state.epoch < settings.inversion_epochs and not bool(state.schedule.done.all()):
            _pass(model, loader, classes, state, settings, numerics, chunk)
            shown.advance()
            shown.show({"classes left": int((~state.schedule.done).sum()), "success": float(state.success.mean())})
            if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                _save(state, checkpoint, identity)
                saved = time.monotonic()
    return _triggers(state, classes, settings)


def auto_chunk(model: nn.Module, images: ImageSet, batch_size: int, numerics: Numerics) -> int:
    """Classes that share a forward pass of ``batch_size`` images: what fits the GPU's memory or the CPU's cache."""
    batch = max(1, min(batch_size, len(images)))
    if images.device.type != "cuda":
        return max(1, round(_CPU_IMAGES / batch))
    free, _ = torch.cuda.mem_get_info(images.device)
    cached = torch.cuda.memory_reserved(images.device) - torch.cuda.memory_allocated(images.device)
    each = _activation_bytes(model, images, numerics)
    return max(1, int(_GPU_MEMORY_PART * (free + cached) / (each * batch)))


@torch.no_grad()
def _activation_bytes(model: nn.Module, images: ImageSet, numerics: Numerics) -> int:
    """Bytes that every layer's output takes for one image: about what a forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def count(_: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes.append(out.numel() * out.element_size())

    hooks = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
    try:
        with numerics.autocast(images.device):
            model(torch.zeros(1, *images.image_size, device=images.device))
    finally:
        for hook in hooks:
            hook.remove()
    return max(sum(sizes), 1)


def _pass(
    model: nn.Module,
    loader: BatchLoader,
    classes: Tensor,
    state: _State,
    settings: InversionSettings,
    numerics: Numerics,
    chunk: int,
) -> None:
    """One pass over the images for all unfinished classes, and the bookkeeping after it."""
    device = classes.device
    schedule = state.schedule
    active = torch.nonzero(~schedule.done).flatten()
    rows = active.to(device)
    # Compacted copies: finished classes cost nothing, and the rows of the others lie together.
    raw, first, second = (tensor[rows].requires_grad_(False) for tensor in (state.raw, state.first, state.second))
    cost = schedule.cost[active].to(device, torch.float32)
    targets = classes[rows]
    mean = torch.tensor(loader.images.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(loader.images.std, device=device).view(-1, 1, 1)
    hits = torch.zeros(len(rows), device=device)
    sizes = torch.zeros(len(rows), device=device)
    losses = torch.zeros(len(rows), device=device)
    for batch in loader.epoch(state.epoch):
        grad = torch.empty_like(raw)
        for start in range(0, len(rows), chunk):
            piece = slice(start, start + chunk)
            leaf = raw[piece].detach().requires_grad_()
            squashed = squash(leaf)
            mask, pattern = squashed[:, :1], squashed[:, 1:]
            stamped = stamp(batch.x, mask, (pattern - mean) / std)
            with numerics.autocast(device):
                logits = model(stamped)
            logits = logits.float()
            wanted = targets[piece].repeat_interleave(len(batch))
            ce = F.cross_entropy(logits, wanted, reduction="none").view(-1, len(batch)).mean(dim=1)
            size = mask.flatten(1).norm(p=settings.norm_p, dim=1)
            loss = ce + cost[piece] * size
            grad[piece] = torch.autograd.grad(loss.sum(), leaf)[0]
            hits[piece] += (logits.detach().argmax(dim=1) == wanted).view(-1, len(batch)).float().mean(dim=1)
            sizes[piece] += size.detach()
            losses[piece] += loss.detach()
        state.step += 1
        adam_step(raw, grad, first, second, state.step, settings.mask_lr)
    count = len(loader)
    _check_finite(losses, targets, state.epoch, settings)
    state.raw[rows], state.first[rows], state.second[rows] = raw, first, second
    state.epoch += 1
    acc, reg = (_spread(value.cpu().double() / count, active, schedule.done.numel()) for value in (hits, sizes))
    unfound = ~schedule.best.isfinite()
    better = schedule.update(acc, reg)
    # A class without success yet shows its latest trigger, or that of its first pass as the reference does.
    shown = unfound & (better | torch.tensor(settings.fallback == "last_pass" or state.epoch == 1))
    keep = better | shown
    state.success = torch.where(keep, acc, state.success)
    state.best = torch.where(keep.to(device)[:, None, None, None], squash(state.raw), state.best)


def adam_step(raw: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float) -> None:
    """One step of Adam with betas (0.5, 0.9) in place; all rows have the same step count, since none ever pauses."""
    beta1, beta2, eps = 0.5, 0.9, 1e-8
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
    raw.addcdiv_(first, denominator, value=-lr / (1 - beta1**step))


def squash(raw: Tensor) -> Tensor:
    return torch.tanh(raw) / _SQUASH + 0.5


def _spread(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """``values`` at ``rows`` of a zero vector of ``size``."""
    return torch.zeros(size, dtype=values.dtype).index_copy_(0, rows, values)


def _check_finite(losses: Tensor, targets: Tensor, epoch: int, settings: InversionSettings) -> None:
    bad = ~losses.isfinite()
    if bad.any():
        raise BBFastError(
            f"trigger inversion (nc): the loss of class {int(targets[bad][0])} is not finite in pass {epoch} "
            f"(mask_lr={settings.mask_lr}, amp={settings.precision!r}); try amp='off' or a lower mask_lr"
        )


def _triggers(state: _State, classes: Tensor, settings: InversionSettings) -> Triggers:
    best = state.best.cpu()
    mask, pattern = best[:, :1].contiguous(), best[:, 1:].contiguous()
    return Triggers(
        classes=classes.cpu(),
        mask=mask,
        pattern=pattern,
        norm=mask.flatten(1).sum(dim=1),
        success=state.success.float(),
        found=state.schedule.best.isfinite(),
        passes=state.schedule.passes.clone(),
        cost=state.schedule.cost.clone(),
    )


def _identity(
    model: nn.Module, images: ImageSet, classes: Tensor, settings: InversionSettings, seed: int
) -> dict[str, Any]:
    """What tells one inversion from another."""
    return {
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "classes": classes.tolist(),
        "images": content_hash({"images": images.images, "labels": images.labels}),
        "model": content_hash(dict(model.state_dict())),
    }


def _save(state: _State, folder: Path, identity: dict[str, Any]) -> None:
    artifact.write(
        folder,
        "inversion_checkpoint",
        config=identity,
        tensors=state.tensors(),
        extra={"step": state.step, "epoch": state.epoch},
        overwrite=True,
    )


def _resume(state: _State, folder: Path, identity: dict[str, Any]) -> None:
    """Take up a checkpoint of the same inversion; one of another, or a damaged one, is left to be overwritten."""
    if not artifact.exists(folder):
        return
    try:
        found = artifact.read(folder, "inversion_checkpoint")
    except ArtifactError as error:
        _log.warning("starting the inversion anew: %s", error)
        return
    if found.config != identity:
        _log.warning("starting the inversion anew: the checkpoint in %s is of another run", folder)
        return
    state.load(found)
