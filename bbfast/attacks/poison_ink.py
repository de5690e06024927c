"""Poison Ink: the edges of an image, drawn in one colour and hidden (Zhang et al., arXiv 2108.02488; spec 11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast.attacks._augment import keep_layout
from bbfast.attacks._encoding import ENCODER, encode, read_encoder
from bbfast.attacks._ink import STAGES, fit_colour, ink_image
from bbfast.attacks._ink_training import PRESETS, obtain_ink_nets
from bbfast.attacks._networks import apply_network
from bbfast.attacks._poison_ink_nets import Injector
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES, LabelRule, Role
from bbfast.attacks.randomness import make_key, uniform
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.models import model_state
from bbfast.training import Program, Recipe

__all__ = ["MixedProgram", "PoisonInk"]


@register_attack("poison_ink")
class PoisonInk(Attack):
    """Draws the edges of an image in one colour and hides the drawing in the image with an injector network.

    The injector is trained on the clean training images together with an extractor that reads the drawing back, in
    stages that move the images more and more, so that the trigger survives augmentation. The default settings need a
    GPU for hours. ``encoder_preset="quick"`` takes minutes of one core with narrow networks: enough for a backdoor, not
    for one that cannot be seen (22 dB on digits where it was measured). What was trained is kept in the store and
    shared by all ratios, label modes and colours.
    """

    card = Card(
        title="Poison Ink",
        paper="Poison Ink: Robust and Invisible Backdoor Attack",
        year=2022,
        arxiv="2108.02488",
        threat="poison-only",
        label_modes=LABEL_MODES,
        needs=("encoder",),
        summary="The image's edges, drawn in one colour, hidden by a network.",
        deviations=(
            "The victim is trained on an ordinary poisoned set; the reference adds to every clean batch one of "
            "poisoned images, whatever the ratio (compat='reference' does so).",
            "The laws of ink colours and moves in the networks' training are not published: colours are uniform, "
            "angles uniform within 45 degrees, crops from 2 pixels of padding; one resampling does all moves, and what "
            "lies outside an image repeats its border.",
            "Crops and shifts are the paper's at 32 pixels and grow with the image.",
            "The stage with a discriminator is off by default, as in the published runs, where it cost half of the "
            "ASR; stages=('rot', 'crop', 'flip', 'adv') has it.",
            "Greyscale images get the colour's luminance.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(AttackConfig):
        """Settings of Poison Ink.

        Args:
            colour: Red, green and blue of the ink, 0..255.
            threshold: Sobel magnitude, in levels of 0..255, above which there is an edge.
            stages: Stages of the networks' training, in the order rot, crop, flip, adv; each goes on from the one
                before.
            encoder_preset: ``paper`` (200 epochs a stage, full width) or ``quick`` (6 epochs, a quarter of the width,
                a cycle of up to five times the rate; for small sets).
            encoder_epochs: Epochs of each stage; None is the preset's.
            encoder_batch_size: Images a step; None is the preset's: 32, quick 16.
            encoder_lr: Learning rate (Adam; a tenth after 80 epochs, quick one cycle a stage); None is the preset's:
                2e-4, quick 1e-3.
            injector_width: Channels of the injector's first level; None is the preset's: 64, quick 16.
            extractor_width: Channels of the extractor; None is the preset's: 128, quick 32.
            encoder_path: Your own injector's weights, a safetensors file (the ``trigger.safetensors`` of a saved result
                will do); replaces the training.
        """

        colour: tuple[int, int, int] = (80, 160, 80)
        threshold: float = Field(28.0, ge=0, le=255)
        stages: tuple[Literal["rot", "crop", "flip", "adv"], ...] = ("rot", "crop", "flip")
        encoder_preset: Literal["paper", "quick"] = "paper"
        encoder_epochs: int | None = Field(None, ge=1)
        encoder_batch_size: int | None = Field(None, ge=1)
        encoder_lr: float | None = Field(None, gt=0)
        injector_width: int | None = Field(None, ge=1)
        extractor_width: int | None = Field(None, ge=1)
        encoder_path: Path | None = None

        @field_validator("colour")
        @classmethod
        def _check_colour(cls, colour: tuple[int, int, int]) -> tuple[int, int, int]:
            if not all(0 <= part <= 255 for part in colour):
                raise ValueError(f"colour must have parts in 0..255, got {colour}")
            return colour

        @field_validator("stages")
        @classmethod
        def _check_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
            if not stages or list(stages) != [stage for stage in STAGES if stage in stages]:
                raise ValueError(
                    f"stages must be some of {', '.join(STAGES)}, each once and in this order, got {stages}"
                )
            return stages

        def training(self, name: str) -> Any:
            """A setting of the networks' training: the one given, else the preset's."""
            given = getattr(self, name if name.endswith("width") else f"encoder_{name}")
            return PRESETS[self.encoder_preset][name] if given is None else given

        def injector(self, channels: int) -> Injector:
            """The injector's architecture."""
            return Injector(channels, self.training("injector_width"))

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        channels, height, width = data.image_size
        if channels not in (1, 3):
            raise ValueError(f"{self.name}: images must have 1 or 3 channels, got {channels}")
        if height % 16 or width % 16:
            raise ValueError(f"{self.name}: height and width must be multiples of 16, got {height} x {width}")
        if "adv" in self.config.stages and min(height, width) < 32:
            raise ValueError(f"{self.name}: stage 'adv' needs images of at least 32 x 32, got {height} x {width}")
        if self.config.encoder_path is not None:
            injector = self.config.injector(channels)
            read_encoder(self.config.encoder_path, injector)
        else:
            injector = obtain_ink_nets(context, data, self.config, seed).injector
        return {f"{ENCODER}.{name}": value for name, value in model_state(injector).items()}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        channels = images.shape[1]
        colour = fit_colour(self.config.colour, channels)

        def draw(x: Tensor) -> Tensor:
            ink, _ = ink_image(x, colour, self.config.threshold)
            both = torch.cat([x, ink], 1)
            return apply_network(lambda: self.config.injector(channels), self.tensors, ENCODER, both).clamp(0, 1)

        return encode(images, draw)

    def program(self, rule: LabelRule) -> Program | None:
        return MixedProgram(self, rule) if self.config.compat == "reference" else None


