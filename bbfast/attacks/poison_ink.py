"""Poison Ink: the edges of an image, drawn in one colour and hidden (Zhang et al., arXiv 2108.02488; spec 11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast import ops
from bbfast._hashing import content_hash
from bbfast.attacks._augment import keep_layout
from bbfast.attacks._encoding import ENCODER, Adversary, encode, read_encoder, unit_set
from bbfast.attacks._ink import STAGES, fit_colour, ink_image, move_grids, random_colours
from bbfast.attacks._networks import apply_network, initial
from bbfast.attacks._poison_ink_nets import Discriminator, Extractor, Injector, InkNets
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES, LabelRule, Role
from bbfast.attacks.randomness import make_key, uniform
from bbfast.attacks.surrogate import set_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.models import load_state, model_state
from bbfast.training import Program, Recipe, train

__all__ = ["InkProgram", "MixedProgram", "PoisonInk", "obtain_ink_nets", "read_ink"]

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 200,
        "batch_size": 32,
        "lr": 2e-4,
        "beta": 0.999,
        "curve": "step",
        "injector_width": 64,
        "extractor_width": 128,
    },
    "quick": {
        "epochs": 6,
        "batch_size": 16,
        "lr": 1e-3,
        "beta": 0.99,
        "curve": "onecycle",
        "injector_width": 16,
        "extractor_width": 32,
    },
}
_LOSS_SCALE, _EDGE, _CLEAN = 1e4, 13.0, 100.0


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
            return _PRESETS[self.encoder_preset][name] if given is None else given

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


def obtain_ink_nets(context: AttackContext, data: ImageSet, config: PoisonInk.Config, seed: int) -> InkNets:
    """Injector and extractor trained on the clean training set, from the context's store or trained now.

    Args:
        context: Where to work and keep them.
        data: The clean training set.
        config: The attack's settings.
        seed: Of weights, batches, colours and moves.

    Returns:
        The networks in eval mode.
    """
    channels = data.image_size[0]
    width = config.training("extractor_width")
    networks = initial(lambda: InkNets(config.injector(channels), Extractor(channels, width)), "poison ink", seed)
    assert isinstance(networks, InkNets)
    against = initial(lambda: Discriminator(channels), "poison ink", seed) if "adv" in config.stages else None
    programs = [InkProgram(stage, config.threshold, against if stage == "adv" else None) for stage in config.stages]
    preset = _PRESETS[config.encoder_preset]
    recipe = Recipe(
        epochs=config.training("epochs"),
        batch_size=config.training("batch_size"),
        lr=config.training("lr"),
        optimizer="adam",
        betas=(0.5, preset["beta"]),
        weight_decay=0,
        schedule=preset["curve"],
        step_size=80,
        gamma=0.1,
        augment=False,
        eval_every=0,
    )
    identity = {
        "initial_weights": content_hash(networks.state_dict()),
        "recipe": recipe.model_dump(mode="json"),
        "data": set_hash(data),
        "programs": [program.describe() for program in programs],
    }

    def make(work: Path) -> dict[str, Tensor]:
        for program in programs:
            train(
                networks,
                unit_set(data),
                recipe,
                seed=seed,
                device=context.device,
                program=program,
                checkpoint=work / program.stage,
                progress=context.progress,
                description=f"ink of the attacker, stage {program.stage}",
            )
        return model_state(networks)

    load_state(networks, context.obtain("ink_nets", identity, make, seed=seed))
    return networks.eval()


def read_ink(
    networks: InkNets, images: Tensor, marked: Tensor, colour: Tensor, threshold: float
) -> tuple[float, float]:
    """How well the ink is read back.

    Args:
        networks: Trained, in eval mode.
        images: Clean images, uint8 ``[N, C, H, W]``.
        marked: The same images with ink.
        colour: ``[C]``, 0..255.
        threshold: Of the edges.

    Returns:
        Mean absolute error, in 0..1, of the ink that the extractor finds on the edges of ``marked``; the mean of what
        it finds in ``images``, where white (1) is right.
    """
    device = next(networks.parameters()).device
    with torch.no_grad():
        x, drawn = images.to(device).float() / 255, marked.to(device).float() / 255
        ink, mask = ink_image(drawn, colour, threshold)
        found = torch.cat([networks.extractor(part) for part in drawn.split(256)])
        error = ((found - ink).abs() * mask).sum() / (mask.sum() * images.shape[1]).clamp_min(1)
        white = torch.cat([networks.extractor(part) for part in x.split(256)]).mean()
    return float(error), float(white)


class InkProgram(Program):
    """One stage of the networks' training.

    ``MSE(c, x) + 13 edge + back + 100 clean``, times 10^4: ``edge`` and ``back`` are the errors of the ink read from
    the moved container ``c`` on and off the edges it has then, ``clean`` that of white read from the moved image. Stage
    ``adv`` adds ``MSE(D(c), 1)``.

    Args:
        stage: One of :data:`~bbfast.attacks._ink.STAGES`.
        threshold: Of the edges.
        discriminator: Network of the discriminator, for the stage ``adv``.
    """

    classifies = False

    def __init__(self, stage: str, threshold: float, discriminator: nn.Module | None = None) -> None:
        self.stage, self.threshold, self.discriminator = stage, threshold, discriminator

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        self.sums = torch.zeros(5, device=device)
        self.adversary: Adversary | None = None
        if self.discriminator is not None:
            network = self.discriminator.to(device).train()
            optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr, betas=recipe.betas)
            self.adversary = Adversary(network, optimizer, _discriminator_loss)

    def describe(self) -> dict[str, Any]:
        weights = None if self.discriminator is None else content_hash(self.discriminator.state_dict())
        return {**super().describe(), "stage": self.stage, "threshold": self.threshold, "discriminator": weights}

    def make_batch(self, batch: Batch) -> Batch:
        key = (self.seed, self.stage, batch.epoch)
        self.colour = random_colours(batch.index, batch.x.shape[1], *key)
        self.moves = move_grids(batch.index, (batch.x.shape[2], batch.x.shape[3]), self.stage, *key)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        networks, x, number = cast(InkNets, model), batch.x, len(batch)
        ink, _ = ink_image(x, self.colour, self.threshold)
        drawn = networks.injector(torch.cat([x, ink], 1))
        moved = ops.warp(torch.cat([drawn, x]), self.moves.repeat(2, 1, 1, 1))
        found, blank = networks.extractor(moved).split(number)
        wanted, mask = ink_image(moved[number:], self.colour, self.threshold)
        invisible = F.mse_loss(drawn, x)
        edge = F.mse_loss(found * mask, wanted * mask)
        back = F.mse_loss(found * (1 - mask), (1 - mask).expand_as(found))
        clean = F.mse_loss(blank, torch.ones_like(blank))
        total = invisible + _EDGE * edge + back + _CLEAN * clean
        self.sums += torch.stack([invisible, edge, back, clean, torch.ones_like(clean)]).detach()
        if self.adversary is not None:
            total = total + (self.adversary.judge(x, drawn) - 1).square().mean()
        return _LOSS_SCALE * total, None

    def after_step(self, model: nn.Module) -> None:
        if self.adversary is not None:
            self.adversary.step()

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        *errors, steps = self.sums.tolist()
        self.sums.zero_()
        return {name: e / steps for name, e in zip(("invisible", "edge", "back", "clean"), errors, strict=True)}

    def state(self) -> dict[str, Tensor]:
        return {} if self.adversary is None else self.adversary.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.adversary is not None:
            self.adversary.load_state(tensors)


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


def _discriminator_loss(clean: Tensor, drawn: Tensor) -> Tensor:
    return 0.5 * ((clean - 1).square().mean() + drawn.square().mean())
