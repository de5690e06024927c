"""ANP: the masks against a loop written out, the choice of the threshold, and what is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.data.loader import Batch, derive_seed
from bbfast.data.normalize import normalize
from bbfast.defenses.mitigation import _keep, _masks, anp
from bbfast.defenses.mitigation._masks import accuracies, grid, highest_acceptable, learn_masks, random_batches
from bbfast.defenses.mitigation._norms import Norms
from bbfast.defenses.mitigation.anp import ANPConfig, perturbation_loss
from bbfast.defenses.view import DefenderView
from bbfast.errors import ConfigError, DataRequirementError, DivergedError, UnsupportedModelError
from bbfast.evaluation import evaluate
from bbfast.models import build
from bbfast.training.runtime import forked_rng, seed_generators

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]
CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(1)
    return build("small_cnn", 4, 12).eval()


def learned(model: nn.Module, images: ImageSet, loss: Any = None, blocks: int = 2, **options: Any) -> _masks.Learned:
    norms = Norms.find(model, "anp")
    return learn_masks(
        norms,
        blocks,
        lambda block: random_batches(images, 8, 3, seed=5, block=block, padding=2, flip=True),
        loss if loss is not None else perturbation_loss(norms, 0.4, 1, 0.2, True),
        **{"lr": 0.2, "momentum": 0.9, "seed": 5, "settings": {"eps": 0.4}, "images": images, **options},
    )


def by_hand(model: nn.Module, images: ImageSet, eps: float, steps: int, alpha: float, project: bool) -> Tensor:
    """The same steps with the weights written into a network, layer by layer, and torch's own SGD on the masks."""
    reference = copy.deepcopy(model).train()
    layers = [m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)]
    sizes = [m.num_features for m in layers]
    gammas, betas = ([getattr(m, n).detach().clone() for m in layers] for n in ("weight", "bias"))
    masks = [torch.ones(s, requires_grad=True) for s in sizes]
    optimizer = torch.optim.SGD(masks, lr=0.2, momentum=0.9)

    def loss_of(batch: Batch, delta: list[Tensor], xi: list[Tensor]) -> Tensor:
        out = batch.x
        for i, layer in enumerate(layers):
            for name in ("weight", "bias"):
                if name in layer._parameters:
                    del layer._parameters[name]
            layer.weight = gammas[i] * (masks[i] + delta[i])  # type: ignore[assignment]
            layer.bias = betas[i] * (1 + xi[i])  # type: ignore[assignment]
        return F.cross_entropy(reference(out), batch.y)

    with forked_rng(CPU):
        for block in range(2):
            seed_generators(derive_seed("masks", 5, block), CPU)
            for batch in random_batches(images, 8, 3, seed=5, block=block, padding=2, flip=True):
                noise = torch.empty(2, sum(sizes)).uniform_(-eps, eps)
                delta, xi = ([p.clone() for p in row.split(sizes)] for row in noise)
                for _ in range(steps):
                    leaves = [p.detach().requires_grad_() for p in (*delta, *xi)]
                    half = len(sizes)
                    grads = torch.autograd.grad(loss_of(batch, leaves[:half], leaves[half:]), leaves)
                    moved = [p.detach() + eps / steps * g.sign() for p, g in zip(leaves, grads, strict=True)]
                    if project:
                        moved = [p.clamp(-eps, eps) for p in moved]
                    delta, xi = moved[:half], moved[half:]
                zero = [torch.zeros(s) for s in sizes]
                optimizer.zero_grad()
                (alpha * loss_of(batch, zero, zero)).backward()
                ((1 - alpha) * loss_of(batch, delta, xi)).backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in masks:
                        mask.clamp_(0, 1)
    return torch.cat(masks).detach()


@pytest.mark.parametrize(("steps", "alpha", "project"), [(1, 0.2, True), (2, 0.5, False), (1, 0.0, True)])
def test_masks_are_those_of_a_loop_over_layers(toy_images: MakeImages, steps: int, alpha: float, project: bool) -> None:
    model, images = net(), toy_images(40, 4)
    norms = Norms.find(model, "anp")
    found = learned(model, images, perturbation_loss(norms, 0.4, steps, alpha, project))
    expected = by_hand(model, images, 0.4, steps, alpha, project)
    torch.testing.assert_close(found.masks, expected, rtol=1e-3, atol=1e-4)
    assert (expected < 1).any() and (expected >= 0).all() and (expected <= 1).all()
    assert [row["steps"] for row in found.history] == [3, 6]


