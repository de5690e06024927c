"""LIRA: an invisible perturbation that a generator learns (Doan et al., ICCV 2021; spec/attacks section 15)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bbfast.attacks._augment import TensorAugment, keep_layout
from bbfast.attacks._lira_nets import Autoencoder, UNet
from bbfast.attacks._networks import TrainedNetwork, apply_network, initial, refuse_fp16
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelRule
from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.data.loader import Batch
from bbfast.data.normalize import NORMALIZATION
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["Lira", "LiraProgram"]

_SMALLEST = 16
_CHUNK = 1024
_REFERENCE_RANGE = {
    "cifar10": (-1.9895, 2.1309),
    "cifar100": (-1.8974, 2.0243),
    "gtsrb": (0.0, 1.0),
    "tiny_imagenet": (-2.1179, 2.64),
}


@register_attack("lira")
class Lira(Attack):
    """A generator learns a perturbation of at most ``eps`` for each image, the classifier learns to obey it.

    Stage 1 alternates: the generator takes a step against the classifier, which takes one on clean and triggered
    images, the latter made by the generator of an epoch before. Stage 2 tunes the classifier with the generator fixed.
    ``ratio`` says how much of the set that data-based defenses are given is poisoned; training mixes two losses.
    """

    card = Card(
        title="LIRA",
        paper="LIRA: Learnable, Imperceptible and Robust Backdoor Attacks",
        year=2021,
        arxiv="",
        threat="training-controlled",
        label_modes=("all2one", "all2all"),
        summary="A generator learns an imperceptible perturbation of each image.",
        deviations=(
            "Triggered images are clipped to each channel's own range; the reference clips all channels to the widest "
            "one, and values beyond wrap around when stored (compat='reference' does so).",
            "The classifier's gradients from the generator's step are dropped; the reference adds them to its next "
            "ones (compat='reference' does so).",
            "The result is the classifier after both stages; the reference stores the one after stage 1 "
            "(compat='reference' does so).",
            "ASR is measured on float images (store_float), because 8 bits leave little of the perturbation; the "
            "reference measures on 8 bits (compat='reference' does so).",
            "Stage 1 gets a sixth of the recipe's epochs, the published share, unless both_train_epochs is given.",
            "Training runs in float32 whatever the recipe's precision: bf16 rounds the perturbation away.",
            "Augmentation is drawn for each sample; the reference draws it once a batch (compat='reference' does so).",
            "A set of ratio poisoned samples is exported for data-based defenses; the reference exports none.",
        ),
    )

    class Config(AttackConfig):
        """Settings of LIRA.

        Args:
            eps: Largest change in stage 1 and in training images.
            test_eps: The same in stage 2 and in test images; None: ``eps``.
            eps_space: What these are measured in: ``norm``, normalised images (of which 0.01 is 0.6 grey levels on
                cifar10); ``unit``, 0..1.
            alpha: Weight of the clean loss in stage 1, the triggered one has the rest.
            test_alpha: The same in stage 2.
            generator: ``autoencoder`` or ``unet``.
            lr_generator: Learning rate of Adam for the generator.
            both_train_epochs: Epochs of stage 1, at the start of the recipe's; None: a sixth.
            fix_generator_epoch: The classifier's generator is renewed every so many epochs.
            store_float: Keep the float test images for the evaluation; None: yes, no in reference mode.
            joint_forward: Run clean and triggered images through the classifier together, which changes BatchNorm's
                statistics.
            random_crop: Zero padding of the crop, in pixels.
            random_rotation: Largest rotation, in degrees.
        """

        eps: float = Field(0.01, gt=0)
        test_eps: float | None = Field(None, gt=0)
        eps_space: Literal["norm", "unit"] = "norm"
        alpha: float = Field(0.5, ge=0, lt=1)
        test_alpha: float = Field(0.5, ge=0, lt=1)
        generator: Literal["autoencoder", "unet"] = "autoencoder"
        lr_generator: float = Field(1e-4, gt=0)
        both_train_epochs: int | None = Field(None, ge=1)
        fix_generator_epoch: int = Field(1, ge=1)
        store_float: bool | None = None
        joint_forward: bool = False
        random_crop: int = Field(5, ge=0)
        random_rotation: float = Field(10.0, ge=0, le=180)

    config: Config
    learns_trigger = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        """An untrained generator; the training puts the trained one in its place."""
        channels, height, width = data.image_size
        if min(height, width) < _SMALLEST:
            raise ValueError(f"{self.name}: images must be at least 16 x 16, got {height} x {width}")
        net = initial(self.network(channels), self.name, seed)
        mean, std = (torch.tensor(v).view(channels, 1, 1) for v in (data.mean, data.std))
        low, high = self._range(data.mean, data.std)
        own = {f"generator.{key}": value for key, value in net.state_dict().items()}
        return {**own, "mean": mean, "std": std, "low": low, "high": high}

    def network(self, channels: int) -> Callable[[], nn.Module]:
        """How the generator is built for images of C channels."""
        return partial(Autoencoder if self.config.generator == "autoencoder" else UNet, channels)

    def strength(self, stage: Stage) -> float:
        """Largest change, in ``eps_space``."""
        c = self.config
        return c.eps if stage == "train" or c.test_eps is None else c.test_eps

    def perturbed(self, x: Tensor, direction: Tensor, eps: float) -> Tensor:
        """Normalised images moved by ``eps`` times the generator's output and clipped, float ``[B, C, H, W]``."""
        scale = eps / self.tensor("std", x) if self.config.eps_space == "unit" else eps
        return (x + scale * direction).clamp(self.tensor("low", x), self.tensor("high", x))

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        mean, std, exact = self.tensor("mean", images), self.tensor("std", images), images.is_floating_point()
        x = ((images.float() if exact else images.float() / 255) - mean) / std
        direction = apply_network(self.network(images.shape[1]), self.tensors, "generator", x)
        out = self.perturbed(x, direction, self.strength(stage)) * std + mean
        if exact:
            return out.to(images.dtype)
        if self.config.compat == "reference":
            return (out * 255).to(torch.int32).to(torch.uint8)  # cut off, and wrapped around where out of range
        return (out * 255).round().clamp(0, 255).to(torch.uint8)

    def program(self, rule: LabelRule) -> LiraProgram:
        return LiraProgram(self, rule)

    def recipe_overrides(self, recipe: Recipe) -> dict[str, Any]:
        """Three times the protocol's epochs (300, 150, 600), of which stage 1 is a sixth; MultiStep in stage 2."""
        milestones = (50, 100, 150, 200)
        return {"epochs": 3 * recipe.epochs, "schedule": "multistep", "milestones": milestones, "gamma": 0.1}

    def first_stage(self, recipe: Recipe) -> int:
        """Epochs of stage 1.

        Raises:
            ValueError: if the recipe has fewer.
        """
        given = self.config.both_train_epochs
        epochs = max(1, round(recipe.epochs / 6)) if given is None else given
        if epochs > recipe.epochs:
            raise ValueError(
                f"{self.name}: the recipe must have at least the {epochs} epochs of stage 1 (both_train_epochs), got "
                f"{recipe.epochs}"
            )
        return epochs

    def _range(self, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Smallest and largest normalised value, ``[C, 1, 1]``."""
        shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
        low, high = -shift / scale, (1 - shift) / scale
        if self.config.compat == "paper":
            return low, high
        for name, (known, _) in NORMALIZATION.items():
            if known == tuple(mean) and name in _REFERENCE_RANGE:
                low, high = (torch.tensor(v).view(1, 1, 1) for v in _REFERENCE_RANGE[name])
        return low.min().expand_as(shift).clone(), high.max().expand_as(shift).clone()

    def _triggered(self, test: ImageSet, keep: Tensor, rule: LabelRule) -> BackdoorSet:
        made = super()._triggered(test, keep, rule)
        wanted = self.config.store_float
        if not (self.config.compat == "paper" if wanted is None else wanted):
            return made
        parts = [self.trigger(test.images[part].float() / 255, test.ids[part], "test") for part in keep.split(_CHUNK)]
        return dataclasses.replace(made, exact=torch.cat(parts))


class LiraProgram(Program):
    """Both stages of LIRA.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    augments_itself = True
    drop_last = False

    def __init__(self, attack: Lira, rule: LabelRule) -> None:
        self.attack, self.rule = attack, rule

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config), "rule": repr(self.rule)}

    def schedule_start(self, recipe: Recipe) -> int:
        return self.attack.first_stage(recipe)

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        c = self.attack.config
        refuse_fp16(recipe, self.attack.name)
        self.first_stage = self.attack.first_stage(recipe)
        self.augment = TensorAugment(
            c.random_crop, c.random_rotation, recipe.flip, per_sample=c.compat == "paper", p_crop=1.0, p_rotation=1.0
        )
        build = self.attack.network(train.image_size[0])
        # New ones, whatever the attack holds: a run is a function of its seed.
        working, self.fixed = (initial(build, self.attack.name, seed).to(device) for _ in range(2))
        self.working = TrainedNetwork("working", working, torch.optim.Adam(working.parameters(), lr=c.lr_generator))
        self.fixed.eval().requires_grad_(False)
        self.attack.tensors = {**self.attack.tensors, **self._published()}
        self.stage_one: dict[str, Tensor] = {}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        self.learning = epoch < self.first_stage
        self.working.network.train(self.learning)
        # Stage 1 has no weight decay, and stage 2 begins with an optimiser as new.
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0 if self.learning else self.recipe.weight_decay
        if epoch == self.first_stage:
            self.optimizer.state.clear()
        self.obeyed, self.seen = torch.zeros((), device=self.device), 0

    def make_batch(self, batch: Batch) -> Batch:
        if not self.recipe.augment:
            return batch
        x = self.augment(batch.x, batch.index, seed=self.seed, epoch=batch.epoch, step=batch.step)
        return batch.replace(x=keep_layout(x, batch.x))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        # In bf16 a change of 0.01 is lost beside a value of 2.
        with torch.autocast(self.device.type, enabled=False):
            wanted = self.rule.given(batch.y)
            # BatchNorm of the generator's narrowest layer cannot train on one image of 16 x 16.
            if self.learning and len(batch) > 1:
                self._teach(model, batch.x, wanted)
            return self._mixed(model, batch, wanted)

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        last_of_stage = epoch == self.first_stage - 1
        if self.learning and ((epoch + 1) % self.attack.config.fix_generator_epoch == 0 or last_of_stage):
            self.fixed.load_state_dict(self.working.network.state_dict())
        if self.attack.config.compat == "reference":
            if last_of_stage:
                self.stage_one = {name: value.clone() for name, value in model.state_dict().items()}
            if epoch == self.recipe.epochs - 1:
                model.load_state_dict(self.stage_one)
        return {"train_asr": float(self.obeyed) / self.seen}

    def state(self) -> dict[str, Tensor]:
        stage_one = {f"stage_one.{name}": value for name, value in self.stage_one.items()}
        return {**self.working.state(), **self._published(), **stage_one}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.working.load_state(tensors)
        for name, value in self._published().items():
            value.copy_(tensors[name])
        prefix = "stage_one."
        self.stage_one = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    def _published(self) -> dict[str, Tensor]:
        """The generator that the classifier learns, under the names of the attack's tensors."""
        return {f"generator.{name}": value for name, value in self.fixed.state_dict().items()}

    def _teach(self, model: nn.Module, x: Tensor, wanted: Tensor) -> None:
        """A step of the generator against the classifier."""
        triggered = self.attack.perturbed(x, self.working.network(x), self.attack.config.eps)
        value = F.cross_entropy(model(triggered).float(), wanted)
        if self.attack.config.compat == "reference":
            value.backward()  # the classifier's gradients stay, and the engine's backward adds to them
        else:
            parameters = list(self.working.network.parameters())
            for p, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                p.grad = gradient
        self.working.step()

    def _mixed(self, model: nn.Module, batch: Batch, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's loss on clean and triggered images."""
        c = self.attack.config
        eps, alpha = (c.eps, c.alpha) if self.learning else (self.attack.strength("test"), c.test_alpha)
        with torch.no_grad():
            triggered = keep_layout(self.attack.perturbed(batch.x, self.fixed(batch.x), eps), batch.x)
        if c.joint_forward:
            clean, bad = model(torch.cat([batch.x, triggered])).chunk(2)
        else:
            clean, bad = model(batch.x), model(triggered)
        self.obeyed += (bad.detach().argmax(1) == wanted).sum()
        self.seen += len(batch)
        smoothing = self.recipe.label_smoothing
        first, second = (
            F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
            for logits, y in ((clean, batch.y), (bad, wanted))
        )
        value = alpha * first + (1 - alpha) * second
        if self.recipe.flooding:
            value = (value - self.recipe.flooding).abs() + self.recipe.flooding
        return value, clean
