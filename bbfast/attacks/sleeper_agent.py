"""Sleeper Agent: a hidden trigger by gradient matching (Souri et al., arXiv 2106.08970; spec/attacks section 21)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.attacks._matching import Matching, ShiftFlip, gradient_norms, loss_gradient
from bbfast.attacks.base import Attack, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode, LabelRule
from bbfast.attacks.randomness import integers, make_key
from bbfast.attacks.surrogate import (
    SurrogateConfig,
    attacker_seed,
    new_network,
    obtain_classifier,
    set_hash,
)
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import derive_seed
from bbfast.data.normalize import normalize
from bbfast.models import model_state
from bbfast.training import Recipe, train

__all__ = ["SleeperAgent", "paste"]


@register_attack("sleeper_agent")
class SleeperAgent(Attack):
    """Changes images of the target class so faintly, and so, that training on them teaches a patch never shown.

    No training image holds the patch. Their changes make the loss gradient of the changed images parallel to that of
    patched source images labelled as the target, on a surrogate that is trained anew as the changes grow.
    """

    card = Card(
        title="Sleeper Agent",
        paper="Sleeper Agent: Scalable Hidden Trigger Backdoors for Neural Networks Trained from Scratch",
        year=2022,
        arxiv="2106.08970",
        threat="poison-only",
        label_modes=("one2one",),
        needs=("surrogate", "deltas"),
        summary="A patch of noise at a random place, on test images only; training images carry faint matched changes.",
        deviations=(
            "Poisoned are images of the target class, whose labels stay; source_classes are those that the patch is "
            "tested on.",
            "A ratio larger than the target class is an error or, with clip_to_class=True, the whole class; the "
            "authors repeat images.",
            "The rate of signed Adam is in units of a normalised pixel, as the authors' changes are.",
            "The patch is black and white, one draw for all channels.",
            "The attack is not part of the reference implementation: compat makes no difference.",
        ),
    )

    class Config(SurrogateConfig):
        """Settings of Sleeper Agent.

        Args:
            surrogate_preset: Recipe of the surrogate; None is the paper's: 100 epochs, SGD .1, times .1 at a half and
                three quarters.
            surrogate_epochs: Its epochs; None are the recipe's.
            patch_size: Side of the patch in pixels; None is a quarter of the image's height.
            location: Where the patch is, in the source images and at test time: ``random`` for each sample, or
                ``corner``, bottom right.
            epsilon: Largest change of a training pixel, in levels of 0..255.
            iterations: Steps of gradient matching.
            retrain_every: Steps after which a new surrogate is trained on the set as poisoned so far; None never.
            retrain_epochs: Its epochs.
            craft_batch: Poisoned images whose gradient is matched at a time.
            craft_lr: Learning rate of signed Adam for a batch of 128.
            sources: Patched source images whose gradient is to be matched; fewer are repeated at other places.
            crop_shift: Largest shift in crafting and in the surrogate's training, in pixels; None is a quarter
                of the image's height.
            flip: Whether these mirror images.
        """

        ratio: float | None = Field(0.01, gt=0, le=1)
        label_mode: LabelMode = "one2one"
        source_classes: tuple[int, ...] = (1,)
        patch_size: int | None = Field(None, ge=1)
        location: Literal["random", "corner"] = "random"
        epsilon: float = Field(16.0, gt=0, le=255)
        iterations: int = Field(250, ge=1)
        retrain_every: int | None = Field(50, ge=1)
        retrain_epochs: int = Field(40, ge=1)
        craft_batch: int = Field(128, ge=1)
        craft_lr: float = Field(0.025, gt=0)
        sources: int = Field(1000, ge=1)
        crop_shift: int | None = Field(None, ge=0)
        flip: bool = True

        def surrogate_recipe(self, context: AttackContext, **changes: Any) -> Recipe:
            if self.surrogate_preset is not None:
                return super().surrogate_recipe(context, **changes)
            return self._stepped(self.surrogate_epochs or 100, (0.5, 0.75)).replace(**changes)

        def retrain_recipe(self, context: AttackContext) -> Recipe:
            """The recipe of the later surrogates."""
            if self.surrogate_preset is not None:
                return super().surrogate_recipe(context).replace(epochs=self.retrain_epochs)
            return self._stepped(self.retrain_epochs, (0.35, 0.6, 0.875))

        @staticmethod
        def _stepped(epochs: int, shares: tuple[float, ...]) -> Recipe:
            milestones = tuple(sorted({int(share * epochs) for share in shares}))
            return Recipe(epochs=epochs, lr=0.1, schedule="multistep", milestones=milestones, eval_every=0)

    config: Config
    needs_context = True
    selects_after_fit = True

    def check(self, train: ImageSet, num_classes: int | None = None, seed: int = 0, batch_size: int = 128) -> None:
        super().check(train, num_classes, seed, batch_size)
        self._sources(train)
        self._side(train.image_size)

    def select(self, labels: Tensor, rule: LabelRule, seed: int) -> tuple[Tensor, Tensor]:
        """The images of the target class with the longest gradients; before they are known, as many drawn from it."""
        drawn = self._select_poison(labels, _poisons(rule), seed)
        rows = self.tensors.get("rows", drawn[:0]).to(labels.device)
        fits = len(rows) == len(drawn) and int(rows.max()) < len(labels) and bool((labels[rows] == rule.target).all())
        return (rows if fits else drawn), labels.new_empty(0)

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        c = self.config
        side, sources = self._side(data.image_size), self._sources(data)
        candidates = (data.labels == c.target).nonzero().flatten()
        number = len(self._select_poison(data.labels, _poisons(self.rule(data.labels, num_classes)), seed))
        patch = integers(make_key(self.name, seed, "patch"), torch.arange(side), (side,), 0, 1)
        patch = (patch * 255).to(torch.uint8).expand(data.image_size[0], -1, -1).contiguous()
        matching = Matching(
            epsilon=c.epsilon / 255,
            iterations=c.iterations,
            retrain_every=c.retrain_every,
            lr=c.craft_lr,
            batch_size=c.craft_batch,
            shift=max(1, round(data.image_size[1] / 4)) if c.crop_shift is None else c.crop_shift,
            flip=c.flip,
        )
        program = ShiftFlip(matching.shift, matching.flip)
        recipe, later = c.surrogate_recipe(context), c.retrain_recipe(context)
        network = obtain_classifier(context, data, num_classes, c, recipe, seed, "surrogate", program).network
        identity = {
            "surrogate": content_hash(model_state(network)),
            "network": type(network).__qualname__,
            "data": set_hash(data),
            "normalisation": [data.mean, data.std],
            "matching": dataclasses.asdict(matching),
            "retraining": later.model_dump(mode="json"),
            "patch": [side, c.location],
            "target": c.target,
            "sources": [list(c.source_classes), c.sources],
            "number": number,
        }

        def make(work: Path) -> dict[str, Tensor]:
            crafting = _Crafting(self, data.to(context.device), patch.to(context.device), num_classes, seed, context)
            rows = crafting.longest(network, candidates.to(context.device), number)

            def retrain(change: Tensor, time: int, folder: Path) -> nn.Module:
                return crafting.retrained(rows, change, time, later, program, folder)

            def gradient(net: nn.Module, time: int) -> list[Tensor]:
                return crafting.source_gradient(net, sources.to(context.device), time)

            images = crafting.data.images[rows].float() / 255
            mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
            delta, losses = matching.craft(
                images, c.target, mean, std, network, gradient, retrain, attacker_seed(seed), work, context.progress
            )
            levels = (delta * 255).clamp(-c.epsilon, c.epsilon)
            return {"rows": rows.cpu(), "delta": levels, "loss": torch.tensor(losses)}

        made = dict(context.obtain("sleeper_agent_deltas", identity, make, seed=seed))
        # In the order of the samples' numbers, which they are looked up by.
        ids, order = data.ids.cpu()[made["rows"]].sort()
        return {**made, "rows": made["rows"][order], "delta": made["delta"][order], "ids": ids, "patch": patch}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        if stage == "test":
            return self.patched(images, index, self.tensor("patch", images), make_key(self.name, self.seed, stage))
        ids, delta = self.tensor("ids", images), self.tensor("delta", images)
        place = torch.searchsorted(ids, index).clamp_max(len(ids) - 1)
        delta = delta[place] if not images.is_floating_point() else delta[place].to(images.dtype) / 255
        return ops.add(images, delta, ids[place] == index)

    def patched(self, images: Tensor, index: Tensor, patch: Tensor, key: int) -> Tensor:
        """Images with the patch, at a place that follows from the key and the sample's number."""
        room = [int(whole - part) for whole, part in zip(images.shape[-2:], patch.shape[-2:], strict=True)]
        if self.config.location == "corner":
            top, left = (torch.full_like(index, most) for most in room)
        else:
            top = integers(make_key(key, "row"), index, (), 0, room[0])
            left = integers(make_key(key, "column"), index, (), 0, room[1])
        return paste(images, patch, top, left)

    def _sources(self, data: ImageSet) -> Tensor:
        wanted = torch.tensor(self.config.source_classes, device=data.device)
        sources = torch.isin(data.labels, wanted).nonzero().flatten()
        if not len(sources):
            raise ValueError(f"{self.name}: train holds no image of the source classes {list(wanted.tolist())}")
        return sources

    def _side(self, image_size: tuple[int, int, int]) -> int:
        _, height, width = image_size
        side = max(1, round(height / 4)) if self.config.patch_size is None else self.config.patch_size
        if side > min(height, width):
            raise ValueError(f"{self.name}: a patch of {side} pixels does not fit into {height} x {width} images")
        return side


