"""NC: batched is one class after another, the verdict is as published, the model comes back repaired."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, BatchLoader
from bbfast.data.normalize import denormalize, normalize
from bbfast.defenses.mitigation import _inversion
from bbfast.defenses.mitigation._inversion import InversionSettings, Triggers, auto_chunk, invert
from bbfast.defenses.mitigation._schedule import CostSchedule
from bbfast.defenses.mitigation._stamp import stamp
from bbfast.defenses.mitigation.nc import NCConfig, find_targets, model_statistic, unlearning_set
from bbfast.defenses.view import DefenderView
from bbfast.errors import BBFastError, ConfigError
from bbfast.evaluation import evaluate
from bbfast.models import build
from bbfast.training import Recipe
from bbfast.training.device import choose_numerics

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]

SETTINGS = InversionSettings(
    mask_lr=0.1,
    init_cost=1e-3,
    asr_threshold=0.98,
    patience=5,
    multiplier=2.0,
    early_stop_threshold=0.99,
    early_stop_patience=25,
    inversion_epochs=12,
    norm_p=1,
    augment=False,
    class_chunk=None,
    fallback="last_pass",
    batch_size=16,
    precision="fp32",
    channels_last="auto",
)
QUICK = dataclasses.replace(SETTINGS, asr_threshold=0.5, patience=1, early_stop_patience=2, inversion_epochs=30)


def net(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, classes)
    ).eval()


def same(a: Triggers, b: Triggers, rows: list[int], tol: float = 1e-4) -> None:
    for field in ("mask", "pattern", "norm", "success", "cost"):
        torch.testing.assert_close(getattr(a, field)[rows], getattr(b, field), rtol=tol, atol=tol)
    assert torch.equal(a.passes[rows], b.passes) and torch.equal(a.found[rows], b.found)


class Reference:
    """The bookkeeping of one class, written out as in the paper's code: the oracle of the vectors."""

    def __init__(self, cost: float, threshold: float, patience: int, multiplier: float, stop_after: int) -> None:
        self.cost, self.threshold, self.patience, self.multiplier = cost, threshold, patience, multiplier
        self.stop_after = stop_after
        self.best = self.prev_best = math.inf
        self.up = self.down = self.zero = self.stop = self.passes = 0
        self.up_flag = self.down_flag = self.done = False

    def update(self, acc: float, reg: float) -> bool:
        self.passes += 1
        better = acc >= self.threshold and reg < self.best
        if better:
            self.best = reg
        if self.best < math.inf:
            if self.best >= 0.99 * self.prev_best:
                self.stop += 1
            else:
                self.stop = 0
        self.prev_best = min(self.prev_best, self.best)
        if self.up_flag and self.down_flag and self.stop >= self.stop_after:
            self.done = True
            return better
        if self.cost == 0 and acc >= self.threshold:
            self.zero += 1
            if self.zero >= self.patience:
                self.cost, self.up, self.down, self.up_flag, self.down_flag = 1e-3, 0, 0, False, False
        else:
            self.zero = 0
        if acc >= self.threshold:
            self.up, self.down = self.up + 1, 0
        else:
            self.up, self.down = 0, self.down + 1
        if self.up >= self.patience:
            self.up, self.cost, self.up_flag = 0, self.cost * self.multiplier, True
        elif self.down >= self.patience:
            self.down, self.cost, self.down_flag = 0, self.cost / self.multiplier**1.5, True
        return better


