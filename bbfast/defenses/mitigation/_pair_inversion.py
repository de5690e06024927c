"""Smallest triggers from given images to given classes, many problems in one batch: what MOTH measures distances by."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.defenses.mitigation._inversion import adam_step, squash
from bbfast.defenses.mitigation._schedule import CostSchedule
from bbfast.errors import DivergedError

__all__ = ["PairSettings", "PairTriggers", "Problems", "invert_pairs"]

_NOISE = 0.01
_CPU_ROWS = 128


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """How triggers are optimised.

    Args:
        steps: Steps of Adam, each on all images of a problem.
        lr: Adam's learning rate.
        init_cost: First weight of the mask's size.
        threshold: Success rate, in 0..1, from which a trigger counts.
        patience: Steps of success (failure) in a row after which the weight rises (falls).
        multiplier: Factor by which it rises; it falls by ``multiplier ** 1.5``.
        chunk: Stamped images in one forward pass; None is 128 on a CPU, else all.
    """

    steps: int
    lr: float = 0.1
    init_cost: float = 1e-3
    threshold: float = 0.9
    patience: int = 10
    multiplier: float = 1.5
    chunk: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Problems:
    """P problems: which images each is about, and the class it wants.

    Args:
        x: Normalised images, float ``[N, C, H, W]``.
        rows: Their numbers, problem after problem, int64 ``[R]``.
        owner: The problem of each, rising, int64 ``[R]``.
        targets: Class of each problem, int64 ``[P]``.
    """

    x: Tensor
    rows: Tensor
    owner: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclasses.dataclass(frozen=True, eq=False)
class PairTriggers:
    """What was found.

    Args:
        trigger: float32 ``[P, 1 + C, H, W]`` in 0..1: mask, and pattern in pixel space. Zeros where nothing was found.
        size: L1 norm of the mask, float64 ``[P]``; infinite where nothing was found.
        found: bool ``[P]``, on the CPU as ``size`` is.
        loss_drop: ``(first - last) / first`` of each row's cross-entropy, ``last`` that under the trigger found, float
            ``[R]``; 0 where nothing was found.
    """

    trigger: Tensor
    size: Tensor
    found: Tensor
    loss_drop: Tensor


def unsquash(values: Tensor) -> Tensor:
    """What :func:`squash` makes ``values`` of; 0 and 1 are brought a little inside."""
    return torch.atanh(((values - 0.5) * 2).clamp(-1 + 1e-6, 1 - 1e-6))


def invert_pairs(
    model: nn.Module,
    images: ImageSet,
    problems: Problems,
    settings: PairSettings,
    *,
    seed: int,
    start: Tensor | None = None,
) -> PairTriggers:
    """For each problem the smallest trigger that turns its images into its class.

    As in Neural Cleanse (:mod:`bbfast.defenses.mitigation._inversion`), with images of its own for each problem. A
    trigger that is better than all before is kept, and the search goes on from it with a little noise.
    Problems do not touch one another, and what is drawn is common to all: each ends as it would alone, up to rounding.

    Args:
        model: Frozen, in eval mode.
        images: For the normalisation.
        problems: See :class:`Problems`.
        settings: Settings.
        seed: Seed of noise and random start.
        start: First trigger of each, ``[P, 1 + C, H, W]`` in 0..1; None draws one uniformly.

    Raises:
        DivergedError: if a loss stops being finite, with advice; without any if the model's outputs are not finite.

    Source: Tao et al., Model Orthogonalization, IEEE S&P 2022, section IV; numbers as in backdoor-toolbox.
    """
    x, owner, device = problems.x, problems.owner, problems.x.device
    p, shape = len(problems), (1 + x.shape[1], *x.shape[2:])
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (images.mean, images.std))
    if start is None:
        start = _uniform(shape, seed, 0).expand(p, *shape).to(device)
    raw = unsquash(start.to(device))
    first, second = torch.zeros_like(raw), torch.zeros_like(raw)
    schedule = CostSchedule.start(
        p,
        init_cost=settings.init_cost,
        asr_threshold=settings.threshold,
        patience=settings.patience,
        multiplier=settings.multiplier,
        early_stop_threshold=0.0,
        early_stop_patience=settings.steps + 1,
    )
    count = torch.bincount(owner, minlength=p).float()
    wanted, chunk = problems.targets[owner], settings.chunk or (_CPU_ROWS if device.type == "cpu" else len(owner))
    best = torch.zeros_like(raw)
    losses = torch.zeros(2, len(owner), device=device)
    for step in range(settings.steps):
        shown = squash(raw)
        grad, hits = torch.zeros_like(raw), torch.zeros(p, device=device)
        now = torch.empty(len(owner), device=device)
        for at in range(0, len(owner), max(chunk, 1)):
            piece = slice(at, at + chunk)
            who = owner[piece]
            leaf = raw.detach().requires_grad_()
            trigger = squash(leaf)[who]
            stamped = torch.lerp(x[problems.rows[piece]], (trigger[:, 1:] - mean) / std, trigger[:, :1])
            logits = model(stamped).float()
            each = F.cross_entropy(logits, wanted[piece], reduction="none")
            grad += torch.autograd.grad((each / count[who]).sum(), leaf)[0]
            hits.index_add_(0, who, (logits.detach().argmax(dim=1) == wanted[piece]).float())
            now[piece] = each.detach()
        cost = schedule.cost.to(device, torch.float32).view(-1, 1, 1, 1)
        # The mask's size is its sum: its gradient is that of the squashing.
        grad[:, :1] += cost * 2 * shown[:, :1] * (1 - shown[:, :1])
        adam_step(raw, grad, first, second, step + 1, settings.lr)
        size = shown[:, 0].flatten(1).sum(dim=1)
        if not bool(now.isfinite().all()):
            which = int(wanted[~now.isfinite()][0])
            if step == 0:
                raise DivergedError(f"the model's outputs are not finite on the images of a trigger for class {which}")
            raise DivergedError(
                f"the loss of a trigger for class {which} is not finite in step {step} of its inversion",
                f"lower trigger_lr (now {settings.lr:g})",
            )
        better = schedule.update((hits / count).cpu().double(), size.cpu().double()).to(device)
        where = better.view(-1, 1, 1, 1)
        best = torch.where(where, shown, best)
        if step == 0:
            losses[0] = now
        losses[1] = torch.where(better[owner], now, losses[1])
        if bool(better.any()):
            shaken = shown + _NOISE * (2 * _uniform(shape, seed, step + 1).to(device) - 1)
            raw = torch.where(where, unsquash(shaken.clamp(0, 1)), raw)
    found = schedule.best.isfinite()
    drop = (losses[0] - losses[1]) / losses[0].clamp(min=1e-12)
    return PairTriggers(best, schedule.best.clone(), found, torch.where(found.to(device)[owner], drop, 0.0))


def _uniform(shape: tuple[int, ...], seed: int, turn: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(derive_seed("pairs", seed, turn)))
