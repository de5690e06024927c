"""SSBA: a steganographic encoder hides a string in each image (Li et al., arXiv 2012.03816; spec/attacks section 6)."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.attacks._bch import TEXT_CODES, text_bits
from bbfast.attacks._encoding import (
    ENCODER,
    Adversary,
    encode,
    psnr,
    read_encoder,
    steps_to_epochs,
    unit_set,
)
from bbfast.attacks._networks import apply_network, initial
from bbfast.attacks._similarity import perceptual_distance
from bbfast.attacks._ssba_nets import Critic, SecretDecoder, SecretEncoder, Stego
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.attacks.randomness import make_key, uniform
from bbfast.attacks.surrogate import set_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.models import load_state, model_state
from bbfast.training import Program, Recipe, train

__all__ = ["SSBA", "StegoProgram", "obtain_stego", "read_back"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """How an encoder is trained: the larger of ``epochs`` and of those that hold ``steps``."""

    epochs: int
    steps: int
    batch_size: int
    lr: float
    curve: Literal["constant", "onecycle"]
    secret_steps: int
    ramp_steps: int
    bits: int


_PRESETS = {
    # 20 epochs of CIFAR-10 are 15,600 steps. The image's weight starts to rise a thousand steps after the secret is
    # read, so that a smaller set needs as many steps, not as many epochs.
    "paper": _Schedule(20, 15_600, 64, 1e-4, "constant", 1000, 3000, 100),
    "quick": _Schedule(1, 1500, 16, 1e-3, "onecycle", 50, 500, 50),
}
_READ_AT = 0.9
_IMAGE_WEIGHT = 10.0
_WELL_READ = 0.99


@register_attack("ssba")
class SSBA(Attack):
    """Hides a string in each image with a steganographic encoder, so that every image gets a change of its own.

    The encoder is trained on the clean training images together with a decoder that reads the string back. That takes
    hours on two cores with the default settings; ``encoder_preset="quick"`` takes minutes. It is kept in the
    store and shared by all ratios, label modes and secrets.
    """

    card = Card(
        title="SSBA (ISSBA)",
        paper="Invisible Backdoor Attack with Sample-Specific Triggers",
        year=2021,
        arxiv="2012.03816",
        threat="poison-only",
        label_modes=LABEL_MODES,
        needs=("encoder",),
        summary="A string hidden in each image by a steganographic network.",
        deviations=(
            "The encoder is trained by the library on the training set at hand; the reference reads arrays of encoded "
            "images from a file (in both modes).",
            "Sets smaller than CIFAR-10 are passed over more than 20 times, up to the 15,600 steps that 20 epochs are "
            "there: the loss's schedule counts steps.",
            "loss='issba' has gradient differences and 1 - SSIM in the place of LPIPS, whose weights are not free to "
            "ship.",
            "The networks' initial weights, which are not published, are He's: with torch's own the secret is learned "
            "much later.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(AttackConfig):
        """Settings of SSBA.

        Args:
            secret: Text to hide: at most 7 ASCII characters in 100 bits, 4 in 50.
            secret_bits: Length of what is hidden; None is the preset's: 100, quick 50; or 20 with ``loss="issba"``.
            secret_mode: ``text`` hides ``secret`` with its BCH check bits, which takes 100 or 50 bits; ``seed`` random
                bits from the run's seed; None is text where the length allows it.
            loss: ``default``: image error and secret; ``issba``: the paper's own, with a perceptual term and a critic.
            residual: The network gives a change of the image, not the image; None is True for ``loss="issba"`` only.
            encoder_preset: ``paper`` (20 epochs, at least 15,600 steps) or ``quick`` (at least 1500 steps of 16 images,
                one cycle up to ten times the rate, 50 bits: for the digits 17 epochs, two minutes of one core).
            encoder_epochs: Passes over the training set; None is the preset's.
            encoder_batch_size: Images a step; None is the preset's: 64, quick 16.
            encoder_lr: Learning rate (Adam); None is the preset's: 1e-4, quick 1e-3.
            secret_steps: Steps that only the secret counts for, once it is read with 90 % of the bits right (with
                ``loss="issba"`` from the start); None is the preset's: 1000, quick 50.
            ramp_steps: Steps in which the image's weight then rises to its full value; None is the preset's: 3000,
                quick 500.
            encoder_path: Your own encoder's weights, a safetensors file (the ``trigger.safetensors`` of a saved result
                will do); replaces the training.
        """

        secret: str = "a"
        secret_bits: int | None = Field(None, ge=1)
        secret_mode: Literal["text", "seed"] | None = None
        loss: Literal["default", "issba"] = "default"
        residual: bool | None = None
        encoder_preset: Literal["paper", "quick"] = "paper"
        encoder_epochs: int | None = Field(None, ge=1)
        encoder_batch_size: int | None = Field(None, ge=1)
        encoder_lr: float | None = Field(None, gt=0)
        secret_steps: int | None = Field(None, ge=0)
        ramp_steps: int | None = Field(None, ge=0)
        encoder_path: Path | None = None

        @model_validator(mode="after")
        def _check_secret(self) -> SSBA.Config:
            if self.hides_text:
                text_bits(self.secret, self.bits)
            return self

        @property
        def bits(self) -> int:
            """Length of the secret."""
            return self.secret_bits or (20 if self.loss == "issba" else _PRESETS[self.encoder_preset].bits)

        @property
        def hides_text(self) -> bool:
            """Whether the secret is a text."""
            return self.secret_mode == "text" or (self.secret_mode is None and self.bits in TEXT_CODES)

        def encoder(self, channels: int) -> SecretEncoder:
            """The encoder's architecture."""
            own = self.loss == "issba"
            return SecretEncoder(
                self.bits, channels, residual=own if self.residual is None else self.residual, centred=own
            )

        def schedule(self) -> _Schedule:
            """The preset with the settings' changes."""
            preset = _PRESETS[self.encoder_preset]
            given: dict[str, Any] = {
                "epochs": self.encoder_epochs,
                "steps": None if self.encoder_epochs is None else 0,
                "batch_size": self.encoder_batch_size,
                "lr": self.encoder_lr,
                "secret_steps": self.secret_steps,
                "ramp_steps": self.ramp_steps,
            }
            return dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})

    config: Config
    needs_context = True

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        assert context is not None
        channels, height, width = data.image_size
        if height % 16 or width % 16:
            raise ValueError(f"{self.name}: height and width must be multiples of 16, got {height} x {width}")
        if self.config.encoder_path is not None:
            encoder, quality = self.config.encoder(channels), dict[str, Tensor]()
            read_encoder(self.config.encoder_path, encoder)
        else:
            stego, quality = obtain_stego(context, data, self.config, seed)
            encoder = stego.encoder
        weights = {f"{ENCODER}.{name}": value for name, value in model_state(encoder).items()}
        return {**weights, **quality, "secret": self._secret(seed)}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        channels = images.shape[1]
        secret = self.tensor("secret", images)[None]

        def hide(x: Tensor) -> Tensor:
            return apply_network(lambda: self.config.encoder(channels), self.tensors, ENCODER, x, secret.to(x.dtype))

        return encode(images, hide)

    def _secret(self, seed: int) -> Tensor:
        if self.config.hides_text:
            return text_bits(self.config.secret, self.config.bits)
        return torch.randint(2, (self.config.bits,), generator=torch.Generator().manual_seed(seed)).float()