def test_the_model_stays_as_it_was(toy_images: MakeImages) -> None:
    """Batch statistics are those of a copy: the running ones of the model do not move."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    learned(model, toy_images(40, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_disturbance_keeps_its_bound(toy_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference trap (a): a start in [-eps, eps] and a step of eps reach 2 eps."""
    images, norms = toy_images(16, 4), Norms.find(net(), "anp")
    (batch,) = random_batches(images, 8, 1, seed=0, block=0)
    seen: list[Tensor] = []
    real = Norms.call

    def spy(self: Norms, x: Tensor, weights: Tensor, biases: Tensor | None = None, model: Any = None) -> Tensor:
        seen.append(weights.detach() / self.weights() - 1)
        return real(self, x, weights, biases, model)

    monkeypatch.setattr(Norms, "call", spy)
    largest = {}
    for project in (True, False):
        torch.manual_seed(0)
        seen.clear()
        perturbation_loss(norms, 0.3, 1, 0.0, project)(norms.model, torch.ones(len(norms)), batch)
        assert len(seen) == 2
        largest[project] = float(seen[1].abs().max())
    assert largest[True] <= 0.3 + 1e-5 and largest[False] > 0.5


def test_without_disturbance_little_is_dropped(digits_attack: AttackResult) -> None:
    """Spec's acceptance: eps = 0 and alpha = 1 learn masks on the clean loss, which a trained model hardly moves."""
    defense = defenses.create("anp", eps=0, alpha=1, iters=100, batch_size=64)
    result = defenses.defend(defense, digits_attack, device="cpu", progress=False)
    assert result.history[-1]["mean_mask"] > 0.9


def test_only_the_masked_weights_are_zeroed(toy_view: MakeView, toy_images: MakeImages) -> None:
    model = net()
    view = toy_view(model, clean=toy_images(40, 4), progress=False)
    result = defenses.create("anp", iters=6, batch_size=8, selection="fixed", threshold=0.99).run(view)
    assert result.model is not None and not result.model.training
    masks = torch.tensor([m for part in result.info["masks"].values() for m in part])
    norms, before = Norms.find(result.model, "anp"), Norms.find(model, "anp")
    assert int((norms.weights() == 0).sum()) == result.info["pruned"] == int((masks <= 0.99).sum()) > 0
    assert torch.equal(norms.weights(), before.weights().masked_fill(masks <= 0.99, 0))
    state = model.state_dict()
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, state[key]) or key.removesuffix(".weight") in norms.names, key


@pytest.mark.parametrize(
    ("accuracy", "chosen"),
    [([0.9, 0.95, 0.81, 0.2], 2), ([0.9, 0.5, 0.85, 0.1], 2), ([0.8, 0.1], None), ([1.0, 1.0], 1)],
)
def test_the_highest_threshold_that_costs_little(accuracy: list[float], chosen: int | None) -> None:
    assert highest_acceptable(accuracy, 0.9, 0.1) == chosen
    assert highest_acceptable(accuracy, 0.0, 0.1) is None


def test_the_sweep_is_that_of_pruned_models(toy_images: MakeImages) -> None:
    model, images = net(), toy_images(30, 4)
    norms = Norms.find(model, "anp")
    torch.manual_seed(0)
    masks = torch.rand(len(norms))
    thresholds = grid(0.05, 0.9)
    assert len(thresholds) == 19 and thresholds[-1] == 0.9 and thresholds[3] == 0.15
    for threshold, found in zip(thresholds, accuracies(norms, masks, thresholds, images), strict=True):
        pruned = copy.deepcopy(model)
        Norms(pruned, norms.names, norms.sizes).zero(masks <= threshold, biases=False)
        with torch.no_grad():
            logits = pruned(normalize(images.images, images.mean, images.std))
        assert found == float((logits.argmax(1) == images.labels).double().mean())


def test_random_batches() -> None:
    images = ImageSet(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2), torch.arange(10))
    a, b = (list(random_batches(images, 64, 2, seed=3, block=4)) for _ in range(2))
    assert all(torch.equal(x.index, y.index) for x, y in zip(a, b, strict=True))
    assert len(a) == 2 and set(a[0].index.tolist()) == set(range(10))  # with replacement: more than there are
    assert torch.equal(a[0].y, a[0].index)
    torch.testing.assert_close(a[0].x[:, 0, 0, 0] * 255, a[0].index.float())
    other = next(random_batches(images, 64, 2, seed=3, block=5))
    assert not torch.equal(other.index, a[0].index)


