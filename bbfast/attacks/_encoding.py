"""What attacks with a trained image encoder share: applying it, reading its weights, training it against a critic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bbfast.attacks._networks import TrainedNetwork
from bbfast.data.imageset import ImageSet
from bbfast.models import load_state

__all__ = ["ENCODER", "Adversary", "encode", "psnr", "read_encoder", "steps_to_epochs", "unit_set"]

ENCODER = "encoder"
"""Prefix of the encoder's weights among a trigger's tensors."""


def encode(images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
    """Put an encoder's trigger on images.

    Args:
        images: uint8 ``[N, C, H, W]``; or float in 0..1, then gradients flow and nothing is quantised.
        network: Maps float32 (float64 for float64 images) ``[N, C, H, W]`` to encoded images in 0..1.

    Returns:
        Like ``images``, new memory; uint8 is rounded half to even.
    """
    if not len(images):
        return images.clone()
    if images.is_floating_point():
        return network(images if images.dtype == torch.float64 else images.float()).to(images.dtype)
    return network(images.float() / 255).mul(255).round().to(torch.uint8)


def read_encoder(path: Path, network: nn.Module) -> None:
    """Load a user's weights into ``network``.

    Args:
        path: safetensors with the network's own names, with or without ``encoder.`` before them: the ``trigger`` file
            of a saved attack result will do.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file or holds another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"encoder_path {path} does not exist")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"encoder_path {path} cannot be read as safetensors: {error}") from error
    start = f"{ENCODER}."
    own = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
    try:
        load_state(network, own or found)
    except ValueError as error:
        raise ValueError(f"encoder_path {path}: {error}") from None


class Adversary(TrainedNetwork):
    """A network trained against the one that the engine trains, a step after each of the other's.

    Args:
        network: Scores images.
        optimizer: Of its parameters.
        loss: ``loss(scores of clean images, scores of encoded images)``.
        clip: Largest absolute weight after a step (Wasserstein critics); None does not clip.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],
        clip: float | None = None,
    ) -> None:
        super().__init__("adversary", network, optimizer)
        self.loss, self.clip = loss, clip
        self._pair: tuple[Tensor, Tensor] | None = None

    def judge(self, clean: Tensor, encoded: Tensor) -> Tensor:
        """Scores of the encoded images, for the other side's loss; the pair is kept for :meth:`step`."""
        self._pair = clean.detach(), encoded.detach()
        self.network.requires_grad_(False)
        scores: Tensor = self.network(encoded)
        return scores.float()

    def step(self) -> None:
        """Train on the pair last judged; nothing if there is none."""
        if self._pair is None:
            return
        (clean, encoded), self._pair = self._pair, None
        self.network.requires_grad_(True)
        self.loss(self.network(clean), self.network(encoded)).backward()
        super().step()
        if self.clip is not None:
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.clamp_(-self.clip, self.clip)


def unit_set(data: ImageSet) -> ImageSet:
    """The same images, normalised to 0..1 and no further."""
    return ImageSet(data.images, data.labels, ids=data.ids)


def steps_to_epochs(steps: int, samples: int, batch_size: int) -> int:
    """Epochs that hold at least ``steps`` steps."""
    per_epoch = -(-samples // batch_size)
    return -(-steps // per_epoch)


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images of uint8 ``[N, C, H, W]``; equal images count as 100."""
    error = (images.double() - others.double()).div_(255).pow_(2).mean(dim=(1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())
