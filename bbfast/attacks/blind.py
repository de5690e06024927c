"""Blind: a second loss in the training code (Bagdasaryan and Shmatikov, arXiv 2005.03823; spec/attacks section 16)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._networks import refuse_fp16
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["Blind", "BlindProgram", "mgda_weight"]

_PATTERN = ((1, 0, 1), (-1, 1, -1), (-1, -1, 0), (-1, 1, -1), (1, 0, 1))
"""White 1, black 0, the image itself -1."""
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))

Normaliser = Literal["none", "l2", "loss", "loss+"]


@register_attack("blind")
class Blind(Attack):
    """Adds the loss on the triggered batch to the training loss, once the model has learned its task.

    The training data stays as it is: nothing but the loss is changed. ``ratio`` says how much of the set that
    data-based defenses are given is poisoned.
    """

    card = Card(
        title="Blind",
        paper="Blind Backdoors in Deep Learning Models",
        year=2021,
        arxiv="2005.03823",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="The training loss gets a second term, on a triggered copy of the batch.",
        deviations=(
            "The pattern's white and black are those of the data set at hand; the reference normalises them with "
            "CIFAR-10's constants whatever the data (compat='reference' does so).",
            "On images too small for row 3, column 23 the pattern moves up and left until it fits.",
            "all2all is offered too; the reference has all2one.",
            "A set of ratio poisoned samples is exported for data-based defenses; the reference exports none.",
            "joint_forward=True runs triggered and clean images together, which spares BatchNorm the mixture of two "
            "kinds of batches; the paper's code runs them apart.",
            "latch=True keeps the second loss on once it began; the paper's condition is checked in every batch.",
        ),
    )

    class Config(AttackConfig):
        """Settings of Blind.

        Args:
            balance: ``fixed`` weights; ``mgda``: weights that descend both losses (Desideri 2012), as in the paper.
            weight_backdoor: Weight of the loss on triggered images, for ``fixed``.
            weight_normal: Weight of the loss on clean images, for ``fixed``.
            normaliser: What ``mgda`` divides the gradients by: ``none``; ``l2``, their norm; ``loss``, the loss (at
                most 10); ``loss+``, loss times norm (at most 10).
            history: Batches whose normal losses are remembered; before so many there is no second loss.
            threshold: The second loss is on while the mean of those is below this.
            latch: Once on, it stays on.
            joint_forward: Run triggered and clean images through the model together. Apart, as in the paper's code,
                BatchNorm sees two kinds of batches in training and their mixture afterwards, which costs clean
                accuracy.
        """

        balance: Literal["fixed", "mgda"] = "fixed"
        weight_backdoor: float = Field(0.9, gt=0)
        weight_normal: float = Field(1.0, gt=0)
        normaliser: Normaliser = "loss+"
        history: int = Field(1000, ge=1)
        threshold: float = Field(1.0, gt=0)
        latch: bool = False
        joint_forward: bool = False

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        channels, height, width = data.image_size
        rows, columns = len(_PATTERN), len(_PATTERN[0])
        if height < rows or width < columns:
            raise ValueError(f"{self.name}: images must be at least {rows} x {columns}, got {height} x {width}")
        if self.config.compat == "reference" and channels != 3:
            raise ValueError(f"{self.name}: compat='reference' has CIFAR-10's constants: 3 channels, got {channels}")
        top, left = min(3, height - rows), min(23, width - columns)
        drawn = torch.tensor(_PATTERN, dtype=torch.float32)
        pattern, mask = torch.zeros(height, width), torch.zeros(height, width)
        pattern[top : top + rows, left : left + columns] = drawn.clamp_min(0)
        mask[top : top + rows, left : left + columns] = (drawn >= 0).float()
        return {"pattern": pattern.expand(channels, -1, -1).contiguous(), "mask": mask}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern, mask = self.tensor("pattern", images), self.tensor("mask", images)
        if images.is_floating_point():
            return ops.patch(images, pattern.to(images.dtype), mask.to(images.dtype))
        return ops.patch(images, (pattern * 255).to(torch.uint8), mask)

    def program(self, rule: LabelRule) -> BlindProgram:
        return BlindProgram(self, rule)


class BlindProgram(Program):
    """Plain training whose loss gets a second term: all images of the batch with the trigger and the wanted labels.

    The pattern is put on after augmentation, on normalised images. Each batch whose history is full waits for the
    device once, to learn whether the second loss is on.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    def __init__(self, attack: Blind, rule: LabelRule) -> None:
        self.attack, self.rule = attack, rule

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config), "rule": repr(self.rule)}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        if c.balance == "mgda":
            refuse_fp16(recipe, self.attack.name)
        mean, std = _CIFAR10 if c.compat == "reference" else (train.mean, train.std)
        shift, scale = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.pattern = (self.attack.tensors["pattern"].to(device) - shift) / scale
        self.mask = self.attack.tensors["mask"].to(device)
        self.losses, self.seen, self.latched = torch.zeros(c.history, device=device), 0, False

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self.steps, self.backdoored = steps, 0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        c = self.attack.config
        if not self._is_on():
            normal, logits = super().loss(model, batch)
            self._remember(normal)
            return normal, logits
        self.backdoored += 1
        triggered = ops.patch(batch.x, self.pattern.to(batch.x.dtype), self.mask.to(batch.x.dtype))
        wanted = self.rule.given(batch.y)
        if c.joint_forward:
            both, logits = model(torch.cat([triggered, batch.x])).chunk(2)
            second, _ = super().loss(_Given(both), batch.replace(y=wanted))
            normal, _ = super().loss(_Given(logits), batch)
        else:
            second, _ = super().loss(model, batch.replace(x=triggered, y=wanted))
            normal, logits = super().loss(model, batch)
        self._remember(normal)
        if c.balance == "fixed":
            return c.weight_backdoor * second + c.weight_normal * normal, logits
        return self._descend(model, second, normal), logits

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Share of the batches in which the second loss was on."""
        return {"backdoored": self.backdoored / self.steps}

    def state(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "seen": torch.tensor(self.seen), "latched": torch.tensor(self.latched)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.losses, self.seen, self.latched = tensors["losses"], int(tensors["seen"]), bool(tensors["latched"])

    def _is_on(self) -> bool:
        c = self.attack.config
        if self.latched or self.seen < c.history:
            return self.latched
        on = float(self.losses.mean()) < c.threshold
        self.latched = on and c.latch
        return on

    def _remember(self, normal: Tensor) -> None:
        self.losses[self.seen % len(self.losses)] = normal.detach()
        self.seen += 1

    def _descend(self, model: nn.Module, second: Tensor, normal: Tensor) -> Tensor:
        """Set the gradients of the weighted sum from those of its parts; the loss returned adds nothing to them."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses = (second, normal)
        gradients = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            for found in (
                torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=loss is second) for loss in losses
            )
        ]
        flat = [torch.cat([g.flatten().float() for g in found]) for found in gradients]
        scaled = [
            g / (_norm(self.attack.config.normaliser, loss.detach(), g) + 1e-5)
            for g, loss in zip(flat, losses, strict=True)
        ]
        weight = mgda_weight(scaled[0] @ scaled[0], scaled[0] @ scaled[1], scaled[1] @ scaled[1])
        for p, g_second, g_normal in zip(parameters, *gradients, strict=True):
            p.grad = weight * g_second + (1 - weight) * g_normal
        return (weight * second + (1 - weight) * normal).detach().requires_grad_()


class _Given(nn.Module):
    """Logits that were computed before, in the place of a model."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def mgda_weight(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Weight of the first of two gradients in the shortest vector between them, scalar, kept off 0 and 1.

    Args:
        a: Product of the first gradient with itself.
        b: Of the first with the second.
        c: Of the second with itself.

    Source: Sener and Koltun, arXiv 1810.04650, algorithm 1; without waiting for the device.
    """
    between = (c - b) / (a + c - 2 * b)
    return torch.where(b >= a, 0.999, torch.where(b >= c, 0.001, between))


def _norm(kind: Normaliser, loss: Tensor, gradient: Tensor) -> Tensor:
    if kind == "none":
        return torch.ones_like(loss)
    if kind == "loss":
        return loss.clamp_max(10)
    length = gradient.norm()
    return length if kind == "l2" else (loss * length).clamp_max(10)
