"""PDB: Proactive Defensive Backdoor."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.data.normalize import normalize
from bbfast.defenses._diverged import lower, naming
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.training._unlearn import sgd_recipe
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError
from bbfast.models import add
from bbfast.models.additions.stamp import stamped
from bbfast.training import Program, train

__all__ = ["PDB", "PDBConfig", "jitter"]


class PDBConfig(DefenseConfig):
    """Settings of PDB.

    Args:
        epochs: Passes over the training set and the stamped images.
        lr: First learning rate; cosine to 0.
        batch_size: Samples a step.
        weight_decay: L2 penalty.
        patch_size: Side of the defensive trigger, a square at the top left, in pixels.
        value: Its value in 0..1 units; outside of them no attacker can write it into an image.
        copies: How often each stamped image is in the training set.
        shift: The defensive label of class y is ``(y + shift) mod K``.
        stratified: Draw the clean images by class instead of uniformly, as the authors do.
        amp: Precision of the training: ``auto`` is the recipe's, ``off`` is float32.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}, "paper": {}}
    # Ours: in batches of 256 the digits give seven steps an epoch, a fortieth of what CIFAR-10 gives.
    dataset_defaults: ClassVar[dict[str, dict[str, Any]]] = {"digits": {"batch_size": 32, "lr": 0.02}}

    epochs: int = Field(100, ge=1)
    lr: float = Field(0.01, gt=0)
    batch_size: int = Field(256, ge=2)
    weight_decay: float = Field(5e-4, ge=0)
    patch_size: int = Field(7, ge=1)
    value: float = 2.0
    copies: int = Field(5, ge=1)
    shift: int = Field(1, ge=1)
    stratified: bool = True
    amp: Literal["auto", "off"] = "auto"


@register_defense("pdb")
class PDB(Defense):
    """Train with a backdoor of one's own that is stronger than the attacker's, and use it at every prediction.

    1. Clean images get the defensive trigger, a 7x7 square of the value 2 (no image holds it), and the label
       ``h(y) = (y + 1) mod K``.
    2. A fresh model is trained on the poisoned set and five copies of these, which are also scaled in brightness
       (times U(0.5, 1), probability .2) and rotated (up to 10 degrees, probability .5) before they are stamped.
    3. To predict, every image is stamped and ``h`` is undone. An image with the attacker's trigger carries the
       defender's too, and that one decides.

    The model returned stamps and undoes ``h`` itself; without that it is a backdoored one.

    Source: Wei, Zha, Wu, NeurIPS 2024, arXiv 2405.16112, section 3. Deviations: see the card.
    """

    card = DefenseCard(
        title="Proactive Defensive Backdoor",
        paper="Wei, Zha, Wu, Mitigating Backdoor Attack by Injecting Proactive Defensive Backdoor, NeurIPS 2024",
        year=2024,
        arxiv="2405.16112",
        kinds=("training",),
        needs=frozenset({"poisoned_train", "clean", "fresh_model"}),
        summary="Trains with a defensive backdoor that overrides the attacker's at inference.",
        clean_fraction=0.10,
        deviations=(
            "The trigger is put on after augmentation, where it is at inference; the authors' code puts it on before, "
            "so that crops and flips move it.",
            "The clean images are the defender's hold-out; the authors' code draws their numbers by poisoned labels "
            "and reads the clean set there.",
        ),
    )
    Config = PDBConfig

    def check(self, view: DefenderView) -> None:
        config: PDBConfig = self.config
        _, height, width = view.image_size
        if config.patch_size > min(height, width):
            raise ConfigError(f"defense pdb: patch_size must be at most {min(height, width)}, got {config.patch_size}")
        if config.shift % view.num_classes == 0:
            raise ConfigError(f"defense pdb: shift must not be a multiple of the {view.num_classes} classes")

    def run(self, view: DefenderView) -> DefenseResult:
        config: PDBConfig = self.config
        clock = time.perf_counter()
        poisoned, clean = view.poisoned_train, view.clean
        moved = (clean.labels + config.shift) % view.num_classes
        data = ImageSet(
            torch.cat([poisoned.images, clean.images.repeat(config.copies, 1, 1, 1)]),
            torch.cat([poisoned.labels, moved.repeat(config.copies)]),
            mean=view.mean,
            std=view.std,
        )
        pixel = torch.full((1, len(view.mean), 1, 1), config.value, device=view.device)
        value = normalize(pixel, view.mean, view.std)[0]
        model, side = view.fresh_model(), config.patch_size
        recipe = sgd_recipe(view, config.batch_size, config.weight_decay).replace(
            epochs=config.epochs,
            lr=config.lr,
            schedule="cosine",
            **({"precision": "fp32"} if config.amp == "off" else {}),
        )
        with naming("pdb", "training", lower(config, "lr")):
            done = train(
                model,
                data,
                recipe,
                seed=view.derive_seed("training"),
                device=view.device,
                program=_Stamping(value, side, len(poisoned)),
                checkpoint=None if view.checkpoint is None else view.checkpoint / "training",
                progress=view.progress,
                description="pdb training",
            )
        add(model, "stamp", value=tuple(value.flatten().tolist()), height=side, width=side, shift=config.shift)
        return DefenseResult(
            kind=self.card.kinds[0],
            model=model.eval(),
            history=list(done.history),
            info={
                "stamped": config.copies * len(clean),
                "patch_size": config.patch_size,
                "shift": config.shift,
                "seconds": {"training": time.perf_counter() - clock},
            },
        )


class _Stamping(Program):
    """Images from position ``first`` on are jittered and stamped, after the crops and flips that all get."""

    def __init__(self, value: Tensor, side: int, first: int) -> None:
        self.value, self.side, self.first = value, side, first

    def make_batch(self, batch: Batch) -> Batch:
        ours = batch.index >= self.first
        if not bool(ours.any()):
            return batch
        x = batch.x.clone()
        x[ours] = stamped(jitter(batch.x[ours], self.train.mean, self.train.std), self.value, self.side, self.side)
        return batch.replace(x=x)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "value": self.value.tolist(), "side": self.side, "first": self.first}


def jitter(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Random brightness (times U(0.5, 1) with probability .2) and rotation (up to 10 degrees with probability .5,
    nearest pixel, black outside) of normalised images ``[B, C, H, W]``; draws from torch's global generator."""
    n, shift, scale = len(x), x.new_tensor(mean)[:, None, None], x.new_tensor(std)[:, None, None]
    draws = torch.rand(4, n).to(x)
    bright = torch.where(draws[0] < 0.2, 0.5 + 0.5 * draws[1], 1.0)
    angle = torch.where(draws[2] < 0.5, (2 * draws[3] - 1) * torch.pi / 18, 0.0)
    pixels = (x * scale + shift) * bright[:, None, None, None]
    # The grid is in half images, so a picture that is not square needs its sides' ratio.
    ratio = x.shape[2] / x.shape[3]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin * ratio, zero], 1), torch.stack([sin / ratio, cos, zero], 1)], 1)
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    turned = nn.functional.grid_sample(pixels, grid, mode="nearest", align_corners=False)
    return (turned - shift) / scale