def test_a_killed_run_goes_on(
    toy_view: MakeView, toy_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anp, "_BLOCK", 2)
    monkeypatch.setattr(_keep, "SAVE_EVERY_SECONDS", 0.0)
    images = toy_images(40, 4)
    defense = defenses.create("anp", iters=7, batch_size=8, selection="fixed")
    whole = defense.run(toy_view(net(), clean=images, progress=False))
    real, calls = _masks.random_batches, []

    def killed(*args: Any, **options: Any) -> Iterator[Batch]:
        calls.append(options["block"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(anp, "random_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    calls.clear()
    monkeypatch.setattr(anp, "random_batches", lambda *a, **o: (calls.append(o["block"]), real(*a, **o))[1])
    again = defense.run(toy_view(net(), clean=images, progress=False, checkpoint=tmp_path))
    assert calls == [2, 3] and again.history == whole.history
    assert [row["steps"] for row in again.history] == [2, 4, 6, 7]
    assert again.info["masks"] == whole.info["masks"]
    calls.clear()
    defenses.create("anp", iters=7, batch_size=8, eps=0.1, selection="fixed").run(
        toy_view(net(), clean=images, progress=False, checkpoint=tmp_path)
    )
    assert calls == [0, 1, 2, 3], "a checkpoint of other settings is not taken"


def test_a_loss_that_is_not_finite_stops(toy_images: MakeImages) -> None:
    steps: list[int] = []

    def broken(net: nn.Module, masks: Tensor, batch: Batch) -> Tensor:
        steps.append(batch.step)
        return masks.sum() * (torch.nan if len(steps) == 5 else 1.0)

    with pytest.raises(DivergedError, match=r"masks: the loss is not finite at step 5 \(eps=0\.4\)"):
        learned(net(), toy_images(20, 4), broken)


def test_an_oracle_is_asked_for_and_marked(toy_attack: MakeAttack) -> None:
    attack = toy_attack()
    honest = defenses.create("anp", iters=2, batch_size=8)
    oracle = defenses.create("anp", iters=2, batch_size=8, selection="oracle_asr")
    with pytest.raises(ConfigError, match=r"oracle_asr.*only the runner has.*oracle=True"):
        defenses.defend(oracle, attack, 0.5, device="cpu", progress=False)
    result = defenses.defend(oracle, attack, 0.5, device="cpu", progress=False, oracle=True)
    assert result.selection["oracle"] is True and result.selection["data"] == "test sets"
    assert oracle.evaluator is None, "the caller's object is not left holding the ground truth"
    found = defenses.defend(honest, attack, 0.5, device="cpu", progress=False)
    assert "oracle" not in found.selection and found.selection["data"] == "held-back part of the clean hold-out"
    rows = list(zip(result.selection["thresholds"], result.selection["c_acc"], result.selection["asr"], strict=True))
    before = evaluate(attack.model, attack.test, attack.backdoor_test, device="cpu")["c_acc"]
    fine = [(asr, t) for t, c_acc, asr in rows if before - c_acc < 0.1 * before]
    assert result.selection["threshold"] == (min(fine)[1] if fine else None)
    if fine:
        assert result.metrics["asr"] == min(fine)[0]


@pytest.mark.parametrize("name", ["preactresnet18", "convnext_tiny"])
def test_models(toy_attack: MakeAttack, name: str) -> None:
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, 32), n=40, n_test=8, size=(3, 32, 32))
    options: dict[str, Any] = {"iters": 1, "batch_size": 4}
    if name == "convnext_tiny":
        with pytest.raises(UnsupportedModelError, match="anp cannot work on convnext_tiny: it has no BatchNorm2d"):
            defenses.defend("anp", attack, 0.5, device="cpu")
        options["norm"] = "layernorm"
    result = defenses.defend(defenses.create("anp", **options), attack, 0.5, device="cpu", progress=False)
    assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()


def test_bad_input(toy_view: MakeView, toy_images: MakeImages) -> None:
    defenses.create("anp").check(toy_view(build("vgg19_bn", 4, 32), clean=toy_images(12, 4, (3, 32, 32))))
    lonely = ImageSet(torch.zeros(5, 3, 12, 12, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2]))
    with pytest.raises(DataRequirementError, match="class 2: 1"):
        defenses.create("anp").check(toy_view(net(), clean=lonely, classes=3))
    defenses.create("anp", selection="fixed").check(toy_view(net(), clean=lonely, classes=3))
    with pytest.raises(ConfigError, match="val_fraction=0 leaves nothing to choose by"):
        defenses.create("anp", val_fraction=0)
    reference = ANPConfig(preset="reference")
    assert (reference.mask_lr, reference.batch_size, reference.project) == (0.01, 256, False)
    assert ANPConfig(preset="paper").selection == "fixed" and ANPConfig().mask_lr == 0.2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_the_digits(digits_attack: AttackResult) -> None:
    """BadNets is removed, the threshold chosen on 14 held-back images."""
    result = defenses.defend("anp", digits_attack, device="cpu", progress=False)
    assert result.metrics["asr"] <= 0.1 and result.selection["samples"] < 20
    assert result.metrics["c_acc"] >= digits_attack.metrics["c_acc"] - 0.12