class MixedProgram(Program):
    """The reference's training of the victim: to every clean batch one of poisoned images, not augmented, is added.

    The clean originals of the poisoned samples stay, so half of what the victim sees is poisoned whatever the ratio.
    The poisoned images come in turn, from a random one of them on in every epoch.

    Args:
        attack: The prepared attack.
        rule: Its label rule.
    """

    def __init__(self, attack: PoisonInk, rule: LabelRule) -> None:
        self.attack, self.rule = attack, rule

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        whole = self.attack.poison(train, seed, self.rule.num_classes)
        self.rows = whole.poisoned.nonzero().flatten()
        self.poisoned = whole.as_imageset()[self.rows]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "attack": repr(self.attack.config), "rule": repr(self.rule)}

    def epoch_start(self, epoch: int, steps: int, batch_size: int) -> None:
        draw = uniform(make_key("poison ink start", self.seed), torch.tensor([epoch]))
        self.place = int(draw * len(self.rows))

    def make_batch(self, batch: Batch) -> Batch:
        positions = (torch.arange(len(batch), device=batch.x.device) + self.place) % len(self.rows)
        self.place += len(batch)
        added = ops.gather_augment(
            self.poisoned.images, positions, mean=self.train.mean, std=self.train.std, dtype=batch.x.dtype
        )
        role = torch.zeros(2 * len(batch), dtype=torch.int8, device=batch.x.device)
        role[len(batch) :] = int(Role.POISON)
        return batch.replace(
            x=keep_layout(torch.cat([batch.x, added]), batch.x),
            y=torch.cat([batch.y, self.poisoned.labels[positions]]),
            index=torch.cat([batch.index, self.rows[positions]]),
            role=role,
        )
