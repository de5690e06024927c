"""Batches that take more than one tile and more than one block of samples in the CPU kernels (csrc/common/tiles.h)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bbfast import ops
from bbfast.ops import reference

N, C, H, W = 67, 3, 47, 53  # a plane is more than 2048 elements and no multiple of 64; 67 samples are two blocks
FORMATS = [torch.contiguous_format, torch.channels_last]


def random_batch(dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, C, H, W), dtype=torch.uint8, generator=g)
    return (images if dtype == torch.uint8 else images.to(dtype) / 255).contiguous(memory_format=layout)


def arguments(op: str, images: Tensor) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(2)
    mask = torch.zeros(H, W)
    mask[20:40, 10:] = torch.rand(20, W - 10, generator=g)
    delta = 80 * torch.rand(C, H, W, generator=g) - 40
    return {
        "patch": (images[0], mask),
        "blend": (images[0], 0.3),
        "add": (delta if images.dtype == torch.uint8 else delta / 255,),
        "sinusoid": (),
        "quantize": (8,),
    }[op]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["patch", "blend", "add", "sinusoid", "quantize"])
def test_large_batches_agree_with_the_reference(op: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    images = random_batch(dtype, layout)
    given = arguments(op, images)
    for where in (None, torch.arange(N) % 3 != 0):
        expected = getattr(reference, op)(images, *given, where=where)
        assert torch.equal(getattr(ops, op)(images, *given, where=where), expected)


@pytest.mark.parametrize("op", ["patch", "blend", "add"])
def test_a_pattern_for_each_sample(op: str) -> None:
    images = random_batch(torch.uint8, torch.contiguous_format)
    own = images.flip(0) if op != "add" else images.flip(0).float() / 3 - 40
    rest = {"patch": (torch.linspace(0, 1, H * W).view(H, W),), "blend": (torch.linspace(0, 1, N),), "add": ()}[op]
    assert torch.equal(getattr(ops, op)(images, own, *rest), getattr(reference, op)(images, own, *rest))


@pytest.mark.parametrize("value", [3e9, 1e30, float("inf"), -3e9, -float("inf")])
def test_a_float_pattern_far_outside_the_bytes_is_clamped(value: float) -> None:
    images = random_batch(torch.uint8, torch.contiguous_format)[:2]
    pattern = torch.full((C, H, W), value)
    bound = 255 if value > 0 else 0
    assert (ops.patch(images, pattern, torch.full((H, W), 0.5)) == bound).all()
    assert (ops.blend(images, pattern, 0.5) == bound).all()