@pytest.mark.parametrize("cost", [1e-3, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_schedule_is_that_of_each_class_alone(cost: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k, passes = 12, 120
    # Sizes fall slowly while success comes and goes in runs, so that every branch is taken.
    acc = (torch.rand(passes // 4, k, generator=g).repeat_interleave(4, 0) > 0.4).double()
    reg = torch.rand(passes, k, generator=g, dtype=torch.float64) * torch.linspace(100, 60, passes)[:, None]
    vector = CostSchedule.start(
        k,
        init_cost=cost,
        asr_threshold=0.98,
        patience=3,
        multiplier=2.0,
        early_stop_threshold=0.99,
        early_stop_patience=6,
    )
    single = [Reference(cost, 0.98, 3, 2.0, 6) for _ in range(k)]
    for t in range(passes):
        before = vector.done.clone()
        better = vector.update(acc[t], reg[t])
        for i, one in enumerate(single):
            if before[i]:
                assert not better[i]
                continue
            assert bool(better[i]) == one.update(float(acc[t, i]), float(reg[t, i]))
            for name in ("cost", "best", "prev_best", "up", "down", "stop", "up_flag", "down_flag", "passes"):
                assert float(getattr(vector, name)[i]) == pytest.approx(float(getattr(one, name))), (t, i, name)
            assert bool(vector.done[i]) == one.done
    assert vector.done.any() and len(set(vector.passes.tolist())) > 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stamp(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=layout)
    mask = torch.rand(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    pattern = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    out = stamp(x, mask, pattern)
    expected = ((1 - mask[:, None]) * x + mask[:, None] * pattern[:, None]).flatten(0, 1)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(lambda m, p: stamp(x, m, p), (mask, pattern))


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 4))
    mine = parameter.detach().clone()
    first, second = torch.zeros(3, 4), torch.zeros(3, 4)
    adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.5, 0.9))
    for step in range(1, 20):
        parameter.grad = torch.randn(3, 4)
        _inversion.adam_step(mine, parameter.grad, first, second, step, 0.1)
        adam.step()
        torch.testing.assert_close(mine, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [SETTINGS, QUICK])
def test_batched_is_one_class_after_another(toy_images: MakeImages, settings: InversionSettings) -> None:
    model, images = net(), toy_images(40, 4)
    together = invert(model, images, torch.arange(4), dataclasses.replace(settings, class_chunk=4), seed=3)
    for k in range(4):
        same(together, invert(model, images, torch.tensor([k]), settings, seed=3), [k])
    chunked = invert(model, images, torch.arange(4), dataclasses.replace(settings, class_chunk=3), seed=3)
    same(together, chunked, [0, 1, 2, 3])
    if settings is QUICK:
        # Classes finish at different passes, and the rest goes on in a smaller batch.
        assert len(set(together.passes.tolist())) > 1 and int(together.passes.min()) < settings.inversion_epochs


def test_one_class_by_autograd_and_torchs_adam(toy_images: MakeImages) -> None:
    """The whole inner loop against the textbook: pixel space, separate parameters, torch.optim."""
    model, images = net(), toy_images(16, 4)
    settings = dataclasses.replace(SETTINGS, inversion_epochs=4)
    mask_raw = torch.ones(1, 12, 12, requires_grad=True)
    pattern_raw = torch.ones(3, 12, 12, requires_grad=True)
    adam = torch.optim.Adam([mask_raw, pattern_raw], lr=0.1, betas=(0.5, 0.9))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.mean, images.std))
    x = images.images.float() / 255
    for _ in range(4):
        m, p = torch.tanh(mask_raw) / (2 + 1e-7) + 0.5, torch.tanh(pattern_raw) / (2 + 1e-7) + 0.5
        logits = model(((1 - m) * x + m * p - mean) / std)
        loss = F.cross_entropy(logits, torch.full((16,), 2)) + 1e-3 * m.abs().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = invert(model, images, torch.tensor([2]), settings, seed=0)
    if not found.found.any():
        m = torch.tanh(mask_raw) / (2 + 1e-7) + 0.5
        torch.testing.assert_close(found.mask[0], m.detach(), rtol=1e-4, atol=1e-5)
    p = torch.tanh(pattern_raw) / (2 + 1e-7) + 0.5
    torch.testing.assert_close(found.pattern[0], p.detach(), rtol=1e-4, atol=1e-5)


