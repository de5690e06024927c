"""LF: golden images, the filter, the search for the pattern, pattern files in both scales, the random fallback."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bbfast
from bbfast import attacks
from bbfast.attacks import AttackContext, AttackResult
from bbfast.attacks._deepfool import targeted_deepfool
from bbfast.attacks.lf import load_pattern, smooth, smoothing_taps
from bbfast.attacks.prerequisites import default_context
from bbfast.data.imageset import ImageSet
from bbfast.errors import BBFastError, ConfigError
from bbfast.store import Store

Golden = Callable[[str], dict[str, np.ndarray]]
MakeSet = Callable[..., ImageSet]
SMALL = {"images": 20, "passes": 2}


def chw(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, -3).contiguous()


def pattern_file(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "pattern.npy", array)
    return folder / "pattern.npy"


@pytest.fixture
def context(tmp_path: Path, make_set: MakeSet) -> AttackContext:
    """A surrogate that is a fixed linear map: at once there, and every class can be reached."""

    def linear(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10, bias=False))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(10, 768, generator=generator) * 0.1)
        return model

    plain = default_context(make_set(64, 16), 10, 0)
    recipe = bbfast.Recipe(epochs=0)
    return dataclasses.replace(plain, fresh_model=linear, recipe=recipe, store=Store(tmp_path), progress=False)


@pytest.mark.parametrize("name", ["ref0", "synth"])
@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
def test_golden_images(golden: Golden, tmp_path: Path, name: str, prefix: str) -> None:
    """compat='reference', bit for bit; paper mode rounds what the reference cuts off."""
    stored = golden("lf")
    images, expected = chw(stored[f"{prefix}images"]), chw(stored[f"{prefix}out_{name}"])
    path = pattern_file(tmp_path, stored[f"pattern_{name}"])
    data = ImageSet(images, torch.zeros(len(images), dtype=torch.int64))
    ours = {}
    for compat in ("paper", "reference"):
        attack = attacks.create("lf", trigger_path=path, compat=compat)
        attack.prepare(data, 10)
        ours[compat] = attack.trigger(images)
    assert torch.equal(ours["reference"], expected)
    exact = (images.double() + chw(stored[f"pattern_{name}"])).clamp(0, 255)
    assert torch.equal(ours["paper"], exact.round().to(torch.uint8))


def test_the_two_scales_of_pattern_files(golden: Golden, tmp_path: Path) -> None:
    """A 0..1 file is a silent no-op in the reference; here it is scaled, unless its numbers are wanted as they are."""
    stored = golden("lf")
    images, path = chw(stored["images"]), pattern_file(tmp_path, stored["pattern_ref1"])
    data = ImageSet(images, torch.zeros(len(images), dtype=torch.int64))
    attack = attacks.create("lf", trigger_path=path)
    with pytest.warns(UserWarning, match=r"values up to 0\.2: taken as 0\.\.1 and multiplied by 255"):
        attack.prepare(data, 10)
    assert float(attack.tensors["pattern"].max()) == pytest.approx(51, abs=1e-3)
    bug = attacks.create("lf", trigger_path=path, trigger_units="levels", compat="reference")
    bug.prepare(data, 10)
    assert torch.equal(bug.trigger(images), chw(stored["out_ref1"])) and torch.equal(bug.trigger(images), images)


def test_shapes_of_pattern_files(tmp_path: Path) -> None:
    flat = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert torch.equal(load_pattern(pattern_file(tmp_path, flat), (3, 8, 8))[2], torch.from_numpy(flat).double())
    colour = np.random.RandomState(0).rand(2, 8, 6, 3) * 9 + 1
    read = load_pattern(pattern_file(tmp_path, colour), (3, 8, 6))
    assert torch.equal(read, torch.from_numpy(colour[0]).permute(2, 0, 1))
    for bad in (colour, colour[0, 0], colour[None], colour[:0], np.float32(3)):
        with pytest.raises(ValueError, match=r"must be \[8, 8\], \[8, 8, 3\] or \[N, 8, 8, 3\], got \["):
            load_pattern(pattern_file(tmp_path, np.asarray(bad)), (3, 8, 8))
    for bad in (np.full((8, 8), np.nan), np.full((8, 8), "a")):
        with pytest.raises(ValueError, match="must hold finite numbers"):
            load_pattern(pattern_file(tmp_path, bad), (3, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"missing\.npy does not exist"):
        load_pattern(tmp_path / "missing.npy", (3, 8, 8))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text\.npy cannot be read as an \.npy array"):
        load_pattern(tmp_path / "text.npy", (3, 8, 8))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        load_pattern(tmp_path / "pickle.npy", (3, 8, 8))


def test_the_filter_is_the_published_one() -> None:
    """spec/attacks section 30; the matrix form is the padded convolution."""
    first = [
        0.00363,
        0.00536,
        0.00769,
        0.01073,
        0.01456,
        0.01922,
        0.02468,
        0.03082,
        0.03744,
        0.04423,
        0.05082,
        0.05679,
        0.06172,
    ]
    taps = smoothing_taps()
    assert len(taps) == 30 and torch.allclose(taps[:13], torch.tensor(first).double(), atol=6e-6)
    assert torch.equal(taps, taps.flip(0)) or torch.allclose(taps, taps.flip(0))
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x, (14, 15, 14, 15))[:, None]
    kernel = taps.float()
    expected = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 30, 1)), kernel.view(1, 1, 1, 30))[:, 0]
    torch.testing.assert_close(smooth(x), expected, atol=1e-6, rtol=1e-5)


def low_share(pattern: Tensor) -> float:
    """Share of the spectral energy, mean removed, in the lowest quarter of the frequencies."""
    centred = pattern.double() - pattern.double().mean(dim=(1, 2), keepdim=True)
    energy = torch.fft.fft2(centred).abs().square()
    low = [torch.fft.fftfreq(size).abs() <= 0.125 for size in pattern.shape[1:]]
    return float(energy[:, low[0][:, None] & low[1]].sum() / energy.sum())


@pytest.mark.parametrize("size", [32, 64])
def test_random_lowpass(make_set: MakeSet, size: int) -> None:
    """spec/attacks section 5, 'Acceptance': smooth, from 0 to 51, about 22 dB."""
    data = make_set(16, size)
    attack = attacks.create("lf", trigger="random_lowpass")
    attack.prepare(data, 10, seed=1)
    pattern = attack.tensors["pattern"]
    assert low_share(pattern) > 0.95 and float(pattern.min()) == 0 and float(pattern.max()) == 51
    difference = attack.trigger(data.images).double() - data.images.double()
    assert 18 < float(10 * torch.log10(255**2 / difference.square().mean())) < 25
    attack.prepare(data, 10, seed=2)
    assert not torch.equal(attack.tensors["pattern"], pattern)
    whole = attacks.create("lf", trigger="random_lowpass", compat="reference")
    whole.prepare(data, 10, seed=1)
    assert torch.equal(whole.tensors["pattern"], pattern.floor())


class TestDeepFool:
    def test_a_linear_model_is_crossed_in_one_step(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
        with torch.no_grad():
            net[1].weight.copy_(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(1))
        change, steps = targeted_deepfool(net, x, 2, 50)
        start = net(x).argmax(1)
        assert torch.equal(net(x + change).argmax(1), torch.full((20,), 2))
        assert torch.equal(steps == 0, start == 2) and torch.equal(
            change[start == 2], torch.zeros_like(change[start == 2])
        )
        one = (steps == 1).nonzero()[0]
        logits, weight = net(x[one])[0], net[1].weight
        direction = weight[2] - weight[start[one]]
        gap = logits[start[one]] - logits[2]
        expected = 1.02 * gap / direction.square().sum() * direction
        torch.testing.assert_close(change[one].flatten(), expected.flatten().detach(), atol=1e-5, rtol=1e-4)

    def test_each_image_for_itself(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
        x = torch.rand(8, 3, 6, 6)
        together, steps = targeted_deepfool(net, x, 1, 30, extra_step=1e-4)
        alone = [targeted_deepfool(net, x[i : i + 1], 1, 30, extra_step=1e-4) for i in range(8)]
        torch.testing.assert_close(together, torch.cat([c for c, _ in alone]), atol=1e-5, rtol=1e-4)
        assert torch.equal(steps, torch.cat([s for _, s in alone]))
        assert targeted_deepfool(net, x[:0], 1, 30)[0].shape == (0, 3, 6, 6)
        only_red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        masked, _ = targeted_deepfool(net, x, 1, 30, mask=only_red)
        assert float(masked[:, 1:].abs().max()) == 0 and float(masked[:, 0].abs().max()) > 0

    def test_what_cannot_be_reached_ends_and_is_finite(self) -> None:
        def constant(x: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * x.flatten(1)[:, :1]

        change, steps = targeted_deepfool(constant, torch.rand(2, 1, 2, 2), 1, 7)
        assert steps.tolist() == [7, 7] and float(change.abs().max()) == 0


def test_the_search_makes_a_smooth_pattern_and_keeps_it(context: AttackContext, make_set: MakeSet) -> None:
    data = make_set(64, 16)
    attack = attacks.create("lf", **SMALL)
    attack.prepare(data, 10, 0, context)
    pattern = attack.tensors["pattern"]
    assert float(pattern.min()) == 0 and float(pattern.max()) == 51 and low_share(pattern) > 0.9
    assert context.store is not None
    assert len(context.store.list("prerequisite", "lf_pattern")) == 1
    other = attacks.create("lf", **SMALL, ratio=0.3, label_mode="all2all")
    other.prepare(data, 10, 0, context)
    assert torch.equal(other.tensors["pattern"], pattern) and len(context.store.list()) == 2
    attacks.create("lf", **SMALL, target=1).prepare(data, 10, 0, context)
    assert len(context.store.list("prerequisite", "lf_pattern")) == 2


def test_the_reference_crafts_on_unnormalised_images(context: AttackContext, make_set: MakeSet) -> None:
    data = dataclasses.replace(make_set(64, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
    patterns = []
    for compat in ("paper", "reference"):
        attack = attacks.create("lf", **SMALL, compat=compat)
        attack.prepare(data, 10, 0, context)
        patterns.append(attack.tensors["pattern"])
    assert not torch.equal(patterns[0].floor(), patterns[1]) and torch.equal(patterns[1], patterns[1].floor())


def test_a_surrogate_that_cannot_be_moved_is_named(context: AttackContext, make_set: MakeSet) -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.arange(10.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias + 0 * x.flatten(1).sum(1, keepdim=True)

    own = dataclasses.replace(context, fresh_model=lambda seed: Blind())
    with pytest.raises(BBFastError, match=r"DeepFool moved none of 20 images to class 0.*random_lowpass"):
        attacks.create("lf", images=20, passes=1, deepfool_steps=3).prepare(make_set(64, 16), 10, 0, own)


def test_gradients_reach_the_image(make_set: MakeSet) -> None:
    attack = attacks.create("lf", trigger="random_lowpass")
    attack.prepare(make_set(10), 10)
    x = (torch.rand(2, 3, 32, 32) * 0.5).requires_grad_()
    attack.trigger(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("setting", "value"), [("strength", 0), ("strength", 256), ("images", 0), ("delta", 1), ("trigger", "noise")]
)
def test_bad_settings(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"lf: {setting}: .*got {value!r}"):
        attacks.create("lf", **{setting: value})


def test_works_on_digits(tmp_path: Path) -> None:
    """The fallback trigger: no search, so the test is quick; the optimised one is measured in docs/results.md."""
    data = bbfast.datasets.load("digits")
    recipe = bbfast.Recipe.preset("quick", dataset="digits", model="small_cnn", epochs=8)
    attack = attacks.create("lf", trigger="random_lowpass")
    result = attacks.attack(attack, data, "small_cnn", recipe, device="cpu", store=False, progress=False)
    assert result.metrics["c_acc"] >= 0.9 and result.metrics["asr"] >= 0.8
    result.save(tmp_path / "run")
    back = AttackResult.load(tmp_path / "run")
    assert torch.equal(back.trigger(data.test.images[:3]), result.trigger(data.test.images[:3]))
