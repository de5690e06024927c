"""Poison Ink: the ink image, the moves and losses of its networks' training, the trigger, the mixed training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

import bbfast
from bbfast import ops
from bbfast.attacks import AttackContext, AttackResult, create
from bbfast.attacks._encoding import psnr
from bbfast.attacks._ink import edge_mask, fit_colour, ink_image, move_grids, random_colours
from bbfast.attacks._ink_training import InkProgram, obtain_ink_nets, read_ink
from bbfast.attacks._poison_ink_nets import Discriminator, Extractor, Injector, InkNets
from bbfast.attacks.poison_ink import MixedProgram
from bbfast.attacks.prerequisites import default_context
from bbfast.data import DataPair, ImageSet
from bbfast.data.loader import Batch
from bbfast.errors import ConfigError
from bbfast.store import Store

TINY: dict[str, Any] = {"encoder_epochs": 1, "encoder_batch_size": 16, "injector_width": 4, "extractor_width": 4}


@pytest.fixture
def context(tmp_path: Path, make_set) -> AttackContext:
    data = make_set(64, 16)
    return dataclasses.replace(default_context(data, 10), store=Store(tmp_path / "made"), progress=False)


def prepared(context: AttackContext, data: ImageSet, **settings):
    attack = create("poison_ink", **{**TINY, **settings})
    attack.prepare(data, 10, 0, context)
    return attack


# The ink image --------------------------------------------------------------------------------------------------------


def test_edges_are_those_of_a_sobel_filter(make_set) -> None:
    """scipy's filter, border repeated ("reflect" there), divided by 4 for its weights 1 2 1."""
    images = make_set(6, 16).images
    unit = images.float() / 255
    for x, expected in zip(unit, edge_mask(unit, 28.0), strict=True):
        grey = (x.double() * 255 * torch.tensor([0.299, 0.587, 0.114]).double().view(3, 1, 1)).sum(0).numpy()
        gx, gy = (ndimage.sobel(grey, axis=axis, mode="reflect") / 4 for axis in (0, 1))
        size = np.sqrt((gx**2 + gy**2) / 2)
        clear = np.abs(size - 28) > 1e-3
        assert np.array_equal((size > 28)[clear], expected[0].bool().numpy()[clear])
    assert 0.05 < edge_mask(unit, 28.0).mean() < 0.95


def test_a_step_counts_0_7_of_its_height() -> None:
    x = torch.zeros(1, 1, 16, 16)
    for height, edge in ((39, 0), (40, 2 * 16)):  # 39 * .707 = 27.6, 40 * .707 = 28.3
        x[..., 8:] = height / 255
        assert edge_mask(x, 28.0).sum() == edge


def test_ink_is_colour_on_edges_and_white_elsewhere() -> None:
    x = torch.zeros(2, 3, 16, 16)
    x[1, :, :, 8:] = 1
    ink, mask = ink_image(x, torch.tensor([80.0, 160.0, 80.0]), 28.0)
    assert torch.equal(ink[0], torch.ones(3, 16, 16)) and mask[1].sum() == 32
    assert torch.allclose(ink[1, :, 3, 8], torch.tensor([80, 160, 80]) / 255) and torch.equal(
        ink[1, :, 3, 4], torch.ones(3)
    )
    each, _ = ink_image(x[[1, 1]], torch.tensor([[0.0, 0, 0], [255, 0, 0]]), 28.0)
    assert each[:, 0, 3, 8].tolist() == [0, 1]
    assert fit_colour((80, 160, 80), 1).item() == pytest.approx(126.96)


def test_colours_are_whole_numbers_of_each_sample() -> None:
    colours = random_colours(torch.arange(4000), 3, 0, "rot", 1)
    assert torch.equal(colours, colours.round()) and colours.min() == 0 and colours.max() == 255
    assert colours.mean() == pytest.approx(127.5, abs=3)
    assert torch.equal(random_colours(torch.tensor([17]), 3, 0, "rot", 1), colours[17:18])
    assert not torch.equal(random_colours(torch.arange(4000), 3, 0, "rot", 2), colours)


# The moves ------------------------------------------------------------------------------------------------------------