def test_the_network_is_left_as_it_was(toy_images: MakeImages) -> None:
    model = net().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    invert(model, toy_images(20, 4), torch.arange(2), dataclasses.replace(SETTINGS, inversion_epochs=2), seed=0)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_fallback_of_classes_without_a_trigger(toy_images: MakeImages) -> None:
    """Reference quirk: it shows the mask of the first pass for ever; ours is the last one."""
    images = toy_images(20, 4)
    never = dataclasses.replace(SETTINGS, asr_threshold=1.0, inversion_epochs=5)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval()
    nn.init.zeros_(flat.get_parameter("1.weight"))
    first = invert(flat, images, torch.tensor([1]), dataclasses.replace(never, fallback="first_pass"), seed=0)
    one = invert(flat, images, torch.tensor([1]), dataclasses.replace(never, inversion_epochs=1), seed=0)
    last = invert(flat, images, torch.tensor([1]), never, seed=0)
    assert not last.found.any()
    assert torch.equal(first.mask, one.mask) and not torch.equal(last.mask, one.mask)


def test_a_loss_that_is_not_finite_stops_the_run(toy_images: MakeImages) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("4.bias")[2] = math.nan
    with pytest.raises(BBFastError, match=r"class \d is not finite in pass 0.*mask_lr=0\.1"):
        invert(model, toy_images(20, 4), torch.arange(4), SETTINGS, seed=0)


