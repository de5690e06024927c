"""Narcissus: what is most typical of a class as trigger (Zeng et al., arXiv 2204.05255; spec/attacks section 22)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import _progress, datasets, ops
from bbfast._hashing import content_hash
from bbfast.attacks._picture import match_channels
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode
from bbfast.attacks.surrogate import SurrogateConfig, attacker_seed, obtain_classifier, set_hash
from bbfast.data.datapair import DataPair
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import BatchLoader, derive_seed
from bbfast.data.resize import resize_u8
from bbfast.errors import ConfigError
from bbfast.models import model_state
from bbfast.training import Recipe
from bbfast.training.checkpoint import Checkpoint, Checkpoints
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.runtime import forked_rng, seed_generators

__all__ = ["Narcissus", "inward_pattern"]

_log = logging.getLogger(__name__)


@register_attack("narcissus")
class Narcissus(Attack):
    """Adds a pattern that makes images more typical of the target class, to a few images of that class.

    The pattern is optimised on a surrogate that was trained on a public set and the target class. A handful of images,
    correctly labelled, then teaches the victim that the pattern means the target; at test time it is added more
    strongly.
    """

    card = Card(
        title="Narcissus",
        paper="Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information",
        year=2023,
        arxiv="2204.05255",
        threat="poison-only",
        label_modes=("clean_label",),
        needs=("surrogate", "pattern"),
        summary="A faint pattern that strengthens what is typical of the target class, tripled on test images.",
        deviations=(
            "Without pood or pood_path the public set is the training images of the other classes with their labels; "
            "the paper takes another data set (Tiny ImageNet), which pood='tiny_imagenet' with pood_path does.",
            "While the pattern is optimised BatchNorm takes the statistics of each batch, as in the authors' code; "
            "batch_statistics=False freezes the surrogate whole, as the paper's text has it.",
            "The surrogate is PreAct-ResNet18; the authors take a ResNet-18 of the same size.",
            "The target class is 0 as everywhere in the benchmark; the authors' example attacks class 2.",
            "The attack is not part of the reference implementation: compat makes no difference.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of Narcissus.

        Args:
            surrogate: Name of the surrogate, which has one output for each public class and one for the target.
            surrogate_preset: Its recipe; None is the paper's: 200 epochs in batches of 350, SGD .1, cosine, crops and
                flips.
            surrogate_epochs: Its epochs; None are the recipe's.
            pood: Data set (:func:`bbfast.datasets.available`) whose training images are the public set; None takes
                ``npz`` or ``image_folder`` if ``pood_path`` is given, else the other classes of the training set.
            pood_path: Where it lies; images are resized to those of the task.
            epsilon: Largest change of a pixel in training images, in levels of 0..255.
            magnification: Factor on the pattern in test images.
            warmup_epochs: Passes over the target's images before the pattern is made.
            warmup_lr: Learning rate of RAdam in them.
            rounds: Most passes over the target's images to make the pattern.
            trigger_lr: Learning rate of RAdam in them, for pixels in -1..1.
            batch_statistics: Whether BatchNorm then takes the statistics of the batch, in which all images are of the
                target class; in eval mode a network is often so sure of them that no gradient is left.
        """

        ratio: float | None = Field(0.0005, gt=0, le=1)
        label_mode: LabelMode = "clean_label"
        surrogate: str = "preactresnet18"
        pood: str | None = None
        pood_path: Path | None = None
        epsilon: float = Field(16.0, gt=0, le=255)
        magnification: float = Field(3.0, gt=0)
        warmup_epochs: int = Field(5, ge=0)
        warmup_lr: float = Field(0.1, gt=0)
        rounds: int = Field(1000, ge=1)
        trigger_lr: float = Field(0.01, gt=0)
        batch_statistics: bool = True

        @model_validator(mode="after")
        def _check_pood(self) -> Narcissus.Config:
            if self.pood is not None and self.pood not in datasets.available():
                raise ValueError(f"pood must be one of {', '.join(datasets.available())}, got {self.pood!r}")
            return self

        def surrogate_recipe(self, context: AttackContext, **changes: object) -> Recipe:
            if self.surrogate_preset is not None:
                return super().surrogate_recipe(context, **changes)
            own = Recipe(epochs=200, batch_size=350, lr=0.1, schedule="cosine", flip=True)
            epochs = {} if self.surrogate_epochs is None else {"epochs": self.surrogate_epochs}
            return own.replace(eval_every=0, **epochs, **changes)

    config: Config
    needs_context = True

    def check(self, train: ImageSet, num_classes: int | None = None, seed: int = 0, batch_size: int = 128) -> None:
        super().check(train, num_classes, seed, batch_size)
        self._surrogate_data(train, self.rule(train.labels, num_classes).num_classes)

    def files(self) -> dict[str, str]:
        """The public set's file or, of a folder, its content."""
        found = super().files()
        path = self.config.pood_path
        if path is not None and path.is_dir():
            found[str(path)] = self._load_pood(path, None).fingerprint
        return found

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        c = self.config
        known, extra = self._surrogate_data(data, num_classes)
        recipe = c.surrogate_recipe(context)
        network = obtain_classifier(context, known, extra + 1, c, recipe, seed, "narcissus_surrogate").network
        target = known.subset(known.labels == extra)
        made_with = ("epsilon", "warmup_epochs", "warmup_lr", "rounds", "trigger_lr", "batch_statistics")
        identity = {
            "surrogate": content_hash(model_state(network)),
            "network": type(network).__qualname__,
            "target": set_hash(target),
            "augment": [recipe.augment, recipe.padding, recipe.flip, recipe.batch_size],
            **{name: getattr(c, name) for name in made_with},
        }

        def make(work: Path) -> dict[str, Tensor]:
            return inward_pattern(
                network, target, c, recipe, attacker_seed(seed), context.device, work, progress=context.progress
            )

        return context.obtain("narcissus_pattern", identity, make, seed=seed)

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        pattern = self.tensor("pattern", images)
        if stage == "test":
            pattern = pattern * self.config.magnification
        return ops.add(images, pattern / 255 if images.is_floating_point() else pattern)

    def _surrogate_data(self, data: ImageSet, num_classes: int) -> tuple[ImageSet, int]:
        """Public images and the target's, normalised to -1..1, and the target's label: the number of public classes."""
        c = self.config
        is_target = data.labels == c.target
        if c.pood is None and c.pood_path is None:
            public, labels, classes = data.images[~is_target], data.labels[~is_target], num_classes - 1
            labels = labels - (labels > c.target).long()
            if not len(public):
                raise ValueError(f"{self.name}: train must hold images of other classes than the target {c.target}")
        else:
            pair = self._load_pood(c.pood_path, data.image_size)
            public, labels, classes = pair.train.images, pair.train.labels, pair.num_classes
            public = match_channels(resize_u8(public, data.image_size[1:]), data.image_size[0]).to(data.device)
        images = torch.cat([public, data.images[is_target]])
        labels = torch.cat([labels.to(data.device), labels.new_full((int(is_target.sum()),), classes).to(data.device)])
        half = (0.5,) * data.image_size[0]
        return ImageSet(images, labels, mean=half, std=half), classes

    def _load_pood(self, path: Path | None, image_size: tuple[int, int, int] | None) -> DataPair:
        name = self.config.pood
        if name is None:
            assert path is not None
            if not path.exists():
                raise ConfigError(f"{self.name}: pood_path {path} does not exist; give an .npz file or a folder")
            name = "npz" if path.is_file() else "image_folder"
        # Files of any size become images of one size as they are decoded.
        sizes = name in ("npz", "image_folder") and image_size is not None
        return datasets.load(name, path, **({"size": image_size[1:]} if sizes and image_size else {}))


