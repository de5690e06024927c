"""SSBA's networks: a steganographic encoder, the decoder it is trained with, a critic (spec/attacks section 6)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Critic", "SecretDecoder", "SecretEncoder", "Stego"]

_CODE = 16
"""Side of the planes that the dense layer turns a secret into; images are a multiple of it."""


class SecretEncoder(nn.Module):
    """Hides a bit string in an image: a U-Net over the image and the secret spread over planes of its size.

    Args:
        bits: Length of the secret.
        channels: Channels of the images.
        residual: The network gives a change that is added to the image and clamped; else the encoded image itself,
            through a sigmoid.
        centred: The dense layer sees ``secret - 0.5``.
    """

    def __init__(self, bits: int, channels: int = 3, *, residual: bool = False, centred: bool = False) -> None:
        super().__init__()
        self.residual, self.centred, self.channels = residual, centred, channels
        self.secret = nn.Linear(bits, channels * _CODE * _CODE)
        self.conv1 = _conv(2 * channels, 32)
        self.conv2 = _conv(32, 32, 2)
        self.conv3 = _conv(32, 64, 2)
        self.conv4 = _conv(64, 128, 2)
        self.conv5 = _conv(128, 256, 2)
        self.up6 = nn.Conv2d(256, 128, 2)
        self.conv6 = _conv(256, 128)
        self.up7 = nn.Conv2d(128, 64, 2)
        self.conv7 = _conv(128, 64)
        self.up8 = nn.Conv2d(64, 32, 2)
        self.conv8 = _conv(64, 32)
        self.up9 = nn.Conv2d(32, 32, 2)
        self.conv9 = _conv(64 + 2 * channels, 32)
        self.conv10 = _conv(32, 32)
        self.out = nn.Conv2d(32, channels, 1)

    def forward(self, images: Tensor, secret: Tensor) -> Tensor:
        """Encoded images in 0..1.

        Args:
            images: ``[B, C, H, W]``, 0..1, H and W multiples of 16.
            secret: ``[B, L]`` or ``[1, L]`` for all, bits as 0 and 1.

        Returns:
            ``[B, C, H, W]``, float32 (float64 for float64 images).
        """
        height, width = images.shape[-2:]
        code = F.relu(self.secret(secret - 0.5 if self.centred else secret))
        planes = F.interpolate(code.view(-1, self.channels, _CODE, _CODE), size=(height, width), mode="nearest")
        both = torch.cat([planes.expand(len(images), -1, -1, -1).to(images.dtype), images], 1)
        c1 = F.relu(self.conv1(both))
        c2 = F.relu(self.conv2(c1))
        c3 = F.relu(self.conv3(c2))
        c4 = F.relu(self.conv4(c3))
        c5 = F.relu(self.conv5(c4))
        c6 = F.relu(self.conv6(torch.cat([c4, _enlarged(self.up6, c5)], 1)))
        c7 = F.relu(self.conv7(torch.cat([c3, _enlarged(self.up7, c6)], 1)))
        c8 = F.relu(self.conv8(torch.cat([c2, _enlarged(self.up8, c7)], 1)))
        up9 = _enlarged(self.up9, c8)
        c9 = F.relu(self.conv9(torch.cat([c1, up9, both.to(up9.dtype)], 1)))
        change = self.out(F.relu(self.conv10(c9)))
        # Past this point every digit counts: bfloat16 cannot tell neighbouring grey levels apart.
        change = change if change.dtype == torch.float64 else change.float()
        return (images + change).clamp(0, 1) if self.residual else torch.sigmoid(change)


class SecretDecoder(nn.Module):
    """Reads the bits back; used in training only.

    Args:
        bits: Length of the secret.
        size: ``(C, H, W)`` of the images.
    """

    def __init__(self, bits: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = size
        plan = ((channels, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 128, 2), (128, 128, 2))
        layers: list[nn.Module] = []
        for inside, outside, stride in plan:
            conv = _conv(inside, outside, stride)
            if min(height, width) == 1:
                # oneDNN leaves the bfloat16 gradient of weights that see padding alone uninitialised (torch 2.11).
                layers.append(nn.ZeroPad2d(1))
                conv.padding = (0, 0)
            layers += [conv, nn.ReLU()]
            height, width = -(-height // stride), -(-width // stride)
        dense = [nn.Linear(128 * height * width, 512), nn.ReLU(), nn.Linear(512, bits)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), *dense)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, L]`` of the bits of images ``[B, C, H, W]`` in 0..1."""
        logits: Tensor = self.layers(images)
        return logits


class Stego(nn.Module):
    """Encoder and decoder, trained together."""

    def __init__(self, encoder: SecretEncoder, decoder: SecretDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        # With torch's own initial weights a secret fades from layer to layer and for long nothing is learned; those of
        # He et al. 2015 keep its variance.
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, secret: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded images and the logits read back from them."""
        encoded = self.encoder(images, secret)
        return encoded, self.decoder(encoded)


class Critic(nn.Module):
    """Scores how encoded an image looks (Wasserstein critic of the paper's own loss).

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        widths = (channels, 8, 16, 32, 64)
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [_conv(inside, outside, 2), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _conv(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores, ``[B, 1, h, w]``."""
        scores: Tensor = self.layers(images)
        return scores


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, padding=1)


def _enlarged(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Twice the size: nearest neighbour, a zero row and column at the end, then a 2 x 2 convolution and ReLU."""
    return F.relu(conv(F.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"), (0, 1, 0, 1))))
