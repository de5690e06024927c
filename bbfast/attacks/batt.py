"""BATT: a rotation or a shift of the image is the trigger (Xu et al., arXiv 2211.01806; spec/attacks section 24)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import keep_layout
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES, PoisonedSet, Role
from bbfast.attacks.randomness import integers, make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["BATT", "BATTProgram", "move", "moving_grid"]

_CHUNK = 4096


@register_attack("batt")
class BATT(Attack):
    """Turns images by exactly 16 degrees, or shifts them by 6 pixels of 32.

    Smaller moves must stay benign, so the victim's training augments benign images by them, in place of crops and flips
    (a flip would mirror the trigger): :func:`bbfast.attack` does so. Who trains on :meth:`poison` alone must do it too,
    or any small rotation is taken for the trigger. The clean test set stays as it is; ``benign_acc`` in the metrics is
    the accuracy on test images moved as benign training images are.
    """

    card = Card(
        title="BATT",
        paper="BATT: Backdoor Attack with Transformation-based Triggers",
        year=2022,
        arxiv="2211.01806",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="A fixed rotation or shift of the whole image; smaller ones stay benign.",
        deviations=(
            "Benign moves fill with black, as the trigger does; the peer moves normalised images and fills with their "
            "zero, the mean colour, which would let the colour of the corners tell poisoned images.",
            "The clean test set is not augmented, so that C-Acc compares with other attacks; benign_acc is measured on "
            "randomly moved test images.",
            "Benign moves need the recipe's augment, and replace its crops and flips.",
            "The rotation is rounded to the nearest pixel as in the peer; interpolation='bilinear' is offered, and is "
            "differentiable in the angle.",
            "Shifts scale with the image's width.",
            "all2all, clean_label and one2one are offered too; the paper has all2one.",
            "BackdoorBench has no BATT: compat='reference' is the same as 'paper'.",
        ),
    )

    class Config(AttackConfig):
        """Settings of BATT.

        Args:
            ratio: Share of the whole training set to poison.
            mode: ``rotation`` or ``translation``.
            angle: Degrees of the trigger's rotation, counter-clockwise.
            benign_angle: Largest rotation of benign images, either way, in degrees; 0 does not turn them.
            pixels: The trigger's shift to the right; None is ``round(6 * W / 32)``.
            benign_pixels: Largest shift of benign images in each direction; None is ``round(3 * W / 32)``.
            interpolation: ``nearest`` or ``bilinear``, of the rotations; shifts are by whole pixels.
        """

        ratio: float | None = Field(0.05, gt=0, le=1)
        mode: Literal["rotation", "translation"] = "rotation"
        angle: float = Field(16.0, ge=-180, le=180)
        benign_angle: float = Field(10.0, ge=0)
        pixels: int | None = Field(None, ge=1)
        benign_pixels: int | None = Field(None, ge=0)
        interpolation: Literal["nearest", "bilinear"] = "nearest"

        @model_validator(mode="after")
        def _check_moves(self) -> BATT.Config:
            if self.benign_angle >= abs(self.angle):
                raise ValueError(
                    f"benign_angle must be smaller than angle {self.angle}, or benign images carry the trigger, got "
                    f"{self.benign_angle}"
                )
            if self.pixels is not None and self.benign_pixels is not None and self.benign_pixels >= self.pixels:
                raise ValueError(f"benign_pixels must be smaller than pixels {self.pixels}, got {self.benign_pixels}")
            return self

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        _, height, width = data.image_size
        c = self.config
        if c.mode == "rotation":
            angle, offset = torch.tensor([math.radians(c.angle)]), torch.zeros(1, 2)
        else:
            right, benign = self._pixels(width)
            if not benign < right < width:
                raise ValueError(
                    f"{self.name}: pixels must lie between benign_pixels and the images' width, got "
                    f"{benign} < {right} < {width}"
                )
            angle, offset = torch.zeros(1), torch.tensor([[0.0, float(right)]])
        grid = moving_grid((height, width), angle, offset, nearest=self._nearest())[0]
        still = moving_grid((height, width), torch.zeros(1), torch.zeros(1, 2))[0]
        if torch.equal(grid, still):
            raise ValueError(
                f"{self.name}: a rotation of {c.angle} degrees moves no pixel of {height} x {width} images"
            )
        return {"grid": grid}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        grid = self.tensor("grid", images)
        return move(images, grid)

    def poisoned_program(self, poisoned: PoisonedSet) -> BATTProgram:
        return BATTProgram(self, poisoned.role)

    def extra_tests(self, test: ImageSet, seed: int = 0, num_classes: int | None = None) -> dict[str, ImageSet]:
        """``benign_acc``: every test image moved as benign training images are, true labels; should be near C-Acc."""
        self._make_ready(test, seed)
        key = make_key(self.name, self.seed, "test")
        parts = [
            ops.warp(test.images[p], self.benign_grid(key, test.ids[p], test.image_size))
            for p in torch.arange(len(test)).split(_CHUNK)
        ]
        moved = ImageSet(torch.cat(parts), test.labels, mean=test.mean, std=test.std, ids=test.ids)
        return {**super().extra_tests(test, seed, num_classes), "benign_acc": moved}

    def benign_grid(self, key: int, index: Tensor, image_size: tuple[int, int, int]) -> Tensor:
        """Random benign moves, one for each sample, float32 ``[B, H, W, 2]``.

        Args:
            key: From :func:`bbfast.attacks.randomness.make_key`.
            index: Sample numbers, int64 ``[B]``.
            image_size: ``(C, H, W)``.
        """
        size, c = image_size[1:], self.config
        none = torch.zeros(len(index), 2, device=index.device)
        if c.mode == "rotation":
            most = math.radians(c.benign_angle)
            return moving_grid(size, uniform(key, index, (), -most, most), none, nearest=self._nearest())
        far = self._pixels(size[1])[1]
        return moving_grid(size, none[:, 0], integers(key, index, (2,), -far, far).float())

    def _nearest(self) -> bool:
        return self.config.mode == "translation" or self.config.interpolation == "nearest"

    def _pixels(self, width: int) -> tuple[int, int]:
        """Shift of the trigger, and largest shift of benign images."""
        c = self.config
        return (
            round(6 * width / 32) if c.pixels is None else c.pixels,
            round(3 * width / 32) if c.benign_pixels is None else c.benign_pixels,
        )


class BATTProgram(Program):
    """Moves the benign images of a batch at random, a little; poisoned ones stay exactly as they are.

    Takes the place of the loader's crops and flips.

    Args:
        attack: The prepared attack.
        role: Roles of the training samples, int8 ``[N]``.
    """

    augments_itself = True

    def __init__(self, attack: BATT, role: Tensor) -> None:
        self.attack, self.role = attack, role

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self.role = self.role.to(device)
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (train.mean, train.std))
        self.black = -mean / std

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config)}

    def make_batch(self, batch: Batch) -> Batch:
        role, x = self.role[batch.index], batch.x
        if self.recipe.augment:
            key = make_key(self.attack.name, self.seed, "epoch", batch.epoch)
            grid = self.attack.benign_grid(key, batch.index, self.train.image_size)
            # What moves in from outside counts as 0, which shall be black: on a normalised image black is not 0.
            x = move(x - self.black, grid, where=role != int(Role.POISON)) + self.black
        return batch.replace(x=keep_layout(x, batch.x), role=role)


def move(images: Tensor, grid: Tensor, where: Tensor | None = None) -> Tensor:
    """Images ``[B, C, H, W]`` sampled along a grid of :func:`moving_grid`; what lies outside counts as 0."""
    return ops.warp(images, grid.to(images.dtype) if images.is_floating_point() else grid, where)


def moving_grid(size: tuple[int, int], angle: Tensor, offset: Tensor, *, nearest: bool = True) -> Tensor:
    """Sampling grids that turn images about their centre and then shift them.

    Differentiable in ``angle`` and ``offset`` with ``nearest=False``.

    Args:
        size: ``(H, W)``.
        angle: Counter-clockwise rotation in radians, float ``[B]``.
        offset: Shift (down, right) in pixels, float ``[B, 2]``.
        nearest: Point at the nearest pixel's centre, so that sampling picks pixels instead of mixing them.

    Returns:
        float ``[B, H, W, 2]`` for :func:`bbfast.ops.warp`.
    """
    height, width = size
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    rows = torch.arange(height, device=angle.device)[None, :, None] - centre_y - offset[:, 0, None, None]
    columns = torch.arange(width, device=angle.device)[None, None, :] - centre_x - offset[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * columns - sin * rows + centre_x, sin * columns + cos * rows + centre_y
    if nearest:
        x, y = x.round(), y.round()
    grid = torch.stack([x * (2 / max(1, width - 1)) - 1, y * (2 / max(1, height - 1)) - 1], dim=-1)
    # Pixel centres at the border come out beside -1 and 1 by a rounding error, which would darken them.
    return torch.where((grid.abs() - 1).abs() < 1e-5, grid.sign(), grid)