def obtain_stego(
    context: AttackContext, data: ImageSet, config: SSBA.Config, seed: int
) -> tuple[Stego, dict[str, Tensor]]:
    """Encoder and decoder trained on the clean training set, from the context's store or trained now.

    Args:
        context: Where to work and keep it.
        data: The clean training set.
        config: The attack's settings.
        seed: Of weights, batches and secrets.

    Returns:
        The networks in eval mode; ``bit_accuracy`` and ``psnr`` (dB) on the test set (without one, on the training
        set), measured after rounding to grey levels.
    """
    schedule = config.schedule()
    channels = data.image_size[0]
    stego = initial(lambda: Stego(config.encoder(channels), SecretDecoder(config.bits, data.image_size)), "ssba", seed)
    assert isinstance(stego, Stego)
    program = StegoProgram(config, initial(lambda: Critic(channels), "ssba", seed) if config.loss == "issba" else None)
    recipe = Recipe(
        epochs=max(schedule.epochs, steps_to_epochs(schedule.steps, len(data), schedule.batch_size)),
        batch_size=schedule.batch_size,
        lr=schedule.lr,
        optimizer="adam",
        weight_decay=0,
        schedule=schedule.curve,
        augment=False,
        eval_every=0,
    )
    identity = {
        "initial_weights": content_hash(stego.state_dict()),
        "recipe": recipe.model_dump(mode="json"),
        "data": set_hash(data),
        "program": program.describe(),
    }

    def make(work: Path) -> dict[str, Tensor]:
        train(
            stego,
            unit_set(data),
            recipe,
            seed=seed,
            device=context.device,
            program=program,
            checkpoint=work,
            progress=context.progress,
            description="encoder of the attacker",
        )
        read, quality = read_back(stego, (data if context.test is None else context.test).images, seed)
        return {**model_state(stego), "bit_accuracy": torch.tensor(read), "psnr": torch.tensor(quality)}

    found = context.obtain("ssba_encoder", identity, make, seed=seed)
    measured = {name: found.pop(name) for name in ("bit_accuracy", "psnr")}
    load_state(stego, found)
    if float(measured["bit_accuracy"]) < _WELL_READ:
        _log.warning(
            "the encoder's secret is read back with %.1f %% of the bits right after %d epochs; raise encoder_epochs",
            100 * float(measured["bit_accuracy"]),
            recipe.epochs,
        )
    return stego.eval(), measured