def test_moves_turn_shift_crop_and_flip() -> None:
    index = torch.arange(3000)
    for stage in ("rot", "crop", "flip", "adv"):
        grid = move_grids(index, (32, 32), stage, 0)
        inner = (grid[:, 12:20, 12:20].double() * 15.5).flatten(1, 2)  # pixels, away from the clamped border
        right, down = inner[:, 1] - inner[:, 0], inner[:, 8] - inner[:, 0]
        scale, flipped = right.norm(dim=1), right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0] < 0
        angle = torch.atan2(right[:, 1], right[:, 0])[~flipped].abs()
        assert math.radians(44) < angle.max() < math.radians(45.01)
        assert float(flipped.double().mean()) == pytest.approx(0.5 if stage in ("flip", "adv") else 0, abs=0.03)
        cropped = (scale - 28 / 32).abs() < 1e-3
        assert bool((cropped | ((scale - 1).abs() < 1e-3)).all())
        assert float(cropped.double().mean()) == pytest.approx(0 if stage == "rot" else 0.5, abs=0.03)
        centre = inner.mean(1)[~cropped].abs()
        assert centre.max() < 2 * math.sqrt(2) and centre.max() > 2
    assert torch.equal(
        move_grids(torch.tensor([17]), (32, 32), "flip", 0), move_grids(index, (32, 32), "flip", 0)[17:18]
    )


def test_moves_keep_right_angles_in_oblong_images() -> None:
    grid = move_grids(torch.arange(50), (16, 48), "rot", 0)[:, 6:9, 22:25].double() * torch.tensor([23.5, 7.5])
    right, down = grid[:, 1, 2] - grid[:, 1, 1], grid[:, 2, 1] - grid[:, 1, 1]
    assert torch.allclose((right * down).sum(1), torch.zeros(50).double(), atol=1e-4)
    assert torch.allclose(right.norm(dim=1), torch.ones(50).double(), atol=1e-4)


# Networks and their training ------------------------------------------------------------------------------------------


def test_networks_are_those_of_the_paper() -> None:
    injector, extractor = Injector(), Extractor()
    widths = [m.out_channels for m in injector.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 256, 256, 128, 128, 64, 64, 64, 3]
    convs = [m for m in extractor.modules() if isinstance(m, nn.Conv2d)]
    assert [m.dilation[0] for m in convs] == [1] * 3 + [2] * 6 + [4] * 6 + [1] * 4
    assert all(float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.1) for m in convs if m.weight.numel() > 1000)
    x = torch.rand(2, 3, 32, 32)
    assert injector(torch.cat([x, x], 1)).shape == x.shape and extractor(x).shape == x.shape
    assert Discriminator()(x).shape == (2, 1, 2, 2)


