"""NPD: neural polarizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast import models
from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import denormalize, normalize
from bbfast.defenses._diverged import lower
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import batch_size_for
from bbfast.defenses.mitigation._optimise import float32_recipe, optimise
from bbfast.defenses.mitigation._perturb import project_, start
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, UnsupportedModelError
from bbfast.training.prediction import evaluating, probe
from bbfast.training.program import Batch, Program, derive_seed

if TYPE_CHECKING:
    from bbfast.training import Recipe

__all__ = ["NPD", "NPDConfig", "Polarizing", "Warmup", "away_from", "place"]

_BATCH = 128


class NPDConfig(DefenseConfig):
    """Settings of NPD. The values that differ between data sets are the published ones; they were tuned.

    Args:
        layer: In front of which layer the polarizer goes: ``last_block_conv1`` (found by the architecture, see
            :func:`place`) or a dotted name.
        structure: ``convbn``, ``conv`` or ``linear``, see :class:`bbfast.models.additions.polarizer.Polarizer`.
        warmup_epochs: Passes in which the polarizer's BatchNorm settles, on the clean loss (0 on Tiny ImageNet).
        warmup_lr: Their learning rate.
        epochs: Passes of the polarizing (100 on CIFAR-100, 200 on the digits).
        lr: Their learning rate.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty.
        batch_size: Samples a step. None is 128 on hold-outs of the paper's sizes and less on smaller ones.
        norm_type: Norm that bounds the perturbation.
        trigger_norm: Its bound, in 0..1 units of pixels (5 on GTSRB and the digits, 6 on Tiny ImageNet).
        inner_steps: Steps of the perturbation.
        adv_lr: Their length.
        sign: Step along the sign of the gradient, or (Tiny ImageNet) along the gradient.
        init: Where the perturbation starts: ``zero``, ``max`` (``+trigger_norm`` at every pixel), ``min``, ``random``.
        lambdas: Weights of the clean loss, of the present prediction on perturbed images, of leaving what they are
            taken for, and of leaving the class they were pushed to.
        stop_rate: The search ends when more than this part of the batch is taken for its target.
        channels_last: Memory layout; ``auto`` where the device gains.
        stratified: Draw the hold-out by class, as the reference does.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "bbfast": {},
        "reference": {"batch_size": 128},
        "paper": {},
        "linf": {"norm_type": "linf", "trigger_norm": 0.2, "adv_lr": 0.44, "inner_steps": 10, "init": "max"},
    }
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "gtsrb": {"trigger_norm": 5.0, "lambdas": (1.0, 0.5, 0.5, 0.5)},
        "tiny_imagenet": {"trigger_norm": 6.0, "lambdas": (1.0, 1.0, 0.1, 0.1), "warmup_epochs": 0, "sign": False},
        "cifar100": {"epochs": 100, "batch_size": 256},
        # Ours: 70 images are five steps an epoch instead of 20; GTSRB's values, since within 3 the search reaches its
        # target on a sixth of the hold-out only, within 5 on half of it.
        "digits": {"epochs": 200, "trigger_norm": 5.0, "lambdas": (1.0, 0.5, 0.5, 0.5)},
    }

    layer: str = "last_block_conv1"
    structure: Literal["convbn", "conv", "linear"] = "convbn"
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(1e-4, gt=0)
    epochs: int = Field(50, ge=0)
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    batch_size: int | None = Field(None, ge=2)
    norm_type: Literal["l2", "linf"] = "l2"
    trigger_norm: float = Field(3.0, ge=0)
    inner_steps: int = Field(2, ge=0)
    adv_lr: float = Field(0.1, gt=0)
    sign: bool = True
    init: Literal["zero", "max", "min", "random"] = "zero"
    lambdas: tuple[float, float, float, float] = (1.0, 0.4, 0.4, 0.4)
    stop_rate: float = Field(0.6, gt=0, le=1)
    channels_last: bool | Literal["auto"] = "auto"
    stratified: bool = True

    @field_validator("lambdas")
    @classmethod
    def _weights(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if min(values) < 0 or not any(values):
            raise ValueError(f"expected four numbers >= 0, not all 0, got {values}")
        return values

    def recipe(self, view: DefenderView, size: int, epochs: int, lr: float) -> Recipe:
        """SGD at a constant rate, in float32, on images as they are stored."""
        return float32_recipe(
            view,
            epochs=epochs,
            batch_size=self.batch_size or min(_BATCH, batch_size_for(size)),
            lr=lr,
            optimizer="sgd",
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            channels_last=self.channels_last,
        )


def place(model: nn.Module, layer: str) -> tuple[str, bool]:
    """Name of the layer that the polarizer goes in front of, and whether that is an adaptation of the paper's choice.

    ``last_block_conv1`` is the first convolution of the last residual block; without such blocks the last convolution
    (VGG), the last block around a depthwise one (ConvNeXt), or the last encoder block (ViT).

    Raises:
        UnsupportedModelError: if there is none.
    """
    found = models.roles(model)
    known = {name for name, _ in found.model.named_modules()}
    if layer != "last_block_conv1":
        if layer not in known or not layer:
            raise UnsupportedModelError("npd", found.label, f"it has no layer {layer!r}", "give a dotted name")
        return layer, True
    if not found.has("last_conv"):
        raise UnsupportedModelError("npd", found.label, "its last convolution is not known", "name one with layer=...")
    name = found.names("last_conv")[0]
    parent = name.rpartition(".")[0]
    if name.endswith("conv2") and f"{parent}.conv1" in known:
        return f"{parent}.conv1", False
    module = found.model.get_submodule(name)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return parent.rpartition(".")[0], True
    return name, True


def away_from(probabilities: Tensor, classes: Tensor) -> Tensor:
    """``-log(1.0001 - p_c + 1e-12)`` of each sample, ``[B]``."""
    own = probabilities.gather(1, classes[:, None])[:, 0]
    return -(1.0001 - own + 1e-12).log()


def _best_but(logits: Tensor, labels: Tensor) -> Tensor:
    """The most likely class other than ``labels``, int64 ``[B]``."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


class Warmup(Program):
    """Clean cross-entropy with the polarizer in train mode and the network around it in eval mode.

    Args:
        layer: The layer whose ``polarizer`` is trained.
    """

    warm: ClassVar[bool] = True

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "layer": self._layer}

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self._model = model

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self._model.eval()
        polarizer = self._model.get_submodule(f"{self._layer}.polarizer")
        polarizer.train(self.warm)


class Polarizing(Warmup):
    """For each batch targeted perturbations, and a step that keeps clean predictions and turns perturbed ones.

    Args:
        layer: The layer whose ``polarizer`` is trained.
        config: Settings.
    """

    warm: ClassVar[bool] = False

    def __init__(self, layer: str, config: NPDConfig) -> None:
        super().__init__(layer)
        self._config = config

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "settings": self._config.model_dump(mode="json", exclude={"epochs", "preset"})}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        super().epoch_start(epoch, steps, batch_size)
        self._hits = torch.zeros((), device=self.device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        weights = self._config.lambdas
        logits = model(batch.x)
        targets, guess = _best_but(logits, batch.y), logits.detach().argmax(dim=1)
        with evaluating(model):
            perturbed = model(self.search(model, batch, targets))
        probabilities = perturbed.softmax(dim=1)
        top = perturbed.detach().argmax(dim=1)
        taken_for = torch.where(top == batch.y, _best_but(perturbed, batch.y), top)
        self._hits += (top == targets).sum()
        value = weights[0] * F.cross_entropy(logits, batch.y) + weights[1] * F.cross_entropy(perturbed, guess)
        value = value + weights[2] * away_from(probabilities, taken_for).mean()
        return value + weights[3] * away_from(probabilities, targets).mean(), logits

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        return {"reached_target": float(self._hits) / len(self.train)}

    def search(self, model: nn.Module, batch: Batch, targets: Tensor) -> Tensor:
        """Perturbed images, normalised and within 0..1, that the model tends to take for ``targets``."""
        config, (mean, std) = self._config, (self.train.mean, self.train.std)
        pixels = denormalize(batch.x, mean, std)
        seed = derive_seed("npd", self.seed, batch.epoch, batch.step)
        delta = start(pixels, config.init, config.norm_type, config.trigger_norm, seed)
        for _ in range(config.inner_steps):
            leaf = delta.detach().requires_grad_()
            logits = model(normalize((pixels + leaf).clamp(0, 1), mean, std))
            if float((logits.detach().argmax(dim=1) == targets).float().mean()) > config.stop_rate:
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets).clamp(-80, 80), leaf)
            step = gradient.sign() if config.sign else gradient
            delta = project_(leaf.detach() - config.adv_lr * step, config.norm_type, config.trigger_norm)
        return normalize((pixels + delta.detach()).clamp(0, 1), mean, std)


@register_defense("npd")
class NPD(Defense):
    """Put one linear layer into the frozen network and train it to filter triggers out.

    The layer mixes channels at every position, starts as the identity, and stands in front of the first convolution of
    the last block. After a warm-up of its BatchNorm each batch of the clean hold-out is perturbed within
    ``trigger_norm`` towards the most likely wrong class t, and the layer descends ``l1 CE(f(x), y) + l2 CE(f(x'), y^) +
    l3 away(y') + l4 away(t)``: y^ is the present prediction on x, y' what x' is taken for (or the runner-up), and
    ``away(c) = -log(1.0001 - p_c(x'))``.

    The model that is returned has the layer inside, under ``<layer>.polarizer``; all other tensors are bit-identical to
    those that came, under the same names. Its plan names the layer, so it is saved and loaded whole. Nothing is
    selected.

    Source: Zhu et al., NeurIPS 2023, arXiv 2306.16697, algorithm 1. Deviations: see the card.
    """

    card = DefenseCard(
        title="Neural Polarizer",
        paper="Zhu, Wei, Zha, Wu, NeurIPS 2023",
        year=2023,
        arxiv="2306.16697",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Inserts one layer into the frozen model and trains it to filter triggers out.",
        deviations=(
            "The model returned contains the polarizer; the reference stores the backdoored model, and the layer in a "
            "second file.",
            "The polarizer is part of its layer; the reference hooks a global one.",
            "Networks other than residual ones are supported by adaptation (info.adapted); the reference asserts "
            "PreAct-ResNet18.",
            "Published settings that differ between data sets were tuned, presumably on test results; they are kept.",
            "On hold-outs under about 750 images the batch shrinks so that an epoch keeps about 8 steps "
            "(preset='reference' keeps 128).",
        ),
    )
    Config = NPDConfig

    def check(self, view: DefenderView) -> None:
        layer, _ = place(view.model, self.config.layer)
        if hasattr(view.model.get_submodule(layer), "polarizer"):
            raise ConfigError(f"defense npd: layer {layer!r} has a polarizer already; name another with layer=...")

    def run(self, view: DefenderView) -> DefenseResult:
        config: NPDConfig = self.config
        model, clean = view.model, view.clean
        layer, adapted = place(model, config.layer)
        channels = _channels(model, layer, view.image_size)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        for p in model.parameters():
            p.requires_grad_(False)
        models.add(model, "polarizer", layer=layer, channels=channels, structure=config.structure)
        history: list[dict[str, Any]] = []
        phases = (
            ("warmup", Warmup(layer), config.warmup_epochs, config.warmup_lr),
            ("polarizing", Polarizing(layer, config), config.epochs, config.lr),
        )
        for tag, program, epochs, lr in phases:
            recipe = config.recipe(view, len(clean), epochs, lr)
            remedy = lower(config, *(("warmup_lr",) if tag == "warmup" else ("adv_lr", "lr")))
            rows = optimise(model, clean, view, recipe, program, tag=tag, remedy=remedy, free=False)
            history += [{"phase": tag, **row} for row in rows]
        for p, flag in flags:
            p.requires_grad_(flag)
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            history=history,
            info={"layer": layer, "channels": channels, "adapted": adapted},
        )


def _channels(model: nn.Module, layer: str, image_size: tuple[int, int, int]) -> int:
    """Channels of what comes into ``layer``: maps ``[B, C, h, w]`` or tokens ``[B, T, C]``."""
    shapes: list[torch.Size] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    probe(model, image_size, [handle])
    if not shapes or len(shapes[0]) not in (3, 4):
        shown = list(shapes[0]) if shapes else "nothing"
        reason = f"layer {layer!r} receives {shown}, not maps [B, C, h, w] or tokens [B, T, C]"
        raise UnsupportedModelError("npd", models.roles(model).label, reason)
    return shapes[0][1] if len(shapes[0]) == 4 else shapes[0][2]
