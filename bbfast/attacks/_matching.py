"""Gradient matching: training images whose gradient points where that of triggered ones would (Sleeper Agent)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bbfast import _progress
from bbfast.attacks._augment import keep_layout
from bbfast.attacks.randomness import make_key, uniform
from bbfast.data.loader import Batch, derive_seed
from bbfast.training.checkpoint import Checkpoint, Checkpoints
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.program import Program

__all__ = ["Matching", "ShiftFlip", "gradient_norms", "loss_gradient", "mismatch", "shift_flip"]

_MILESTONES = (1 / 2.667, 1 / 1.6, 1 / 1.142)
_PASS = 128


@dataclasses.dataclass(frozen=True)
class Matching:
    """How the changes are optimised.

    Args:
        epsilon: Largest change of a pixel, in 0..1 units.
        iterations: Steps.
        retrain_every: Steps after which the network is trained anew on the images as changed so far; None never.
        lr: Learning rate of Adam for a batch of 128, in units of a normalised pixel.
        batch_size: Images a gradient is matched with at a time.
        shift: Largest shift of a crop, in pixels.
        flip: Whether images are mirrored at random.
    """

    epsilon: float
    iterations: int
    retrain_every: int | None
    lr: float
    batch_size: int
    shift: int
    flip: bool

    def craft(
        self,
        images: Tensor,
        target: int,
        mean: Tensor,
        std: Tensor,
        network: nn.Module,
        source_gradient: Callable[[nn.Module, int], list[Tensor]],
        retrain: Callable[[Tensor, int, Path], nn.Module],
        seed: int,
        work: Path,
        progress: bool | None = None,
    ) -> tuple[Tensor, list[float]]:
        """Changes of the images under which their loss gradient is parallel to the source's.

        Args:
            images: float ``[P, C, H, W]`` in 0..1, on the device to work on.
            target: Their label.
            mean: ``[C, 1, 1]``, normalisation of the network.
            std: Likewise.
            network: Trained on normalised images; its weights may change.
            source_gradient: Gives the gradient to match for a network; called again, with the number of trainings so
                far, after each of them.
            retrain: Trains a new network on the images with the given changes, float ``[P, C, H, W]`` in 0..1 units;
                called with them, the number of the training from 1 and a folder for checkpoints.
            seed: Of the first changes and of shifts and flips.
            work: Folder of checkpoints.
            progress: As in :func:`bbfast.train`.

        Returns:
            The changes, float ``[P, C, H, W]`` in 0..1 units, and the mean mismatch of each step.

        Source: arXiv 2106.08970, algorithm 1; signed Adam after the authors' code.
        """
        bound, low, high = self.epsilon / std, -mean / std, (1 - mean) / std
        x = (images - mean) / std
        rows = torch.arange(len(x), device=x.device)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(derive_seed("matching", seed)))
        delta = self._project((noise.to(x.device) * bound), x, bound, low, high).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=self.lr * self.batch_size / 128)
        milestones = [int(share * self.iterations) for share in _MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        checkpoints = Checkpoints(work, {"matching": dataclasses.asdict(self), "seed": seed, "images": len(x)})
        history: list[dict[str, Any]] = []
        trained = 0
        if (found := checkpoints.find()) is not None:
            history, trained = found.history, found.values["trained"]
            network.load_state_dict(found.tensors["model"])
            delta.data.copy_(found.tensors["program"]["delta"])
            load_optimizer_state(optimizer, found.tensors["optimizer"])
            schedule.load_state_dict(found.values["schedule"])
            for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = lr
        wanted = source_gradient(network, trained)
        with _progress.bar("gradient matching", self.iterations, progress, done=len(history)) as bar:
            for step in range(len(history), self.iterations):
                if self.retrain_every and trained < step // self.retrain_every:
                    trained = step // self.retrain_every
                    network = retrain(delta.detach() * std, trained, work / f"training-{trained}")
                    wanted = source_gradient(network, trained)
                key = make_key("matching", seed, step)
                losses, gradients = [], []
                for part in rows.split(self.batch_size):
                    change = delta.detach()[part].requires_grad_()
                    moved = shift_flip(x[part] + change, uniform(key, part, (3,)), self.shift, self.flip)
                    loss = mismatch(network, moved, target, wanted)
                    gradients.append(torch.autograd.grad(loss, change)[0])
                    losses.append(loss.detach() * len(part))
                delta.grad = torch.cat(gradients).sign()
                optimizer.step()
                schedule.step()
                delta.data.copy_(self._project(delta.detach(), x, bound, low, high))
                history.append({"loss": float(torch.stack(losses).sum()) / len(x)})
                bar.advance()
                bar.show(history[-1])
                if checkpoints.due(last=False) and step + 1 < self.iterations:
                    state = {
                        "model": dict(network.state_dict()),
                        "optimizer": optimizer_state(optimizer),
                        "program": {"delta": delta.detach()},
                    }
                    values = {"trained": trained, "schedule": _plain(schedule.state_dict())}
                    checkpoints.write(Checkpoint(step + 1, history, values, state))
        return delta.detach() * std, [row["loss"] for row in history]

    @staticmethod
    def _project(delta: Tensor, x: Tensor, bound: Tensor, low: Tensor, high: Tensor) -> Tensor:
        delta = torch.minimum(torch.maximum(delta, -bound), bound)
        return torch.minimum(torch.maximum(x + delta, low), high) - x


class ShiftFlip(Program):
    """Training with :func:`shift_flip` in place of the loader's crops; its draws are a function of epoch and sample.

    Args:
        shift: Largest shift in pixels.
        flip: Whether to mirror.
    """

    augments_itself = True

    def __init__(self, shift: int, flip: bool) -> None:
        self.shift, self.flip = shift, flip

    def make_batch(self, batch: Batch) -> Batch:
        if not self.recipe.augment:
            return batch
        drawn = uniform(make_key("shift", self.seed, batch.epoch), batch.index, (3,))
        return batch.replace(x=keep_layout(shift_flip(batch.x, drawn, self.shift, self.flip), batch.x))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "shift": self.shift, "flip": self.flip}


def shift_flip(x: Tensor, drawn: Tensor, shift: int, flip: bool) -> Tensor:
    """Shift by up to ``shift`` pixels (bilinear between them, zeros outside) and mirror half of the images.

    Args:
        x: Normalised images, float ``[B, C, H, W]``; gradients flow through.
        drawn: Uniform numbers in 0..1, ``[B, 3]``: vertical shift, horizontal shift, mirror.
        shift: Largest shift in pixels.
        flip: Whether to mirror.
    """
    height, width = x.shape[-2:]
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(drawn[:, 2] < 0.5, -1.0, 1.0) if flip else 1.0
    theta[:, 1, 1] = 1.0
    theta[:, 0, 2] = (2 * drawn[:, 1] - 1) * (2 * shift / width)
    theta[:, 1, 2] = (2 * drawn[:, 0] - 1) * (2 * shift / height)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def mismatch(network: nn.Module, x: Tensor, target: int, wanted: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of the loss gradient of ``x`` under ``target`` and the gradient ``wanted``.

    Args:
        network: In eval mode, its weights requiring gradients.
        x: Normalised images ``[B, C, H, W]``; the result can be differentiated with respect to them.
        target: Their label.
        wanted: One tensor for each parameter, as :func:`loss_gradient` gives them.
    """
    # Only this form of attention can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        loss = F.cross_entropy(network(x), torch.full((len(x),), target, device=x.device))
        own = torch.autograd.grad(loss, _parameters(network), create_graph=True)
        dot = torch.stack([(a * b).sum() for a, b in zip(own, wanted, strict=True)]).sum()
        squares = torch.stack([g.square().sum() for g in own]).sum()
        length = torch.stack([g.square().sum() for g in wanted]).sum().sqrt()
        # The root of 0 has no derivative.
        return 1 - dot / ((squares + 1e-30).sqrt() * length.clamp_min(1e-15))


def loss_gradient(network: nn.Module, x: Tensor, target: int) -> list[Tensor]:
    """Gradient of the mean cross-entropy of ``x`` under one label with respect to each parameter, in eval mode."""
    network.eval().requires_grad_(True)
    parameters = _parameters(network)
    total = [torch.zeros_like(p) for p in parameters]
    for part in x.split(_PASS):
        with torch.enable_grad():
            labels = torch.full((len(part),), target, device=x.device)
            loss = F.cross_entropy(network(part), labels, reduction="sum") / len(x)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += gradient
    return total


def gradient_norms(network: nn.Module, x: Tensor, target: int) -> Tensor:
    """Length of each image's own :func:`loss_gradient`, float ``[N]``: one pass an image, which any network allows."""
    lengths = []
    for one in x.split(1):
        lengths.append(torch.stack([g.square().sum() for g in loss_gradient(network, one, target)]).sum().sqrt())
    return torch.stack(lengths)


def _parameters(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's state fit for JSON: its table of milestones has numbers as keys, and it is known anyway."""
    return {key: value for key, value in state.items() if key != "milestones"}
