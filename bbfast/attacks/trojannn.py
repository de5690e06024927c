"""TrojanNN: a patch that drives chosen neurons (Liu et al., NDSS 2018; spec/attacks section 8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import _progress, ops
from bbfast._hashing import content_hash
from bbfast.attacks._picture import load_picture
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.attacks.randomness import make_key
from bbfast.attacks.surrogate import Classifier, SurrogateConfig, clean_surrogate
from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import normalize
from bbfast.models import features, roles

__all__ = ["TrojanNN", "drive_neurons", "square_picture", "strongest_neurons"]

_FROM, _TO = 0.65, 0.91
_GREY = 0.5
_REACHED = 1e-3


@register_attack("trojannn")
class TrojanNN(Attack):
    """Puts a small picture on the image, optimised so that two neurons of a clean model's last layer fire strongly."""

    card = Card(
        title="TrojanNN",
        paper="Trojaning Attack on Neural Networks",
        year=2018,
        threat="poison-only",
        label_modes=LABEL_MODES,
        needs=("surrogate",),
        summary="A patch that strongly excites chosen neurons replaces pixels.",
        deviations=(
            "The patch replaces pixels, as in the paper; the reference adds it in bytes that wrap around, so bright "
            "pixels become dark (compat='reference' does so).",
            "The surrogate sees normalised images, as it was trained; the reference optimises on unnormalised ones "
            "(compat='reference' does so).",
            "The best patch of the search is kept and rounded; the reference takes the last one and truncates it "
            "(compat='reference' does so).",
            "The reference's logo may not be redistributed: the default is a grey square of its place and size; "
            "mask_path takes your own picture.",
            "The paper retrains a downloaded model; as in the benchmark the victim learns from poisoned data.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of TrojanNN.

        Args:
            mask_path: Your own picture, resized to the images: where it is not black is the trigger, which starts from
                it. None: a grey square over rows and columns from 0.65 to 0.91 of the side.
            neurons: Number of neurons: those with the largest sum of absolute weights in the last linear layer.
            goal: Activation that they are driven to.
            iterations: Largest number of signed gradient steps.
            step: Size of a step, in 0..1 units.
            eps: Largest distance from the picture, in 0..1 units; 1 leaves it free.
            restarts: Patches optimised side by side, from random starts but for the first; the best is kept.
            opacity: Weight of the patch where it lies; not in reference mode, which adds.
        """

        mask_path: Path | None = None
        neurons: int = Field(2, ge=1)
        goal: float = 100.0
        iterations: int = Field(1000, ge=1)
        step: float = Field(0.1, gt=0, le=1)
        eps: float = Field(0.3, gt=0, le=1)
        restarts: int = Field(1, ge=1)
        opacity: float = Field(1.0, gt=0, le=1)

        @model_validator(mode="after")
        def _check_reference(self) -> TrojanNN.Config:
            if self.compat == "reference" and (self.opacity != 1 or self.restarts != 1):
                raise ValueError("compat 'reference' adds one patch: opacity and restarts must be 1")
            return self

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        c, reference = self.config, self.config.compat == "reference"
        picture = self._picture(data.image_size)
        surrogate = clean_surrogate(context, data, num_classes, c, seed)
        if reference:
            surrogate = surrogate.unnormalised()
        identity: dict[str, Any] = {
            "surrogate": surrogate.describe(),
            "picture": content_hash({"picture": picture}),
            "keeps": "last" if reference else "best",
            "settings": c.model_dump(include={"neurons", "goal", "iterations", "step", "eps", "restarts"}),
        }

        def make(_: Path) -> dict[str, Tensor]:
            patch, activation = drive_neurons(surrogate, picture, c, seed, not reference, context.progress)
            return {"patch": patch, "activation": activation}

        stored = context.obtain("trojannn_patch", identity, make, seed=seed)
        levels = stored["patch"] * 255
        return {
            "pattern": (levels.floor() if reference else levels.round()).to(torch.uint8),
            "mask": (picture > 0).any(0).float(),
            "activation": stored["activation"],
        }

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern, mask = self.tensor("pattern", images), self.tensor("mask", images)
        if self.config.compat == "reference":
            if images.is_floating_point():
                return torch.remainder(images * 255 + pattern, 256).clamp(max=255) / 255
            return images + pattern  # bytes wrap around
        if images.is_floating_point():
            pattern, mask = pattern.to(images.dtype) / 255, mask.to(images.dtype)
        return ops.patch(images, pattern, mask * self.config.opacity)

    def _picture(self, image_size: tuple[int, int, int]) -> Tensor:
        """Where the search starts, float ``[C, H, W]`` in 0..1, 0 outside the trigger."""
        if self.config.mask_path is None:
            return square_picture(image_size)
        picture = load_picture(self.config.mask_path, image_size).float() / 255
        if not bool(picture.any()):
            raise ValueError(f"{self.name}: mask_path {self.config.mask_path} is black everywhere: it has no trigger")
        return picture


def square_picture(image_size: tuple[int, int, int]) -> Tensor:
    """The built-in picture, float ``[C, H, W]``: a grey square low on the right, about 7 % of the area."""
    picture = torch.zeros(image_size)
    rows, columns = (
        slice(round(_FROM * side), max(round(_TO * side), round(_FROM * side) + 1)) for side in image_size[1:]
    )
    picture[:, rows, columns] = _GREY
    return picture


def strongest_neurons(network: nn.Module, count: int) -> Tensor:
    """Inputs of the last linear layer with the largest sum of absolute weights, int64 ``[count]``.

    Raises:
        ValueError: if the layer has fewer inputs.
        UnsupportedModelError: if the model has no linear layer.
    """
    weight = roles(network).module("classifier").weight
    assert isinstance(weight, Tensor)
    if count > weight.shape[1]:
        raise ValueError(
            f"trojannn: neurons must be at most {weight.shape[1]}, the inputs of the last layer, got {count}"
        )
    return weight.detach().abs().sum(0).topk(count).indices


def drive_neurons(
    surrogate: Classifier,
    picture: Tensor,
    config: TrojanNN.Config,
    seed: int,
    keep_best: bool = True,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Change a picture so that the strongest neurons come near their goal, on an otherwise black image.

    Args:
        surrogate: The classifier.
        picture: Start, float ``[C, H, W]`` in 0..1; what is 0 stays so.
        config: Neurons, goal, steps and bounds.
        seed: Of the random starts.
        keep_best: Whether the cheapest patch seen is returned, or the last one.
        progress: As in :func:`bbfast.train`.

    Returns:
        The patch ``[C, H, W]`` and the neurons' activations under picture and patch, float ``[2, neurons]``.
    """
    neurons = strongest_neurons(surrogate.network, config.neurons)

    def activations(x: Tensor) -> Tensor:
        h = features(surrogate.network, normalize(x, surrogate.mean, surrogate.std), "penultimate")
        return h[:, neurons]

    picture = picture.to(surrogate.device)
    keep = (picture > 0).float()
    low, high = (picture - config.eps).clamp_min(0), (picture + config.eps).clamp_max(1)
    generator = torch.Generator().manual_seed(make_key("trojannn", seed))
    noise = torch.rand(config.restarts, *picture.shape, generator=generator).to(picture.device) * 2 - 1
    noise[0] = 0
    x = ((picture + noise * config.eps).clamp(low, high)) * keep
    with torch.no_grad():
        before = activations(picture[None])[0]
    best, best_cost, best_activation = x[0], float("inf"), before
    with _progress.bar("trigger of TrojanNN", config.iterations, progress) as bar:
        for number in range(config.iterations + 1):
            x = x.detach().requires_grad_()
            h = activations(x)
            cost = (h - config.goal).square().sum(1)
            row = int(cost.argmin())
            lowest = float(cost.detach()[row])
            if not keep_best or lowest < best_cost:
                best, best_cost, best_activation = x[row].detach(), lowest, h[row].detach()
            if number == config.iterations or lowest < _REACHED:
                break
            (gradient,) = torch.autograd.grad(cost.sum(), x)
            x = (x.detach() - config.step * gradient.sign()).clamp(low, high) * keep
            bar.advance()
    return best, torch.stack([before, best_activation])
