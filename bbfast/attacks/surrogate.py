"""The attacker's own classifier: trained on the clean data, plainly or adversarially, and kept as a prerequisite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.attacks.config import AttackConfig
from bbfast.attacks.prerequisites import AttackContext, seeded_model
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.data.normalize import normalize
from bbfast.errors import UnknownNameError
from bbfast.models import info, load_state, model_state
from bbfast.training import Program, Recipe, train
from bbfast.training.prediction import evaluating

__all__ = [
    "Classifier",
    "PgdProgram",
    "SurrogateConfig",
    "attacker_seed",
    "clean_surrogate",
    "l2_pgd",
    "linf_pgd",
    "new_network",
    "obtain_classifier",
    "robust_surrogate",
    "set_hash",
]


class SurrogateConfig(AttackConfig):
    """Settings of attacks that make their trigger with a classifier of the attacker's own.

    Args:
        surrogate: Name of its model; None takes the victim's architecture (``preactresnet18`` if there is no victim).
        surrogate_preset: Its recipe; None takes the victim's.
        surrogate_epochs: Its epochs; None are the recipe's.
    """

    surrogate: str | None = None
    surrogate_preset: Literal["paper", "quick"] | None = None
    surrogate_epochs: int | None = Field(None, ge=1)

    @field_validator("surrogate")
    @classmethod
    def _check_surrogate(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                info(name)
            except UnknownNameError as error:
                raise ValueError(str(error)) from None
        return name

    def surrogate_recipe(self, context: AttackContext, **changes: Any) -> Recipe:
        """The recipe that the settings ask for, with ``changes``."""
        recipe = context.recipe
        if self.surrogate_preset is not None:
            name = self.surrogate or context.model
            recipe = Recipe.preset(self.surrogate_preset, context.dataset, name, compat=self.compat)
        if self.surrogate_epochs is not None:
            changes["epochs"] = self.surrogate_epochs
        return recipe.replace(**{"eval_every": 0, **changes})


class Classifier(nn.Module):
    """A trained network that takes images in 0..1, in eval mode, its weights frozen; gradients flow to the images.

    Args:
        network: The network.
        mean: Normalisation that it was trained with.
        std: Normalisation that it was trained with.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network, self.mean, self.std = network.requires_grad_(False), mean, std
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of float images ``[B, C, H, W]`` in 0..1."""
        logits: Tensor = self.network(normalize(images, self.mean, self.std))
        return logits

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def unnormalised(self) -> Classifier:
        """The same network fed images in 0..1 as they are, as the reference implementation crafts its triggers."""
        channels = len(self.mean)
        return Classifier(self.network, (0.0,) * channels, (1.0,) * channels)

    def describe(self) -> dict[str, Any]:
        """What a prerequisite made with it is found by: weights and normalisation, fit for JSON."""
        return {"weights": content_hash(self.network.state_dict()), "normalisation": [self.mean, self.std]}


def clean_surrogate(
    context: AttackContext, data: ImageSet, num_classes: int, config: SurrogateConfig, seed: int
) -> Classifier:
    """A classifier trained on the clean training set, from the context's store or trained now.

    Args:
        context: Where to work and keep it.
        data: The clean training set.
        num_classes: K.
        config: Which model and recipe.
        seed: Of weights and batches.
    """
    return obtain_classifier(context, data, num_classes, config, config.surrogate_recipe(context), seed, "surrogate")


def robust_surrogate(
    context: AttackContext, data: ImageSet, num_classes: int, config: SurrogateConfig, recipe: Recipe, seed: int
) -> Classifier:
    """An adversarially trained classifier on images in 0..1, not normalised (spec/attacks section 3).

    Args:
        context: Where to work and keep it.
        data: The clean training set.
        num_classes: K.
        config: Which model.
        recipe: How it is trained.
        seed: Of weights, batches and starting points.
    """
    channels = data.image_size[0]
    plain = dataclasses.replace(data, mean=(0.0,) * channels, std=(1.0,) * channels)
    return obtain_classifier(context, plain, num_classes, config, recipe, seed, "robust_surrogate", PgdProgram())


class PgdProgram(Program):
    """Adversarial training with PGD (Madry et al., arXiv 1706.06083): each batch is replaced by its attacked images.

    Args:
        epsilon: Largest change of a pixel, in 0..1 units.
        step: Size of a step.
        steps: Steps, from a random start.
    """

    def __init__(self, epsilon: float = 8 / 255, step: float = 2 / 255, steps: int = 10) -> None:
        self.epsilon, self.step, self.steps = epsilon, step, steps

    def make_batch(self, batch: Batch) -> Batch:
        # Overridden for what it brings: float32 pixels. In bf16 half a step of the attack is lost to rounding.
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        start = torch.empty_like(batch.x).uniform_(-self.epsilon, self.epsilon)
        # The attack sees the network as it would be used; its passes must not count in BatchNorm's averages.
        with evaluating(model):
            attacked = linf_pgd(model, batch.x, batch.y, self.epsilon, self.step, self.steps, start)
        return super().loss(model, batch.replace(x=attacked))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "epsilon": self.epsilon, "step": self.step, "steps": self.steps}


def linf_pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    step: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Images of a larger cross-entropy within ``epsilon`` of each pixel and within 0..1: projected gradient ascent.

    Args:
        model: Takes images in 0..1.
        images: float ``[B, C, H, W]``, 0..1.
        labels: int64 ``[B]``.
        epsilon: Largest change, in 0..1 units.
        step: Size of a step.
        steps: Number of steps.
        start: First change, ``[B, C, H, W]``; None starts at the images.

    Returns:
        Like ``images``, detached.
    """
    low, high = (images - epsilon).clamp_min(0), (images + epsilon).clamp_max(1)
    x = images if start is None else torch.minimum(torch.maximum(images + start, low), high)
    for _ in range(steps):
        x = torch.minimum(torch.maximum(x + step * _gradient(model, x, labels).sign(), low), high)
    return x