def test_a_killed_inversion_goes_on(toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = net(), toy_images(40, 4)
    whole = invert(model, images, torch.arange(4), QUICK, seed=3, deterministic_only=True)
    monkeypatch.setattr(_inversion, "_SAVE_EVERY_SECONDS", -1.0)
    passes: list[int] = []
    original = _inversion._pass

    def killed(*args: Any) -> None:
        if len(passes) == 5:
            raise KeyboardInterrupt
        passes.append(1)
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(_inversion, "_pass", killed)
        with pytest.raises(KeyboardInterrupt):
            invert(model, images, torch.arange(4), QUICK, seed=3, deterministic_only=True, checkpoint=tmp_path / "c")
    counted: list[int] = []

    def count(*args: Any) -> None:
        counted.append(1)
        original(*args)

    monkeypatch.setattr(_inversion, "_pass", count)
    again = invert(model, images, torch.arange(4), QUICK, seed=3, deterministic_only=True, checkpoint=tmp_path / "c")
    assert len(counted) == int(whole.passes.max()) - 5
    same(whole, again, [0, 1, 2, 3], tol=0)
    other = invert(model, images, torch.arange(4), QUICK, seed=4, checkpoint=tmp_path / "c")
    same(invert(model, images, torch.arange(4), QUICK, seed=4), other, [0, 1, 2, 3])


def triggers(norms: list[float], found: list[bool] | None = None, size: int = 4) -> Triggers:
    k = len(norms)
    return Triggers(
        classes=torch.arange(k) + 10,
        mask=torch.rand(k, 1, size, size),
        pattern=torch.rand(k, 3, size, size),
        norm=torch.tensor(norms),
        success=torch.ones(k),
        found=torch.tensor(found or [True] * k),
        passes=torch.ones(k, dtype=torch.int64),
        cost=torch.ones(k, dtype=torch.float64),
    )


def test_verdict() -> None:
    sizes = [50.0, 52.0, 48.0, 3.0, 55.0, 47.0, 51.0, 1.0, 90.0, 49.0]
    anomaly, targets = find_targets(triggers(sizes), 2.0, "average")
    assert targets == [17, 13], "ascending size, and the large outlier is no target"
    median, mad = 49.5, 1.4826 * 2.5
    assert anomaly.tolist() == pytest.approx([abs(s - median) / mad for s in sizes], rel=1e-5)
    lower, _ = find_targets(triggers(sizes), 2.0, "lower")
    assert lower[0] == pytest.approx(1.0 / (1.4826 * 2.0), rel=1e-5)
    assert find_targets(triggers([50.0, 51.0, 49.0, 50.5]), 2.0, "average")[1] == []
    # No spread among the others: any deviation is infinitely unusual, none is not.
    anomaly, targets = find_targets(triggers([5.0, 5.0, 5.0, 1.0]), 2.0, "average")
    assert anomaly.tolist() == [0, 0, 0, math.inf] and targets == [13]
    assert find_targets(triggers([5.0, 5.0, 5.0]), 2.0, "average")[1] == []


@pytest.mark.parametrize("median", ["average", "lower"])
def test_the_models_statistic_decides_as_the_targets_do(median: Any) -> None:
    """The largest index below the median; a large outlier, or a mask that turns nothing, does not count."""
    sizes = [50.0, 52.0, 48.0, 3.0, 55.0, 47.0, 51.0, 1.0, 900.0, 49.0]
    anomaly, targets = find_targets(triggers(sizes), 2.0, median)
    assert targets[0] == 17
    assert model_statistic(triggers(sizes), median) == pytest.approx(float(anomaly[7]))
    assert float(anomaly[8]) > float(anomaly[7])
    found = [size != 1.0 for size in sizes]
    assert model_statistic(triggers(sizes, found), median) == pytest.approx(float(anomaly[3]))
    quiet = [50.0, 51.0, 49.0, 50.5]
    assert find_targets(triggers(quiet), 2.0, median)[1] == []
    assert 0 < model_statistic(triggers(quiet), median) <= 2.0
    assert model_statistic(triggers(quiet, [False] * 4), median) == 0.0


def test_a_mask_that_turns_nothing_is_no_target() -> None:
    sizes = [50.0, 52.0, 48.0, 1.0, 55.0]
    found = [True, True, True, False, True]
    assert find_targets(triggers(sizes, found), 2.0, "average")[1] == []
    assert find_targets(triggers(sizes), 2.0, "average")[1] == [13]


@pytest.mark.parametrize("stamp_when", ["after", "before"])
def test_unlearning_set(toy_images: MakeImages, stamp_when: Any) -> None:
    clean, recovered = toy_images(41, 4, (3, 4, 4)), triggers([1.0, 2.0, 3.0])
    images, program = unlearning_set(clean, recovered, [12, 10], 0.2, stamp_when)
    assert len(images) == 33 + 2 * 8
    assert torch.equal(images.images[:33], clean.images[:33])
    assert torch.equal(images.labels, torch.cat([clean.labels[:33], clean.labels[33:], clean.labels[33:]]))
    index = torch.arange(len(images))
    x = normalize(images.images, images.mean, images.std)
    if program is not None:
        program.start(nn.Identity(), images, Recipe(), 0, torch.device("cpu"))
        x = program.make_batch(Batch(x, images.labels, index)).x
    pixels = denormalize(x, images.mean, images.std)
    torch.testing.assert_close(pixels[:33], clean.images[:33].float() / 255)
    for copy, row in enumerate((2, 0)):
        mask, pattern = recovered.mask[row], recovered.pattern[row]
        exact = (1 - mask) * clean.images[33:].float() / 255 + mask * pattern
        # Not one squeezed through a PNG: exact, or rounded once as every stored image is.
        tol = 1e-5 if stamp_when == "after" else 0.5 / 255 + 1e-5
        assert (pixels[33 + 8 * copy : 41 + 8 * copy] - exact).abs().max() <= tol


def test_the_trigger_is_stamped_where_it_was_found(toy_images: MakeImages) -> None:
    """Cropping a stamped image moves a corner trigger or cuts it off; here it is stamped on the cropped one."""
    clean = toy_images(20, 4, (3, 8, 8))
    recovered = triggers([1.0], size=8)
    recovered.mask.zero_()[:, :, -1, -1] = 1
    recovered.pattern.fill_(1)
    images, program = unlearning_set(clean, recovered, [10], 0.5, "after")
    loader = BatchLoader(images, 20, seed=0, padding=4, shuffle=False)
    (batch,) = loader.epoch(0)
    assert program is not None
    program.start(nn.Identity(), images, Recipe(), 0, torch.device("cpu"))
    stamped = denormalize(program.make_batch(batch).x, images.mean, images.std)
    corner = stamped[:, :, -1, -1]
    torch.testing.assert_close(corner[10:], torch.ones(10, 3))
    assert (corner[:10] - 1).abs().min(dim=1).values.max() > 0.01
    cropped = denormalize(batch.x, images.mean, images.std)
    torch.testing.assert_close(stamped[:, :, :-1], cropped[:, :, :-1])


def test_settings(toy_view: MakeView) -> None:
    assert NCConfig(preset="paper").unlearn_epochs == 1 and NCConfig().unlearn_epochs == 100
    reference = NCConfig(preset="reference")
    assert (reference.augment, reference.median, reference.fallback) == (True, "lower", "first_pass")
    assert (reference.batch_size, reference.t_max, reference.stamp) == (256, 100, "before")
    trojanzoo = NCConfig(preset="trojanzoo")
    assert (trojanzoo.multiplier, trojanzoo.patience, trojanzoo.asr_threshold) == (1.5, 10, 0.99)
    assert NCConfig().for_dataset("tiny_imagenet").unlearn_epochs == 200
    assert NCConfig().for_dataset("digits").unlearn_lr == 0.02 and NCConfig().unlearn_lr == 0.01
    assert NCConfig(preset="paper").for_dataset("tiny_imagenet").unlearn_epochs == 1
    for classes in ((), (0, 0), (4,), (-1,)):
        with pytest.raises(ConfigError, match=r"classes must be different numbers in 0\.\.3"):
            defenses.create("nc", classes=classes).check(toy_view(classes=4))


def test_chunks(toy_images: MakeImages) -> None:
    model, images = net(), toy_images(40, 4)
    numerics = choose_numerics("fp32", "auto", model, torch.device("cpu"))
    assert auto_chunk(model, images, 16, numerics) == 8 and auto_chunk(model, images, 256, numerics) == 3
    # Conv 8x5x5, BatchNorm, ReLU, Flatten and 4 logits, four bytes each.
    assert _inversion._activation_bytes(model, images, numerics) == 4 * (4 * 200 + 4)


def test_not_flagged_means_not_touched(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    result = defenses.defend(
        defenses.create("nc", inversion_epochs=2, anomaly_threshold=1e6), attack, 0.3, device="cpu", progress=False
    )
    assert result.verdict["backdoored"] is False and result.verdict["targets"] == []
    assert set(result.verdict["anomaly"]) == set(result.trigger) == set(result.info["class_stat"]) == {0, 1, 2, 3}
    assert result.info["class_stat"] == {k: pytest.approx(one["norm"]) for k, one in result.trigger.items()}
    assert result.info["statistic"] <= result.info["threshold"] == 1e6
    assert result.model is not None and result.history == []
    state = attack.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in result.model.state_dict().items())
    assert result.metrics["der"] == 0.5 and result.metrics["backdoored"] == 0.0


def test_what_comes_back_and_is_stored_is_the_repaired_model(toy_attack: MakeAttack, tmp_path: Path) -> None:
    """Regression: the reference unlearns the trigger and then stores the weights that it began with."""
    attack = toy_attack()
    # A threshold that any class below the median passes.
    forced = defenses.create("nc", inversion_epochs=2, unlearn_epochs=1, anomaly_threshold=1e-9)
    result = defenses.defend(forced, attack, 0.3, device="cpu", progress=False)
    assert result.verdict["backdoored"] and result.verdict["targets"] and result.model is not None
    came, repaired = dict(attack.model.named_parameters()), dict(result.model.named_parameters())
    assert came.keys() == repaired.keys()
    assert not any(torch.equal(came[name], value) for name, value in repaired.items() if value.dim() > 1)
    stored = defenses.DefenseResult.load(result.save(tmp_path / "nc")).model
    assert stored is not None
    assert all(torch.equal(value, repaired[name]) for name, value in stored.named_parameters())


class Cornered(nn.Module):
    """Class ``c`` is a bright row of blocks ``c``; most of nine white pixels in the corner make it class 2."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.zeros(4, 12, 12)
        for c in range(4):
            weights[c, 2 * c : 2 * c + 2, :6] = 0.5
        weights[2, -3:, -3:], weights[[0, 1, 3], -3:, -3:] = 0.4, -0.4
        self.register_buffer("weights", weights.flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.mean(dim=1).flatten(1), self.weights)  # type: ignore[arg-type]


def test_the_mask_is_the_planted_patch() -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 100, (40, 3, 12, 12), generator=g, dtype=torch.uint8)
    labels = torch.arange(40) % 4
    for i, c in enumerate(labels.tolist()):
        pixels[i, :, 2 * c : 2 * c + 2, :6] = 220
    images = ImageSet(pixels, labels, mean=(0.4,) * 3, std=(0.2,) * 3)
    model = Cornered().eval()
    (batch,) = BatchLoader(images, 40, augment=False, shuffle=False).epoch(0)
    assert torch.equal(model(batch.x).argmax(dim=1), batch.y)
    found = invert(model, images, torch.arange(4), dataclasses.replace(SETTINGS, inversion_epochs=40), seed=0)
    patch = torch.zeros(12, 12, dtype=torch.bool)
    patch[-3:, -3:] = True
    mask = found.mask[2, 0] > 0.5
    assert (mask & patch).sum() / (mask | patch).sum() > 0.5
    sizes = found.mask.flatten(1).sum(dim=1)
    assert sizes.argmin() == 2 and bool((found.success >= 0.98)[2])


@pytest.mark.slow
def test_on_the_digits(digits_attack: AttackResult, tmp_path: Path) -> None:
    """A planted 3x3 patch: the smallest mask is the target's, its anomaly above 2, and the model is repaired."""
    target = digits_attack.target
    result = defenses.defend(defenses.create("nc", inversion_epochs=50), digits_attack, device="cpu", progress=False)
    sizes = {k: one["norm"] for k, one in result.trigger.items()}
    assert min(sizes, key=sizes.__getitem__) == target
    # With ten classes a second one is now and then called as well; the target always comes first.
    assert result.verdict["targets"][0] == target and result.verdict["anomaly"][target] > 2
    assert result.trigger[target]["success"] >= 0.98
    assert result.metrics["asr"] <= 0.10
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.04
    assert result.metrics["target_found"] == 1.0
    # Reference trap (a): what is stored is the repaired model, not the backdoored one.
    again = defenses.DefenseResult.load(result.save(tmp_path / "nc"))
    stored = evaluate(again.model, digits_attack.test, digits_attack.backdoor_test, device="cpu")  # type: ignore[arg-type]
    assert stored["asr"] == result.metrics["asr"] and stored["c_acc"] == result.metrics["c_acc"]
    assert again.verdict == result.verdict
    assert torch.equal(again.trigger[target]["mask"], result.trigger[target]["mask"])


def test_every_model_can_be_inverted(toy_images: MakeImages) -> None:
    """Input gradients are all that is asked of a model: one with LayerNorm and one without any norm too."""
    images = toy_images(6, 3, (3, 32, 32))
    settings = dataclasses.replace(SETTINGS, inversion_epochs=1)
    for model in (build("convnext_tiny", 3, 32), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))):
        found = invert(model, images, torch.arange(3), settings, seed=0)
        assert found.mask.shape == (3, 1, 32, 32) and bool(found.pattern.isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(toy_images: MakeImages) -> None:
    images = toy_images(40, 4)
    settings = dataclasses.replace(SETTINGS, inversion_epochs=3)
    a = invert(net(), images, torch.arange(4), settings, seed=3)
    b = invert(net().cuda(), images.to("cuda"), torch.arange(4, device="cuda"), settings, seed=3)
    same(a, b, [0, 1, 2, 3], tol=1e-3)
