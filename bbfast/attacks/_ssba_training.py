"""How SSBA's encoder and decoder are trained, kept and judged (spec/attacks section 6)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast._hashing import content_hash
from bbfast.attacks._encoding import Adversary, psnr, steps_to_epochs, unit_set
from bbfast.attacks._networks import initial
from bbfast.attacks._similarity import perceptual_distance
from bbfast.attacks._ssba_nets import Critic, SecretDecoder, Stego
from bbfast.attacks.prerequisites import AttackContext
from bbfast.attacks.randomness import make_key, uniform
from bbfast.attacks.surrogate import set_hash
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch
from bbfast.models import load_state, model_state
from bbfast.training import Program, Recipe, train

if TYPE_CHECKING:
    from bbfast.attacks.ssba import SSBA

__all__ = ["StegoProgram", "obtain_stego", "read_back"]

_log = logging.getLogger(__name__)
_READ_AT = 0.9
_IMAGE_WEIGHT = 10.0
_WELL_READ = 0.99


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
