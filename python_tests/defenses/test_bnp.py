"""BNP and MBNS: the divergence, whose moments it compares, and what is pruned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.data.imageset import ImageSet
from bbfast.defenses.mitigation._norms import Norms, input_statistics, running_statistics
from bbfast.defenses.mitigation.bnp import BNPConfig, MBNSConfig, gaussian_kl
from bbfast.defenses.view import DefenderView
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
MakeView = Callable[..., DefenderView]
MakeImages = Callable[..., ImageSet]


def settled(images: ImageSet) -> nn.Module:
    """A small network whose running statistics are those of ``images``."""
    torch.manual_seed(0)
    model = build("small_cnn", 4, 12).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        # The moments behind a BatchNorm in training mode are not those in eval mode; a few rounds settle them.
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (images.mean, images.std))
        x = (images.images / 255 - mean) / std
        model(x)
        for _ in range(10):
            norms = Norms.find(model.eval(), "bnp")
            stats = input_statistics(norms, images)
            parts = zip(norms.layers, norms.split(stats.mean), norms.split(stats.var), strict=True)
            for layer, m, v in parts:
                layer.running_mean.copy_(m)  # type: ignore[union-attr, operator]
                layer.running_var.copy_(v)  # type: ignore[union-attr, operator]
    return model.eval()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9999))
def test_the_divergence_is_torchs(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    m1, m2 = (5 * torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    v1, v2 = (torch.rand(20, generator=g, dtype=torch.float64) * 4 + 1e-3 for _ in range(2))
    found = gaussian_kl(m1, v1, m2, v2)
    torch.testing.assert_close(found, kl_divergence(Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt())))
    assert (found >= -1e-12).all()
    # Reference bug: the logarithm of variances has twice the weight.
    assert not torch.allclose(found, found + 0.5 * torch.log(v2 / v1))
    assert torch.equal(gaussian_kl(m1, v1, m1, v1), torch.zeros(20, dtype=torch.float64))


def test_moments_that_agree_diverge_nowhere(toy_images: MakeImages) -> None:
    images = toy_images(64, 4)
    norms = Norms.find(settled(images), "bnp")
    clean = input_statistics(norms, images)
    mean, var, eps = running_statistics(norms, "bnp")
    divergence = gaussian_kl(clean.mean, clean.var + eps, mean, var + eps)
    assert divergence.abs().max() < 1e-6


def test_the_channel_whose_moments_moved_is_pruned(toy_view: MakeView, toy_images: MakeImages) -> None:
    images = toy_images(64, 4)
    model = settled(images)
    norms = Norms.find(model, "bnp")
    last = norms.layers[-1]
    with torch.no_grad():
        last.running_mean[7] += 20  # type: ignore[index, operator]
    result = defenses.create("bnp").run(toy_view(model, clean=images))
    assert result.info["pruned_channels"][norms.names[-1]] == [7]
    kept = Norms.find(result.model, "bnp")  # type: ignore[arg-type]
    pruned = torch.zeros(len(kept), dtype=torch.bool)
    for name, channels in result.info["pruned_channels"].items():
        start = sum(kept.sizes[: kept.names.index(name)])
        pruned[[start + c for c in channels]] = True
    assert torch.equal(kept.weights() == 0, pruned) and torch.equal(kept.biases() == 0, pruned)
    assert result.info["samples"] == 64 and result.info["pruned"] == int(pruned.sum())
    again = defenses.create("bnp", prune_bias=False).run(toy_view(model, clean=images))
    assert torch.equal(Norms.find(again.model, "bnp").biases(), norms.biases())  # type: ignore[arg-type]


def test_a_constant_channel_is_finite(toy_view: MakeView, toy_images: MakeImages) -> None:
    images = toy_images(32, 4)
    model = settled(images)
    with torch.no_grad():
        model.conv1.weight[3] = 0  # type: ignore[union-attr, index, operator]
        model.layer1[0].bn1.running_var[3] = 0  # type: ignore[union-attr, index, operator]
        model.layer1[0].bn1.running_mean[3] = 0  # type: ignore[union-attr, index, operator]
    result = defenses.create("bnp").run(toy_view(model, clean=images))
    assert result.info["not_finite"] == 0 and 3 not in result.info["pruned_channels"].get("layer1.0.bn1", [])


def test_moments_are_those_of_clean_images(digits_attack: AttackResult) -> None:
    """Reference bug: a second pass with poisoned images overwrites the clean moments before they are compared."""
    model = digits_attack.model
    norms = Norms.find(model, "bnp")
    mean, var, eps = running_statistics(norms, "bnp")
    poisoned, clean = digits_attack.train, digits_attack.clean_train
    assert poisoned is not None
    rows = [input_statistics(norms, images) for images in (clean, poisoned)]
    divergence = [gaussian_kl(s.mean, s.var + eps, mean, var + eps) for s in rows]
    flagged = [norms.outliers(d, 1.5, "high") for d in divergence]
    assert not torch.equal(flagged[0], flagged[1])
    # The mixture's moments are the running ones but for momentum; the clean ones lie farther away.
    assert divergence[0].mean() > 1.3 * divergence[1].mean()
    result = defenses.defend(defenses.create("bnp", u=1.5), digits_attack, 1.0, device="cpu", progress=False)
    expected = norms.listed(flagged[0])
    assert result.info["pruned_channels"] == expected and result.info["data_used"] == ["clean", "model"]


def test_mbns_is_bnp_on_one_batch(digits_attack: AttackResult) -> None:
    def run(name: str, **config: object) -> defenses.DefenseResult:
        return defenses.defend(defenses.create(name, u=1.5, **config), digits_attack, 0.5, device="cpu", progress=False)

    mbns, bnp, whole = run("mbns"), run("bnp", num_samples=256), run("bnp")
    assert mbns.info["pruned_channels"] == bnp.info["pruned_channels"] and mbns.info["pruned"] > 0
    assert mbns.info["samples"] == 256 and whole.info["samples"] == len(digits_attack.clean_train) // 2
    assert mbns.config["defense"] == "mbns"


def test_it_does_not_depend_on_the_order(toy_view: MakeView, toy_images: MakeImages) -> None:
    images = toy_images(64, 4)
    model = settled(toy_images(64, 4, seed=5))
    runs = [
        defenses.create("bnp", u=1.0).run(toy_view(model, clean=images.subset(order)))
        for order in (torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(1)))
    ]
    assert runs[0].info == runs[1].info and runs[0].info["pruned"] > 0


@pytest.mark.parametrize("method", ["bnp", "mbns"])
@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_16"])
def test_models_without_batch_norm_are_refused(toy_attack: MakeAttack, method: str, name: str) -> None:
    attack = toy_attack(model=build(name, 4, 32), n=40, n_test=8, size=(3, 32, 32))
    with pytest.raises(UnsupportedModelError, match=f"{method} cannot work on {name}"):
        defenses.defend(method, attack, 0.5, device="cpu")


@pytest.mark.parametrize("name", ["preactresnet18"])
def test_models_with_batch_norm(toy_attack: MakeAttack, name: str) -> None:
    torch.manual_seed(0)
    attack = toy_attack(model=build(name, 4, 32), n=40, n_test=8, size=(3, 32, 32))
    result = defenses.defend("bnp", attack, 0.5, device="cpu", progress=False)
    assert result.model is not None and result.model.state_dict().keys() == attack.model.state_dict().keys()


def test_settings() -> None:
    assert BNPConfig().num_samples is None and MBNSConfig().num_samples == 256
    assert BNPConfig(preset="reference").num_samples == 256
    official = BNPConfig(preset="official")
    assert (official.num_samples, official.prune_bias) == (500, False)
    assert BNPConfig().for_dataset("tiny_imagenet").u == MBNSConfig().for_dataset("tiny_imagenet").u == 4.0