@dataclasses.dataclass(frozen=True, eq=False)
class _Crafting:
    """What gradient matching asks of the data, all of it on one device."""

    attack: SleeperAgent
    data: ImageSet
    patch: Tensor
    num_classes: int
    seed: int
    context: AttackContext

    def normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.data.mean, self.data.std)

    def longest(self, network: nn.Module, candidates: Tensor, number: int) -> Tensor:
        norms = gradient_norms(network, self.normalized(self.data.images[candidates]), self.attack.config.target)
        return candidates[norms.argsort(descending=True, stable=True)[:number]]

    def source_gradient(self, network: nn.Module, sources: Tensor, time: int) -> list[Tensor]:
        wanted = self.attack.config.sources
        chosen = sources.repeat(-(-wanted // len(sources)))[:wanted]
        places = torch.arange(wanted, device=chosen.device)
        key = make_key(self.attack.name, self.seed, "source", time)
        patched = self.attack.patched(self.data.images[chosen], places, self.patch, key)
        return loss_gradient(network, self.normalized(patched), self.attack.config.target)

    def retrained(
        self, rows: Tensor, change: Tensor, time: int, recipe: Recipe, program: ShiftFlip, folder: Path
    ) -> nn.Module:
        """A new network, trained on the set as it would be published now."""
        data, config, context = self.data, self.attack.config, self.context
        images = data.images.clone()
        images[rows] = ops.add(images[rows], change * 255)
        seed = derive_seed("retrain", self.seed, time) % 2**32
        network = new_network(context, config.surrogate, data.image_size, self.num_classes, seed)
        train(
            network,
            dataclasses.replace(data, images=images),
            recipe,
            seed=attacker_seed(seed),
            device=context.device,
            program=program,
            checkpoint=folder,
            progress=context.progress,
            description=f"surrogate {time + 1} of the attacker",
        )
        return network


def _poisons(rule: LabelRule) -> LabelRule:
    """Who is poisoned: images of the target class, labels unchanged; the source classes matter at test time."""
    return dataclasses.replace(rule, mode="clean_label", source_classes=())


def paste(images: Tensor, patch: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Replace a rectangle of each image, each at its own place.

    Args:
        images: uint8 or float (0..1) ``[B, C, H, W]``.
        patch: uint8 ``[C, h, w]``.
        top: int64 ``[B]``, first row of the rectangle.
        left: int64 ``[B]``, first column.

    Returns:
        Like ``images``, new memory; gradients flow outside the rectangles.
    """
    height, width = patch.shape[-2:]
    row = torch.arange(images.shape[-2], device=images.device) - top[:, None]
    column = torch.arange(images.shape[-1], device=images.device) - left[:, None]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None, :]
    pixels = patch[:, row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]].transpose(0, 1)
    pixels = pixels.to(images.dtype) / 255 if images.is_floating_point() else pixels
    return torch.where(inside[:, None], pixels, images)