class White(nn.Module):
    """Reads ``value`` everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


class Whole(nn.Module):
    """Leaves the image as it is, but ``by`` brighter."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, both: Tensor) -> Tensor:
        return both[:, : both.shape[1] // 2] + self.by


def started(program: InkProgram, data: ImageSet) -> InkProgram:
    program.start(nn.Identity(), data, bbfast.Recipe(), 0, torch.device("cpu"))
    return program


def test_losses(make_set) -> None:
    data = make_set(8, 32)
    batch = Batch(data.images.float() / 255, data.labels, data.ids)
    program = started(InkProgram("crop", 28.0), data)
    program.make_batch(batch)
    moved = ops.warp(batch.x, program.moves)
    wanted, mask = ink_image(moved, program.colour, 28.0)
    for value, by in ((1.0, 0.1), (0.5, 0.0)):
        loss, logits = program.loss(InkNets(Whole(by), White(value)), batch)  # type: ignore[arg-type]
        edge = (((value - wanted) * mask) ** 2).mean()
        back = (((value - 1) * (1 - mask)) ** 2).expand(-1, 3, -1, -1).mean()
        assert logits is None
        total = by**2 + 13 * float(edge) + float(back) + 100 * (1 - value) ** 2
        assert float(loss) == pytest.approx(1e4 * total, rel=1e-4)
    row = program.epoch_end(0, nn.Identity())
    assert row["clean"] == pytest.approx(0.125) and row["invisible"] == pytest.approx(0.005, rel=1e-3)


def test_the_last_stage_trains_a_discriminator(make_set) -> None:
    data = make_set(4, 32)
    batch = Batch(data.images.float() / 255, data.labels, data.ids)
    torch.manual_seed(0)
    with_it, without = (started(InkProgram("adv", 28.0, d), data) for d in (Discriminator(), None))
    losses = []
    for program in (with_it, without):
        program.make_batch(batch)
        losses.append(float(program.loss(InkNets(Whole(0.0), White(1.0)), batch)[0]))  # type: ignore[arg-type]
    assert with_it.adversary is not None and with_it.discriminator is not None
    scores = with_it.discriminator(batch.x)
    assert losses[0] - losses[1] == pytest.approx(1e4 * float((scores - 1).square().mean()), rel=1e-3)
    before = {name: value.clone() for name, value in with_it.discriminator.state_dict().items()}
    with_it.after_step(nn.Identity())
    assert any(not torch.equal(value, before[name]) for name, value in with_it.discriminator.state_dict().items())
    other = started(InkProgram("adv", 28.0, Discriminator()), data)
    saved = {name: value.clone() for name, value in with_it.state().items()}
    other.load_state(saved)
    assert all(torch.equal(value, saved[name]) for name, value in other.state().items())


def test_a_killed_training_goes_on_in_its_stage(
    context: AttackContext, make_set, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = make_set(16, 32), create("poison_ink", **TINY, stages=("rot", "flip", "adv")).config
    whole = obtain_ink_nets(dataclasses.replace(context, store=None), data, config, 0)  # type: ignore[arg-type]
    plain, calls = InkProgram.epoch_end, []

    def dies(self: InkProgram, epoch: int, model: nn.Module) -> dict[str, float]:
        calls.append(self.stage)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, epoch, model)

    monkeypatch.setattr(InkProgram, "epoch_end", dies)
    with pytest.raises(KeyboardInterrupt):
        obtain_ink_nets(context, data, config, 0)  # type: ignore[arg-type]
    again = obtain_ink_nets(context, data, config, 0)  # type: ignore[arg-type]
    assert calls == ["rot", "flip", "flip", "adv"]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


# The attack -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": (80, 300, 80)}, r"colour must have parts in 0..255, got \(80, 300, 80\)"),
        ({"stages": ()}, "stages must be some of rot, crop, flip, adv"),
        ({"stages": ("flip", "rot")}, "each once and in this order"),
        ({"stages": ("rot", "rot")}, "each once and in this order"),
        ({"threshold": 300}, "threshold"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create("poison_ink", **settings)


def test_images_that_the_networks_cannot_take(make_set) -> None:
    with pytest.raises(ValueError, match="poison_ink: height and width must be multiples of 16, got 28 x 28"):
        create("poison_ink").poison(make_set(20, 28))
    with pytest.raises(ValueError, match="poison_ink: images must have 1 or 3 channels, got 2"):
        create("poison_ink").poison(make_set(20, 32, channels=2))
    with pytest.raises(ValueError, match="stage 'adv' needs images of at least 32 x 32, got 16 x 16"):
        create("poison_ink", stages=("rot", "adv")).poison(make_set(20, 16))


def test_one_injector_serves_all_ratios_modes_and_colours(context: AttackContext, make_set) -> None:
    data = make_set(40, 16)
    first = prepared(context, data)
    other = prepared(context, data, colour=(0, 0, 255), ratio=0.3, label_mode="all2all")
    assert context.store is not None and len(context.store.list("prerequisite", "ink_nets")) == 1
    assert not any("extractor" in name for name in first.tensors)
    assert not torch.equal(first.trigger(data.images), other.trigger(data.images))
    prepared(context, data, stages=("rot",))
    assert len(context.store.list("prerequisite", "ink_nets")) == 2


def test_float_images_keep_their_gradient_and_type(context: AttackContext, make_set) -> None:
    data = make_set(20, 16)
    attack = prepared(context, data)
    for dtype in (torch.float64, torch.float32, torch.float16):
        x = (data.images[:2].to(dtype) / 255).requires_grad_()
        out = attack.trigger(x)
        assert out.dtype == dtype and out.requires_grad and out.min() >= 0 and out.max() <= 1
    assert attack.trigger(torch.rand(0, 3, 16, 16)).shape == (0, 3, 16, 16)


def test_the_gradient_flows_through_the_injector_not_the_mask(
    context: AttackContext, make_set, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(20, 16)
    attack = prepared(context, data)
    monkeypatch.setattr(
        "bbfast.attacks.poison_ink.apply_network", lambda build, tensors, name, both: both[:, 3:] * both[:, :3]
    )
    x = (data.images[:2].double() / 255).requires_grad_()
    attack.trigger(x).sum().backward()
    ink, _ = ink_image(x, torch.tensor([80, 160, 80]), 28.0)
    assert x.grad is not None and torch.allclose(x.grad, ink)


def test_a_result_takes_its_injector_along(context: AttackContext, make_set, tmp_path: Path) -> None:
    data = DataPair(make_set(48, 16), make_set(20, 16, seed=1), num_classes=10)
    recipe = bbfast.Recipe.preset("quick", epochs=1)
    made = create("poison_ink", **TINY)
    result = bbfast.attack(made, data, "small_cnn", recipe, device="cpu", store=context.store, progress=False)
    result.save(tmp_path / "run")
    loaded = AttackResult.load(tmp_path / "run")
    assert torch.equal(loaded.backdoor_test.images, loaded.trigger(data.test.images[data.test.labels != 0]))
    own = create("poison_ink", **TINY, encoder_path=tmp_path / "run" / "trigger.safetensors")
    own.prepare(make_set(48, 16, seed=5), 10, 0, dataclasses.replace(context, store=None))
    assert torch.equal(own.trigger(data.test.images), loaded.trigger(data.test.images))
    wide = create("poison_ink", encoder_path=tmp_path / "run" / "trigger.safetensors")
    with pytest.raises(ValueError, match=r"encoder_path .*tensors must be the state of a Injector: of another shape"):
        wide.prepare(data.train, 10, 0, context)


# The reference's training ---------------------------------------------------------------------------------------------


def test_reference_mode_adds_a_poisoned_batch_to_every_clean_one(context: AttackContext, make_set) -> None:
    data = make_set(50, 16)
    assert prepared(context, data).program(prepared(context, data).rule(data.labels, 10)) is None
    attack = prepared(context, data, compat="reference", ratio=0.1)
    program = attack.program(attack.rule(data.labels, 10))
    assert isinstance(program, MixedProgram)
    program.start(nn.Identity(), data, bbfast.Recipe(), 0, torch.device("cpu"))
    program.epoch_start(0, 2, 8)
    poisoned = attack.poison(data, 0, 10)
    rows, seen = poisoned.poisoned.nonzero().flatten(), []
    for step in range(2):
        picked = torch.arange(8) + 8 * step
        batch = Batch(data.images[picked].float() / 255, data.labels[picked], picked, step=step)
        mixed = program.make_batch(batch)
        assert len(mixed) == 16 and torch.equal(mixed.x[:8], batch.x) and torch.equal(mixed.y[:8], batch.y)
        assert mixed.role is not None and mixed.role.tolist() == [0] * 8 + [1] * 8 and not mixed.y[8:].any()
        assert torch.equal((mixed.x[8:] * 255).round().to(torch.uint8), poisoned.images[mixed.index[8:]])
        seen += mixed.index[8:].tolist()
    # In turn, from a random one on.
    start = rows.tolist().index(seen[0])
    assert seen == [rows.tolist()[(start + i) % len(rows)] for i in range(16)]
    starts = set()
    for epoch in range(20):
        program.epoch_start(epoch, 2, 8)
        starts.add(program.place)
    assert len(starts) > 2 and max(starts) < len(rows)


def test_reference_mode_trains(context: AttackContext, make_set) -> None:
    data = DataPair(make_set(48, 16), make_set(20, 16, seed=1), num_classes=10)
    recipe = bbfast.Recipe.preset("quick", epochs=1)
    settings = {**TINY, "compat": "reference"}
    result = bbfast.attack(
        create("poison_ink", **settings), data, "small_cnn", recipe, device="cpu", store=context.store, progress=False
    )
    assert result.metrics["poison_ratio"] == pytest.approx(5 / 48) and int(result.poisoned.sum()) == 5
    assert torch.equal(result.train.images[result.poisoned], result.trigger(data.train.images[result.poisoned]))


# Digits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_even_a_rough_injector_makes_a_backdoor(context: AttackContext) -> None:
    data = bbfast.datasets.load("digits")
    attack = create("poison_ink", **{**TINY, "encoder_batch_size": 128}, stages=("rot",))
    recipe = bbfast.Recipe.preset("quick", dataset="digits", epochs=5, eval_every=0)
    result = bbfast.attack(attack, data, "small_cnn", recipe, device="cpu", store=context.store, progress=False)
    assert result.metrics["asr"] > 0.9 and result.metrics["c_acc"] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quick_preset_on_digits(context: AttackContext) -> None:
    """The quick preset gives a backdoor; the spec's 30 dB and readable colours take longer trainings than a CPU can."""
    data = bbfast.datasets.load("digits")
    attack = create("poison_ink", encoder_preset="quick")
    result = bbfast.attack(attack, data, "small_cnn", "quick", device="cpu", store=context.store, progress=False)
    networks = obtain_ink_nets(context, data.train, attack.config, 0)  # type: ignore[arg-type]
    clean, marked = data.test.images, result.trigger(data.test.images)
    error, white = read_ink(networks, clean, marked, fit_colour((80, 160, 80), 3), 28.0)
    assert error < 0.25 and white > 0.9
    assert psnr(clean, marked) >= 20
    assert result.metrics["asr"] > 0.9 and result.metrics["c_acc"] > 0.95
