from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from bbfast.data.imageset import ImageSet
from bbfast.training import Recipe


def easy_set(n: int, classes: int = 3, size: int = 8, seed: int = 0) -> ImageSet:
    """Classes told apart by the brightness of their images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 40, (n, 3, size, size), generator=generator)
    images = (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageSet(images, labels, mean=(0.4, 0.4, 0.4), std=(0.25, 0.25, 0.25))


def tiny_net(classes: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """Convolution, BatchNorm and a linear layer: 200 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )


@pytest.fixture
def make_set() -> Callable[..., ImageSet]:
    return easy_set


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    return tiny_net


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(epochs=3, batch_size=16, lr=0.1, precision="fp32", padding=1, deterministic=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Nets this small are slowed down by a second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