def l2_pgd(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step: float, steps: int) -> Tensor:
    """As :func:`linf_pgd` without a random start, within ``epsilon`` of each image in L2 norm.

    Steps go along the gradient, normalised for each image.
    """
    x = images.detach()
    for _ in range(steps):
        change = x + step * _unit(_gradient(model, x, labels)) - images
        norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
        x = (images + change * (epsilon / norm).clamp_max(1).view(-1, 1, 1, 1)).clamp(0, 1)
    return x


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of each image's cross-entropy with respect to it."""
    x = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(x).float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def _unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def set_hash(data: ImageSet) -> str:
    """SHA-256 over pixels and labels: what a prerequisite made from a set is found by."""
    return content_hash({"images": data.images, "labels": data.labels})


def new_network(
    context: AttackContext, name: str | None, image_size: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """A newly initialised network of the attacker's; ``name`` None takes the victim's architecture.

    Its weights are not those that a victim of the same seed starts from: the attacker does not know them.
    """
    seed = attacker_seed(seed)
    return context.fresh_model(seed) if name is None else seeded_model(name, num_classes, image_size, seed)


def attacker_seed(seed: int) -> int:
    """The seed of the attacker's own trainings: with the victim's the surrogate would be its twin, bit for bit."""
    return derive_seed("attacker", seed) % 2**32


def obtain_classifier(
    context: AttackContext,
    data: ImageSet,
    num_classes: int,
    config: SurrogateConfig,
    recipe: Recipe,
    seed: int,
    kind: str,
    program: Program | None = None,
) -> Classifier:
    """A classifier trained as asked, from the context's store or trained now.

    Args:
        context: Where to work and keep it.
        data: What it is trained on.
        num_classes: K.
        config: Which model.
        recipe: How it is trained.
        seed: Of the attack; weights and batches get one derived from it.
        kind: What it is called in the store.
        program: What happens within a step; None is plain supervised training.
    """
    program = Program() if program is None else program
    network = new_network(context, config.surrogate, data.image_size, num_classes, seed)
    identity = {
        "initial_weights": content_hash(network.state_dict()),
        "network": type(network).__qualname__,
        "recipe": recipe.model_dump(mode="json"),
        "data": set_hash(data),
        "normalisation": [data.mean, data.std],
        "program": program.describe(),
    }

    def make(work: Path) -> dict[str, Tensor]:
        name = kind.replace("_", " ")
        train(
            network,
            data,
            recipe,
            seed=attacker_seed(seed),
            device=context.device,
            program=program,
            checkpoint=work,
            progress=context.progress,
            description=f"{name} of the attacker",
        )
        return model_state(network)

    load_state(network, context.obtain(kind, identity, make, seed=seed))
    return Classifier(network.to(context.device), data.mean, data.std)
