"""SSBA: a steganographic encoder hides a string in each image (Li et al., arXiv 2012.03816; spec/attacks section 6)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bbfast.attacks._bch import TEXT_CODES, text_bits
from bbfast.attacks._encoding import ENCODER, encode, read_encoder
from bbfast.attacks._networks import apply_network
from bbfast.attacks._ssba_nets import SecretEncoder
from bbfast.attacks._ssba_training import obtain_stego
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.data.imageset import ImageSet
from bbfast.models import model_state

__all__ = ["SSBA"]


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
