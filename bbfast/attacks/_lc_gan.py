"""LC's other way to make poison: images between two classes, from a small WGAN (spec/attacks section 3).

A generator is trained on the images of both classes, each image is encoded by a search for the noise that gives it, and
the poison is what the generator makes of a point between the codes of a target and a source image.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from bbfast import _progress
from bbfast.attacks._units import unit_images
from bbfast.attacks.randomness import integers, make_key
from bbfast.data.imageset import ImageSet

__all__ = ["Generator", "WganSettings", "encode", "interpolated", "train_generator"]

_NOISE, _WIDTH = 100, 64
_BATCH = 64
_CRITIC_STEPS, _CLIP, _RATE = 5, 0.01, 5e-5
_ENCODE_STEP = 0.05


@dataclasses.dataclass(frozen=True)
class WganSettings:
    """How poison is made.

    Args:
        iterations: Steps of the generator, each after five of the critic.
        encode_steps: Signed gradient steps of the search for an image's code.
        tau: Share of the source image's code.
    """

    iterations: int
    encode_steps: int
    tau: float


class Generator(nn.Module):
    """DCGAN's generator: noise ``[B, 100]`` to images ``[B, C, H, W]`` in 0..1, through three stride-2 stages.

    Args:
        image_size: ``(C, H, W)``; sides that are no multiples of 8 are cut to size.
    """

    def __init__(self, image_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, self.height, self.width = image_size
        self.start = (4 * _WIDTH, -(-self.height // 8), -(-self.width // 8))
        self.project = nn.Sequential(
            nn.Linear(_NOISE, self.start[0] * self.start[1] * self.start[2]),
            nn.Unflatten(1, self.start),
            nn.BatchNorm2d(self.start[0]),
            nn.ReLU(),
        )
        self.grow = nn.Sequential(
            nn.ConvTranspose2d(4 * _WIDTH, 2 * _WIDTH, 4, 2, 1),
            nn.BatchNorm2d(2 * _WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * _WIDTH, _WIDTH, 4, 2, 1),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(_WIDTH, channels, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.grow(self.project(noise))
        return images[..., : self.height, : self.width]


class Critic(nn.Module):
    """The mirror image of the generator: images to one number each, without normalisation, as clipped weights ask."""

    def __init__(self, image_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_size
        self.shrink = nn.Sequential(
            *(
                layer
                for before, after in ((channels, _WIDTH), (_WIDTH, 2 * _WIDTH), (2 * _WIDTH, 4 * _WIDTH))
                for layer in (nn.Conv2d(before, after, 5, 2, 2), nn.LeakyReLU(0.2))
            ),
            nn.Flatten(),
        )
        self.judge = nn.Linear(4 * _WIDTH * -(-height // 8) * -(-width // 8), 1)

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.judge(self.shrink(images))
        return values.squeeze(1)


def train_generator(
    images: Tensor, iterations: int, seed: int, device: torch.device, progress: bool | None = None
) -> Generator:
    """A WGAN with clipped weights (Arjovsky, Chintala and Bottou, arXiv 1701.07875, algorithm 1).

    Args:
        images: uint8 ``[N, C, H, W]``, N >= 1.
        iterations: Steps of the generator.
        seed: Of weights, noise and batches.
        device: Where to train.
        progress: As in :func:`bbfast.train`.

    Returns:
        The generator in eval mode, its weights frozen.
    """
    size = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(make_key("lc gan weights", seed))
        generator, critic = Generator(size).to(device), Critic(size).to(device)
    draws = torch.Generator().manual_seed(make_key("lc gan draws", seed))
    make, judge = (torch.optim.RMSprop(net.parameters(), lr=_RATE) for net in (generator, critic))

    def noise() -> Tensor:
        return torch.randn(_BATCH, _NOISE, generator=draws).to(device)

    with _progress.bar("WGAN of LC", iterations, progress) as bar:
        for _ in range(iterations):
            for _ in range(_CRITIC_STEPS):
                real = unit_images(images[torch.randint(len(images), (_BATCH,), generator=draws)], device)
                with torch.no_grad():
                    fake = generator(noise())
                judge.zero_grad(set_to_none=True)
                (critic(fake).mean() - critic(real).mean()).backward()
                judge.step()
                with torch.no_grad():
                    for p in critic.parameters():
                        p.clamp_(-_CLIP, _CLIP)
            make.zero_grad(set_to_none=True)
            (-critic(generator(noise())).mean()).backward()
            make.step()
            bar.advance()
    return generator.eval().requires_grad_(False)


def encode(generator: Generator, images: Tensor, steps: int) -> Tensor:
    """The noise ``[B, 100]`` whose image is nearest: signed gradient steps that shrink to 0, from zero noise.

    Args:
        generator: In eval mode, its weights frozen.
        images: float ``[B, C, H, W]`` in 0..1.
        steps: Number of steps.
    """
    code = torch.zeros(len(images), _NOISE, device=images.device)
    for step in range(steps):
        code.requires_grad_()
        with torch.enable_grad():
            distance = (generator(code) - images).square().sum()
        (gradient,) = torch.autograd.grad(distance, code)
        code = code.detach() - _ENCODE_STEP * (1 - step / steps) * gradient.sign()
    return code.detach()


def interpolated(
    rows: ImageSet,
    sources: ImageSet,
    settings: WganSettings,
    seed: int,
    device: torch.device,
    batch_size: int,
    progress: bool | None = None,
) -> Tensor:
    """For each target image one between it and a source image, float ``[P, C, H, W]`` in 0..1 on the CPU.

    Which source image goes with a target image depends on the seed and the target image's number alone.
    """
    generator = train_generator(torch.cat([rows.images, sources.images]), settings.iterations, seed, device, progress)
    drawn = integers(make_key("lc gan source", seed), rows.ids, (1,), 0, len(sources) - 1).squeeze(1)
    parts = []
    for part in torch.arange(len(rows), device=rows.device).split(batch_size):
        codes = [
            encode(generator, unit_images(images, device), settings.encode_steps)
            for images in (sources.images[drawn[part]], rows.images[part])
        ]
        parts.append(generator(settings.tau * codes[0] + (1 - settings.tau) * codes[1]).cpu())
    return torch.cat(parts)
