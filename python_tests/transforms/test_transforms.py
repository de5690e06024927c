"""Triggers as transforms: every kind of input, pipelines, state, and what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

import bbfast.transforms as triggers
from bbfast import ops

SIDE = 32


def _picture(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _wanet() -> triggers.WaNet:
    return triggers.WaNet(SIDE, generator=torch.Generator().manual_seed(0))


# Each trigger: how it is made, and what it must compute on a batch.
CASES: dict[str, tuple[Callable[[], triggers.Trigger], Callable[[Tensor], Tensor]]] = {
    "BadNets": (triggers.BadNets, lambda x: _white_corner(x)),
    "BadNets-own": (
        lambda: triggers.BadNets(_picture(1), torch.full((SIDE, SIDE), 0.5)),
        lambda x: ops.patch(x, _units(x, _picture(1)), torch.full((SIDE, SIDE), 0.5)),
    ),
    "Blended": (
        lambda: triggers.Blended(_picture(2), 0.3),
        lambda x: ops.blend(x, _units(x, _picture(2)), 0.3),
    ),
    "BPP": (triggers.BPP, lambda x: ops.quantize(x, 8, dither=True)),
    "CTRL": (triggers.CTRL, lambda x: ops.spectral_add(x, [(15, 15), (31, 31)], 100, window=32)),
    "FIBA": (lambda: triggers.FIBA(_picture(2)), lambda x: ops.amplitude_mix(x, _units(x, _picture(2)), 0.15, 0.1)),
    "FTrojan": (triggers.FTrojan, lambda x: ops.spectral_add(x, [(15, 15), (31, 31)], 30, color="ycrcb")),
    "Refool": (
        lambda: triggers.Refool(_picture(2), "out_of_focus", sigma=2.0),
        lambda x: ops.reflect(x, _units(x, _picture(2)), "out_of_focus", sigma=2.0),
    ),
    "SIG": (triggers.SIG, lambda x: ops.sinusoid(x, 40, 6)),
    **{
        name: (
            lambda name=name: getattr(triggers, name)(_picture(8) / 8.0),
            lambda x: ops.add(x, _picture(8) / 8.0 / (255 if x.is_floating_point() else 1)),
        )
        for name in ("Additive", "LF", "TUAP", "Narcissus")
    },
    "WaNet": (_wanet, lambda x: ops.warp(x, _wanet().grid)),
}


def _units(x: Tensor, picture: Tensor) -> Tensor:
    return picture.to(x.dtype) / 255 if x.is_floating_point() else picture


def _white_corner(x: Tensor) -> Tensor:
    out = x.clone()
    out[..., -3:, -3:] = 1 if x.is_floating_point() else 255
    return out


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[triggers.Trigger, Callable[[Tensor], Tensor]]:
    make, expected = CASES[request.param]
    return make(), expected


def test_every_trigger_has_a_case() -> None:
    assert {name.partition("-")[0] for name in CASES} | {"Trigger"} == set(triggers.__all__)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_tensors_of_any_leading_dimensions(case, dtype, lead):
    trigger, expected = case
    x = torch.stack([_picture(i) for i in range(6)])[: int(np.prod(lead)) if lead else 1]
    x = x.reshape(*lead, 3, SIDE, SIDE)
    x = x if dtype == torch.uint8 else x.to(dtype) / 255
    before = x.clone()
    out = trigger(x)
    assert out.shape == x.shape and out.dtype == dtype and torch.equal(x, before)
    assert torch.equal(out, expected(x.reshape(-1, 3, SIDE, SIDE)).reshape(x.shape))
    if x.numel():
        assert not torch.equal(out, x)


def test_a_tv_image_stays_one_and_other_parts_pass(case):
    trigger, expected = case
    image = tv_tensors.Image(_picture(3))
    mask = tv_tensors.Mask(torch.zeros(SIDE, SIDE, dtype=torch.bool))
    out = trigger({"image": image, "mask": mask, "label": 7, "extra": torch.arange(3)})
    assert isinstance(out["image"], tv_tensors.Image)
    assert torch.equal(out["image"].as_subclass(Tensor), expected(image.as_subclass(Tensor)[None])[0])
    assert out["mask"] is mask and out["label"] == 7 and torch.equal(out["extra"], torch.arange(3))


def test_a_pil_image_stays_one(case):
    trigger, expected = case
    picture = _picture(4)
    out = trigger(PIL.Image.fromarray(picture.permute(1, 2, 0).numpy()))
    assert isinstance(out, PIL.Image.Image) and out.mode == "RGB"
    assert torch.equal(torch.from_numpy(np.array(out)).permute(2, 0, 1), expected(picture[None])[0])


def test_within_a_pipeline_with_labels(case):
    trigger, expected = case
    pipeline = v2.Compose([v2.ToImage(), trigger, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    picture, label = _picture(5), 3
    out, kept = pipeline(PIL.Image.fromarray(picture.permute(1, 2, 0).numpy()), label)
    assert kept == label
    torch.testing.assert_close(out.as_subclass(Tensor), (expected(picture[None])[0] / 255 - 0.5) / 0.5)


def test_a_copy_in_a_worker_process_does_the_same(case):
    trigger, _ = case
    copy = pickle.loads(pickle.dumps(trigger))
    assert torch.equal(copy(_picture(6)), trigger(_picture(6)))
    assert set(trigger.state_dict()) == {name for name, _ in trigger.named_buffers()}


def test_the_square_scales_and_can_be_placed():
    out = triggers.BadNets()(torch.zeros(1, 224, 224))
    assert out.sum() == 21 * 21 and out[0, -21:, -21:].min() == 1
    out = triggers.BadNets(square_size=2, distance_to_right=1, distance_to_bottom=4)(torch.zeros(1, 8, 8))
    assert out.sum() == 4 and out[0, 2:4, 5:7].min() == 1


def test_gradients_reach_the_images(case):
    trigger, _ = case
    if isinstance(trigger, triggers.BPP):
        pytest.skip("quantising has no gradient")
    x = (_picture(7).float() / 255).requires_grad_()
    trigger(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: triggers.BadNets(mask=torch.ones(2, 2)), ValueError, "mask needs pattern"),
        (lambda: triggers.BadNets(torch.ones(3, 2, 2)), TypeError, "pattern must be a uint8 tensor"),
        (lambda: triggers.BadNets(square_size=0), ValueError, "square_size must be at least 1, got 0"),
        (lambda: triggers.BadNets(distance_to_right=-1), ValueError, "distance_to_right must be at least 0, got -1"),
        (lambda: triggers.BadNets(square_size="3"), TypeError, "BadNets: square_size must be an integer, got '3'"),
        (lambda: triggers.BadNets(_picture(), torch.ones(4, 4)), ValueError, r"mask must be \[32, 32\]"),
        (lambda: triggers.BadNets(_picture(), torch.ones(32, 32) * 2), ValueError, r"mask must lie in 0\.\.1"),
        (lambda: triggers.Blended(_picture().float()), TypeError, "pattern must be a uint8 tensor"),
        (lambda: triggers.Blended(_picture(), 1.5), ValueError, "alpha must lie in 0..1, got 1.5"),
        (lambda: triggers.LF(_picture()), TypeError, "LF: delta must be a floating tensor"),
        (lambda: triggers.Blended(_picture(), "1"), TypeError, "alpha must be a number or a floating tensor"),
        (lambda: triggers.LF([1.0]), TypeError, "LF: delta must be a floating tensor .* got list"),
        (lambda: triggers.LF(torch.zeros(2, 2)), ValueError, r"LF: delta must be \[C, H, W\]"),
        (lambda: triggers.SIG(float("nan")), ValueError, "amplitude"),
        (lambda: triggers.BPP(1), ValueError, "levels"),
        (lambda: triggers.FTrojan([(40, 0)]), ValueError, "positions must lie in a block of 32 x 32"),
        (lambda: triggers.CTRL([]), ValueError, "positions must not be empty"),
        (lambda: triggers.FIBA(_picture().float()), TypeError, "pattern must be a uint8 tensor"),
        (lambda: triggers.FIBA(_picture(), alpha=2), ValueError, "alpha"),
        (lambda: triggers.Refool(_picture(), "mirror"), ValueError, "mode must be one of"),
        (
            lambda: triggers.WaNet(8, grid=torch.zeros(4, 4, 2)),
            ValueError,
            r"grid must be a floating tensor \[8, 8, 2\]",
        ),
        (lambda: triggers.WaNet(8, grid=[0.0]), ValueError, "WaNet: grid must be a floating tensor .* got list"),
        (lambda: triggers.BadNets(square_size=9)(torch.zeros(1, 8, 8)), ValueError, "does not fit into 8 x 8"),
        (lambda: triggers.Blended(_picture())(torch.zeros(3, 8, 8)), ValueError, "pattern must be"),
        (lambda: triggers.BadNets()(torch.zeros(8, 8)), ValueError, r"image must be \[C, H, W\]"),
        (lambda: triggers.BadNets()(torch.zeros(3, 8, 8, dtype=torch.int64)), TypeError, "must be uint8 or floating"),
    ],
)
def test_what_does_not_fit_is_named(make, error, text):
    with pytest.raises(error, match=text):
        make()
