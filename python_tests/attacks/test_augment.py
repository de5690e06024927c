"""Crop, rotation and flip after poisoning equal torchvision's, one after the other."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.functional as tv
from torch import Tensor

from bbfast.attacks._augment import TensorAugment, rearrange


def one_by_one(x: Tensor, offset: tuple[int, int], degrees: float, flip: bool, pad: int = 5) -> Tensor:
    """What torchvision does, as the reference calls it: pad and crop, rotate (nearest, zero fill), flip."""
    height, width = x.shape[-2:]
    out = tv.crop(tv.pad(x, pad), pad + offset[0], pad + offset[1], height, width)
    out = tv.rotate(out, degrees)
    return tv.hflip(out) if flip else out


@pytest.mark.parametrize("offset", [(0, 0), (5, -5), (-3, 2)])
@pytest.mark.parametrize("degrees", [0.0, 3.7, -9.9, 90.0])
@pytest.mark.parametrize("flip", [False, True])
def test_rearrange_is_torchvision_in_sequence(offset: tuple[int, int], degrees: float, flip: bool) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = rearrange(x, torch.tensor([offset]), torch.tensor([math.radians(degrees)]), torch.tensor([flip]))
    theirs = one_by_one(x, offset, degrees, flip)
    # A coordinate within a rounding error of halfway between two pixels may go either way.
    assert (ours != theirs).float().mean() < 0.002


def test_rows_are_independent() -> None:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    offset, angle = torch.tensor([[1, 2], [0, 0], [-4, 3]]), torch.tensor([0.1, 0.0, -0.17])
    flip = torch.tensor([True, False, True])
    together = rearrange(x, offset, angle, flip)
    apart = [rearrange(x[i : i + 1], offset[i : i + 1], angle[i : i + 1], flip[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(together[1], x[1])


def test_a_sample_is_augmented_the_same_in_any_batch() -> None:
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    index = torch.arange(100, 112)
    augment = TensorAugment(flip=True)
    whole = augment(x, index, seed=0, epoch=3, step=0)
    order = torch.tensor([5, 0, 11, 3])
    assert torch.equal(augment(x[order], index[order], seed=0, epoch=3, step=9), whole[order])
    assert not torch.equal(augment(x, index, seed=0, epoch=4, step=0), whole)


def test_per_batch_draw_moves_all_samples_alike() -> None:
    one = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    augment = TensorAugment(per_sample=False)
    moved = [augment(one.expand(6, -1, -1, -1), torch.arange(6), seed=0, epoch=0, step=s) for s in range(8)]
    assert all(torch.equal(batch, batch[:1].expand_as(batch)) for batch in moved)
    assert len({batch[0].sum().item() for batch in moved}) > 1


def test_probabilities_and_ranges() -> None:
    """A single bright pixel tells where every sample went: shares of crops, flips and angles follow the protocol."""
    n, side = 4000, 31
    x = torch.zeros(n, 1, side, side)
    x[:, 0, 15, 15] = 1  # the centre: rotations and flips leave it where it is
    moved = TensorAugment(crop=5, rotation=10, flip=True)(x, torch.arange(n), seed=0, epoch=0, step=0)
    still = (moved[:, 0, 15, 15] == 1).float().mean()
    assert abs(still - (0.2 + 0.8 / 121)) < 0.02
    x = torch.zeros(n, 1, side, side)
    x[:, 0, 15, 25] = 1  # right of the centre: flips move it to the left
    moved = TensorAugment(crop=0, rotation=0, flip=True)(x, torch.arange(n), seed=0, epoch=0, step=0)
    assert abs((moved[:, 0, 15, 5] == 1).float().mean() - 0.5) < 0.03
    moved = TensorAugment(crop=0, rotation=10, flip=False)(x, torch.arange(n), seed=0, epoch=0, step=0)
    rows = moved[:, 0].amax(2).argmax(1)
    assert rows.min() >= 13 and rows.max() <= 17  # 10 sin(10 degrees) = 1.7
    assert 0.5 < (rows == 15).float().mean() < 0.8  # half unrotated, the rest by less than half a pixel in 3 of 10


def test_memory_format_is_kept() -> None:
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    out = TensorAugment()(x, torch.arange(4), seed=0, epoch=0, step=0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, TensorAugment()(x.contiguous(), torch.arange(4), seed=0, epoch=0, step=0))


def test_switched_off_it_changes_nothing() -> None:
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(TensorAugment(0, 0.0, False)(x, torch.arange(4), seed=0, epoch=0, step=0), x)
