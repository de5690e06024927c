"""AWM: Adversarial Weight Masking."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from bbfast._progress import bar
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.data.normalize import normalize
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.mitigation._finetune import trainable
from bbfast.defenses.mitigation._keep import Keeper
from bbfast.defenses.mitigation._masks import crops, random_batches
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DivergedError, UnsupportedModelError
from bbfast.training.device import choose_numerics, placed
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.prediction import evaluating
from bbfast.training.runtime import deterministic, keep_freed_memory

__all__ = ["AWM", "AWMConfig", "masked_layers"]


class AWMConfig(DefenseConfig):
    """Settings of AWM.

    Args:
        outer_rounds: Rounds of perturbation and masks.
        inner: Passes' worth of batches of each half of a round.
        batch_size: Images a step, drawn with replacement; the size of a smaller hold-out (16 on the digits).
        mask_lr: Adam's learning rate for the masks.
        pert_lr: Learning rate of the perturbation.
        trigger_norm: Largest L1 norm of the perturbation, in units of the normalised images.
        alpha: Weight of the clean loss beside the perturbed one.
        gamma: Weight of the masks' L1 norm.
        stratified: Draw the hold-out by class instead of uniformly.
    """

    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # Ours: four or five steps a pass, as the published 128 make of 500 images; of 72 they would make one.
        "digits": {"batch_size": 16},
    }

    outer_rounds: int = Field(20, ge=0)
    inner: int = Field(5, ge=1)
    batch_size: int = Field(128, ge=1)
    mask_lr: float = Field(0.01, gt=0)
    pert_lr: float = Field(10.0, gt=0)
    trigger_norm: float = Field(1000.0, ge=0)
    alpha: float = Field(0.9, ge=0, le=1)
    gamma: float = Field(1e-8, ge=0)
    stratified: bool = False


@register_defense("awm")
class AWM(Defense):
    """Mask single weights so that one perturbation for all images no longer turns the model, with very few images.

    Every weight of every convolution has a mask in 0..1. Each round

    1. finds a universal perturbation: SGD from zero that raises the cross-entropy against the masked model's own
       predictions, then scaled to an L1 norm of ``trigger_norm``;
    2. takes steps of Adam on the masks for ``alpha CE(x) + (1 - alpha) CE(clip(x + perturbation)) + gamma |masks|``
       with the true labels.

    The network is frozen and in eval mode. At the end the masks are multiplied into the weights; nothing is selected,
    so the whole hold-out is used. A network with a single convolution (a transformer's patch embedding) has masks on
    its Linear layers too, which is no part of the paper.

    Source: Chai and Chen, One-shot Neural Backdoor Erasing via Adversarial Weight Masking, NeurIPS 2022, arXiv
    2207.04497; numbers as in backdoor-toolbox. Deviations: see the card.
    """

    card = DefenseCard(
        title="Adversarial Weight Masking",
        paper="Chai, Chen, NeurIPS 2022",
        year=2022,
        arxiv="2207.04497",
        kinds=("mitigation",),
        needs=frozenset({"model", "clean"}),
        summary="Masks weights against a universal perturbation; works with very little clean data.",
        deviations=(
            "Perturbed images are clipped to the range of pixels after normalisation; the toolbox clips to 0..1 "
            "whatever the images' scale.",
            "Convolutions keep their bias; the toolbox drops it.",
            "The first phase, which has no steps at the toolbox's settings, is left out.",
        ),
    )
    Config = AWMConfig

    def check(self, view: DefenderView) -> None:
        masked_layers(view.model)

    def run(self, view: DefenderView) -> DefenseResult:
        config: AWMConfig = self.config
        model, clean = view.model, view.clean
        numerics = choose_numerics("fp32", "auto", model, view.device)
        names = masked_layers(model)
        layout = numerics.memory_format
        with (
            evaluating(model),
            trainable(model, False),
            placed(model, view.device, layout),
            deterministic(view.recipe is not None and view.recipe.deterministic),
            keep_freed_memory(view.device),
        ):
            search = _Search(model, names, clean, config)
            history = self._search(view, search, numerics.channels_last)
            masks = search.masks
        with torch.no_grad():
            for name, mask in zip(names, masks, strict=True):
                model.get_parameter(name).mul_(mask.detach())
        flat = torch.cat([mask.detach().flatten() for mask in masks])
        info = {
            "masked_layers": [name.removesuffix(".weight") for name in names],
            "weights": flat.numel(),
            "mean_mask": float(flat.mean()),
            "masked_out": float((flat < 0.01).double().mean()),
            "rounds": len(history),
        }
        return DefenseResult(kind=self.card.kinds[0], model=model, history=history, info=info)

    def _search(self, view: DefenderView, search: _Search, channels_last: bool) -> list[dict[str, Any]]:
        """All rounds, or those that a killed run left; a row each."""
        config: AWMConfig = self.config
        padding, flip = crops(view)
        seed = view.derive_seed("masks")
        settings = {**config.model_dump(), "seed": seed, "padding": padding, "flip": flip}
        folder = view.checkpoint / "masks" if view.checkpoint is not None else None
        kept = Keeper(folder, search.model, search.images, settings)
        history: list[dict[str, Any]] = []
        if (found := kept.find()) is not None:
            search.load(found[0])
            history = found[1]
        size = min(config.batch_size, len(search.images))
        steps = config.inner * math.ceil(len(search.images) / size)

        def batches(half: int) -> Iterator[Batch]:
            return random_batches(
                search.images,
                size,
                steps,
                seed=seed,
                block=half,
                padding=padding,
                flip=flip,
                channels_last=channels_last,
            )

        with bar(f"{view.method}: masks", config.outer_rounds, view.progress, done=len(history)) as shown:
            for turn in range(len(history), config.outer_rounds):
                perturbation = search.perturb(batches(2 * turn))
                row = {"round": turn, **search.mask(batches(2 * turn + 1), perturbation)}
                if not math.isfinite(row["loss"]):
                    raise DivergedError(
                        f"awm: the loss is not finite in round {turn} (mask_lr={config.mask_lr}, "
                        f"pert_lr={config.pert_lr}, trigger_norm={config.trigger_norm}); lower one of them"
                    )
                history.append(row)
                shown.advance()
                shown.show({"loss": row["loss"], "mean mask": row["mean_mask"]})
                kept.offer(search.state(), history)
        return history


class _Search:
    """Masks and their optimiser; the network and everything else stays as it is."""

    def __init__(self, model: nn.Module, names: list[str], images: ImageSet, config: AWMConfig) -> None:
        self.model, self.images, self.config, self._names = model, images, config, names
        self._weights = [model.get_parameter(name).detach() for name in names]
        self.masks = [torch.ones_like(weight, requires_grad=True) for weight in self._weights]
        self._adam = torch.optim.Adam(self.masks, lr=config.mask_lr)
        ends = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, images.image_size[0], 1, 1)
        self._low, self._high = normalize(ends, images.mean, images.std).to(images.device)

    def perturb(self, batches: Iterator[Batch]) -> Tensor:
        """A perturbation ``[1, C, H, W]`` that turns the masked model's predictions."""
        weights = self._masked(detached=True)
        found = torch.zeros(1, *self.images.image_size, device=self.images.device)
        for batch in batches:
            leaf = found.requires_grad_()
            with torch.no_grad():
                predicted = self._logits(batch.x, weights).argmax(dim=1)
            value = F.cross_entropy(self._logits(batch.x + leaf, weights), predicted)
            (gradient,) = torch.autograd.grad(value, leaf)
            found = found.detach() + self.config.pert_lr * gradient
        found = found.detach()
        size = found.abs().sum()
        return torch.where(size > self.config.trigger_norm, found * (self.config.trigger_norm / size), found)

    def mask(self, batches: Iterator[Batch], perturbation: Tensor) -> dict[str, float]:
        """Steps on the masks against ``perturbation``; what they came to."""
        config, losses = self.config, []
        for batch in batches:
            moved = (batch.x + perturbation).clamp(self._low, self._high)
            # In eval mode images do not touch one another: both kinds go through the network together.
            logits = self._logits(torch.cat([batch.x, moved]), self._masked())
            plain, turned = (F.cross_entropy(part, batch.y) for part in logits.chunk(2))
            size = torch.stack([mask.abs().sum() for mask in self.masks]).sum()
            loss = config.alpha * plain + (1 - config.alpha) * turned + config.gamma * size
            self._adam.zero_grad()
            loss.backward()
            self._adam.step()
            with torch.no_grad():
                for mask in self.masks:
                    mask.clamp_(0, 1)
            losses.append(torch.stack([loss, plain, turned]).detach())
        means = torch.stack(losses).mean(dim=0).tolist()
        count = sum(mask.numel() for mask in self.masks)
        total = torch.stack([mask.detach().double().sum() for mask in self.masks]).sum()
        return {
            **dict(zip(("loss", "clean_loss", "perturbed_loss"), means, strict=True)),
            "perturbation_l1": float(perturbation.abs().sum()),
            "mean_mask": float(total) / count,
        }

    def state(self) -> dict[str, Tensor]:
        masks = {f"mask.{i}": mask.detach() for i, mask in enumerate(self.masks)}
        return masks | {f"adam.{name}": value for name, value in optimizer_state(self._adam).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for i, mask in enumerate(self.masks):
                mask.copy_(tensors[f"mask.{i}"])
        adam = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
        load_optimizer_state(self._adam, adam)

    def _masked(self, detached: bool = False) -> dict[str, Tensor]:
        masks = [mask.detach() for mask in self.masks] if detached else self.masks
        return {name: w * m for name, w, m in zip(self._names, self._weights, masks, strict=True)}

    def _logits(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(self.model, weights, (x,))
        return out.float()


def masked_layers(model: nn.Module) -> list[str]:
    """Names of the weights that get masks: of all convolutions, and of Linear layers if there is one convolution only.

    Raises:
        UnsupportedModelError: if the model has neither.
    """
    from bbfast.models import roles

    convolutions = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    linear = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = convolutions if len(convolutions) > 1 else convolutions + linear
    if not found:
        raise UnsupportedModelError("awm", roles(model).label, "it has no convolution and no Linear layer")
    return found