def read_back(stego: Stego, images: Tensor, seed: int = 0) -> tuple[float, float]:
    """Share of the bits read right from encoded images rounded to grey levels, and their mean PSNR in dB.

    Args:
        stego: Trained networks, in eval mode.
        images: uint8 ``[N, C, H, W]``; each gets random bits of its own.
        seed: Of the bits.
    """
    device = next(stego.parameters()).device
    secrets = _random_bits(make_key("ssba check", seed), torch.arange(len(images)), stego.encoder.secret.in_features)
    right, quality = 0.0, 0.0
    for part, secret in zip(images.split(256), secrets.split(256), strict=True):
        wanted = secret.to(device)
        with torch.no_grad():
            coded = (stego.encoder(part.to(device).float() / 255, wanted) * 255).round()
            right += float(((stego.decoder(coded / 255) > 0) == (wanted > 0.5)).float().mean()) * len(part)
        quality += psnr(part.to(device), coded) * len(part)
    return right / len(images), quality / len(images)


class StegoProgram(Program):
    """Trains encoder and decoder with random bits for every image.

    ``default``: ``w * MSE + BCE``; ``w`` is 0 until a batch has more than 90 % of its bits right, stays so for
    ``secret_steps`` steps and then rises to 10 within ``ramp_steps``. ``issba``: ``2 MSE + 1.5 perceptual + 1.5 BCE +
    0.5 critic``, after ``secret_steps`` steps of BCE alone.

    Args:
        config: The attack's settings.
        critic: Network of the critic, for ``loss="issba"``.
    """

    classifies = False

    def __init__(self, config: SSBA.Config, critic: nn.Module | None = None) -> None:
        self.config, self.schedule, self.critic = config, config.schedule(), critic

    def start(self, model: nn.Module, train: ImageSet, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().start(model, train, recipe, seed, device)
        # On the device, so that no step waits for it: steps counted so far, then sums over the epoch.
        self.count = torch.zeros((), device=device)
        self.sums = torch.zeros(3, device=device)
        self.adversary: Adversary | None = None
        if self.critic is not None:
            network = self.critic.to(device)
            optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-5)
            self.adversary = Adversary(network, optimizer, lambda clean, coded: clean.mean() - coded.mean(), clip=0.01)

    def describe(self) -> dict[str, Any]:
        c = self.config
        critic = None if self.critic is None else content_hash(self.critic.state_dict())
        return {
            **super().describe(),
            "loss": c.loss,
            "residual": c.residual,
            "bits": c.bits,
            "steps": [self.schedule.secret_steps, self.schedule.ramp_steps],
            "critic": critic,
        }

    def make_batch(self, batch: Batch) -> Batch:
        self.bits = _random_bits(make_key("ssba bits", self.seed, batch.epoch), batch.index, self.config.bits)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        coded, logits = model(batch.x, self.bits)
        error = F.mse_loss(coded, batch.x)
        secret = F.binary_cross_entropy_with_logits(logits.float(), self.bits)
        right = ((logits.detach() > 0) == (self.bits > 0.5)).float().mean()
        self.sums += torch.stack([right, error.detach(), torch.ones_like(right)])
        if self.adversary is None:
            self.count += ((self.count > 0) | (right > _READ_AT)).float()
            return self._weight(_IMAGE_WEIGHT) * error + secret, None
        self.count += 1
        likeness = perceptual_distance(coded, batch.x)
        judged = self.adversary.judge(batch.x, coded).mean()
        return self._weight(1.0) * (2 * error + 1.5 * likeness + 0.5 * judged) + 1.5 * secret, None

    def after_step(self, model: nn.Module) -> None:
        if self.adversary is not None:
            self.adversary.step()

    def epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        right, error, steps = self.sums.tolist()
        self.sums.zero_()
        return {"bit_accuracy": right / steps, "mse": error / steps}

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, **({} if self.adversary is None else self.adversary.state())}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.count = tensors["count"]
        if self.adversary is not None:
            self.adversary.load_state(tensors)

    def _weight(self, full: float) -> Tensor:
        """Weight of the image's terms after this step's count."""
        past = self.count - self.schedule.secret_steps
        return full * (past / max(self.schedule.ramp_steps, 1)).clamp(0, 1)


def _random_bits(key: int, index: Tensor, bits: int) -> Tensor:
    """Independent bits for each sample, float32 ``[B, bits]``."""
    return (uniform(key, index, (bits,)) < 0.5).float()