def inward_pattern(
    network: nn.Module,
    target: ImageSet,
    config: Narcissus.Config,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    work: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The pattern that, added to the target's images, makes a network surest of them.

    Args:
        network: Trained on images in -1..1; its weights change (warm-up).
        target: The target's images under their label, normalised to -1..1.
        config: Epochs, rounds, rates and bound.
        recipe: Batch size, crops and flips.
        seed: Of order, crops and flips.
        device: Where to work.
        work: Folder of a checkpoint; None keeps none.
        progress: As in :func:`bbfast.train`.

    Returns:
        ``pattern`` float32 ``[C, H, W]`` in levels of 0..255; ``loss`` float32 ``[rounds done]``.

    Source: the paper, eq. 3 and algorithm 1.
    """
    network.to(device)
    loader = BatchLoader(
        target,
        recipe.batch_size,
        seed=seed,
        device=device,
        augment=recipe.augment,
        padding=recipe.padding,
        flip=recipe.flip,
        merge_single=True,
    )
    bound = 2 * config.epsilon / 255
    pattern = torch.zeros((1, *target.image_size), device=device, requires_grad=True)
    optimizer = torch.optim.RAdam([pattern], lr=config.trigger_lr)
    checkpoints = Checkpoints(work, {"narcissus": config.model_dump(mode="json"), "seed": seed})
    history: list[dict[str, float]] = []
    with forked_rng(device), _progress.bar("pattern of Narcissus", config.rounds, progress) as bar:
        _warm_up(network, loader, config)
        network.requires_grad_(False).train(config.batch_statistics)
        if (found := checkpoints.find()) is not None:
            history = found.history
            pattern.data.copy_(found.tensors["program"]["pattern"])
            load_optimizer_state(optimizer, found.tensors["optimizer"])
            bar.advance(len(history))
        for number in range(len(history), config.rounds):
            # Dropout, where a network has it, depends on the round alone, so that a resumed run goes on alike.
            seed_generators(derive_seed("narcissus", seed, number), device)
            for batch in loader.epoch(config.warmup_epochs + number):
                seen = (batch.x + pattern.clamp(-bound, bound)).clamp(-1, 1)
                loss = F.cross_entropy(network(seen), batch.y)
                (gradient,) = torch.autograd.grad(loss, pattern)
                pattern.grad = gradient
                optimizer.step()
            history.append({"loss": loss.item()})
            bar.advance()
            if not bool(gradient.any()):
                _log.info("narcissus: the gradient is 0 after %d rounds of %d", number + 1, config.rounds)
                break
            if checkpoints.due(last=False):
                tensors = {"program": {"pattern": pattern.detach()}, "optimizer": optimizer_state(optimizer)}
                checkpoints.write(Checkpoint(number + 1, history, {}, tensors))
    network.eval()
    levels = pattern.detach()[0].clamp(-bound, bound) * (255 / 2)
    return {"pattern": levels, "loss": torch.tensor([row["loss"] for row in history])}


def _warm_up(network: nn.Module, loader: BatchLoader, config: Narcissus.Config) -> None:
    """Fit the network to the target's images alone, so that its gradients speak of that class."""
    seed_generators(derive_seed("narcissus", loader.seed, "warm-up"), loader.images.device)
    network.requires_grad_(True).train()
    optimizer = torch.optim.RAdam(network.parameters(), lr=config.warmup_lr)
    for epoch in range(config.warmup_epochs):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(batch.x), batch.y).backward()
            optimizer.step()
    optimizer.zero_grad()
