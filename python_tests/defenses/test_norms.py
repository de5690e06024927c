"""The flat vector of norm channels: masks by functional_call, outliers by layer, one pass of statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.data.normalize import normalize
from bbfast.defenses.mitigation._norms import Norms, channels_first, input_statistics, spatial_maxima
from bbfast.errors import DataRequirementError, UnsupportedModelError
from bbfast.models import build

MakeImages = Callable[..., ImageSet]
BN, LN = ("preactresnet18", "vgg19_bn", "small_cnn"), ("convnext_tiny", "vit_b_16")


def stirred(name: str) -> nn.Module:
    """A model whose norm layers are not all alike."""
    torch.manual_seed(0)
    model = build(name, 4, 32).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(("name", "layers"), [("preactresnet18", 16), ("vgg19_bn", 16), ("small_cnn", 8)])
def test_every_norm_layer_is_in_the_vector(name: str, layers: int) -> None:
    model = stirred(name)
    norms = Norms.find(model, "anp")
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms.sizes) == layers and list(norms.names) == [n for n, _ in found]
    assert torch.equal(norms.weights(), torch.cat([m.weight for _, m in found]))
    assert torch.equal(norms.biases(), torch.cat([m.bias for _, m in found]))
    assert len(norms) == sum(m.num_features for _, m in found) == sum(norms.sizes)


@pytest.mark.parametrize("name", ["small_cnn", "convnext_tiny"])
def test_a_swapped_call_is_that_of_a_changed_model(name: str) -> None:
    """functional_call with other weights gives the changed model's logits and leaves the model alone."""
    model = stirred(name)
    before = copy.deepcopy(model.state_dict())
    norms = Norms.find(model, "anp", "batchnorm" if name == "small_cnn" else "layernorm")
    x = torch.randn(3, 3, 32, 32)
    scale, shift = torch.rand(len(norms)) + 0.5, torch.randn(len(norms)) * 0.1
    out = norms.call(x, norms.weights() * scale, norms.biases() + shift)
    changed = copy.deepcopy(model)
    parts = zip(norms.names, norms.split(scale), norms.split(shift), strict=True)
    with torch.no_grad():
        for layer, a, b in parts:
            changed.get_parameter(f"{layer}.weight").mul_(a)
            changed.get_parameter(f"{layer}.bias").add_(b)
        torch.testing.assert_close(out, changed(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_reach_the_flat_vector() -> None:
    model = stirred("small_cnn").requires_grad_(False)
    norms = Norms.find(model, "anp")
    mask = torch.ones(len(norms), requires_grad=True)
    norms.call(torch.randn(2, 3, 32, 32), norms.weights() * mask).sum().backward()
    assert mask.grad is not None and (mask.grad != 0).float().mean() > 0.9
    assert all(p.grad is None for p in model.parameters())


def test_zeroing_and_listing() -> None:
    model = stirred("small_cnn")
    norms = Norms.find(model, "clp")
    weights, biases = norms.weights(), norms.biases()
    pruned = torch.zeros(len(norms), dtype=torch.bool)
    pruned[[0, 5, norms.sizes[0] + 2]] = True
    norms.zero(pruned, biases=False)
    assert torch.equal(norms.weights(), weights.masked_fill(pruned, 0)) and torch.equal(norms.biases(), biases)
    norms.zero(pruned, biases=True)
    assert torch.equal(norms.biases(), biases.masked_fill(pruned, 0))
    assert norms.listed(pruned) == {norms.names[0]: [0, 5], norms.names[1]: [2]}


@pytest.mark.parametrize("side", ["high", "low"])
def test_outliers_are_those_of_each_layer_alone(side: str) -> None:
    norms = Norms.find(stirred("small_cnn"), "clp")
    torch.manual_seed(1)
    score = torch.randn(len(norms)) ** 3
    score[3] = torch.nan
    expected = []
    for part in norms.split(score):
        kept = part[part.isfinite()].double()
        bound = 1.2 * kept.std()
        expected.append(part > kept.mean() + bound if side == "high" else part < kept.mean() - bound)
    found = norms.outliers(score, 1.2, side)  # type: ignore[arg-type]
    assert torch.equal(found, torch.cat(expected)) and bool(found.any()) and not found[3]
    assert not norms.outliers(torch.ones(len(norms)), 0.0, side).any()  # type: ignore[arg-type]
    assert not norms.outliers(torch.ones(len(norms)), torch.inf, side).any()  # type: ignore[arg-type]


class Tokens(nn.Module):
    """Image patches as tokens ``[N, T, C]`` through two LayerNorms, the second on the mean token ``[N, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 8, stride=8)
        self.first, self.last, self.head = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(self.first(self.embed(x).flatten(2).mT).mean(1)))
        return out


def inputs_of(norms: Norms, images: ImageSet) -> list[Tensor]:
    """What each layer receives, kept whole, channels last of all: ``[..., C]``."""
    kept: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        if isinstance(layer, nn.BatchNorm2d) or type(layer).__name__ == "LayerNorm2d":
            x = x.permute(0, 2, 3, 1)
        kept.append(x.double())

    hooks = [layer.register_forward_pre_hook(keep) for layer in norms.layers]
    norms.model(normalize(images.images, images.mean, images.std))
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("name", ["small_cnn", "convnext_tiny", "tokens"])
@torch.no_grad()
def test_one_pass_gives_the_statistics_of_all_inputs(toy_images: MakeImages, name: str) -> None:
    """Against activations kept whole; LayerNorm's channels are not mixed with positions (reference bug)."""
    images = toy_images(5, 4, (3, 32, 32))
    model = Tokens() if name == "tokens" else stirred(name)
    norms = Norms.find(model, "ep", "batchnorm" if name == "small_cnn" else "layernorm")
    stats, maxima = input_statistics(norms, images, batch_size=2), spatial_maxima(norms, images, batch_size=2)
    whole = inputs_of(norms, images)
    flat = [x.flatten(0, -2) for x in whole]
    tight = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(stats.mean, torch.cat([x.mean(0) for x in flat]), **tight)
    torch.testing.assert_close(stats.var, torch.cat([x.var(0) for x in flat]), **tight)
    torch.testing.assert_close(stats.max, torch.cat([x.amax(0) for x in flat]), **tight)
    for found, x in zip(maxima, whole, strict=True):
        expected = x.amax(tuple(range(1, x.dim() - 1))) if x.dim() > 2 else x
        torch.testing.assert_close(found.double(), expected.T, **tight)
    assert not any(layer._forward_pre_hooks for layer in norms.layers)


def test_a_plain_layer_norm_reads_maps_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert channels_first(nn.LayerNorm(5), x).shape == (2, 5, 3, 4)
    assert channels_first(nn.BatchNorm2d(3), x) is x


def test_refusals(toy_images: MakeImages) -> None:
    for name in LN:
        with pytest.raises(UnsupportedModelError, match=f"anp cannot work on {name}: it has no BatchNorm2d layer"):
            Norms.find(build(name, 4, 32), "anp")
    with pytest.raises(UnsupportedModelError, match=r"no LayerNorm layer with weights.*leave norm='batchnorm'"):
        Norms.find(build("small_cnn", 4, 32), "ep", "layernorm")
    with pytest.raises(UnsupportedModelError, match="no BatchNorm2d"):
        Norms.find(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "ep")
    norms = Norms.find(build("small_cnn", 4, 32), "bnp")
    with pytest.raises(DataRequirementError, match="at least one image"):
        input_statistics(norms, toy_images(4, 4, (3, 32, 32)).subset(torch.arange(0)))
