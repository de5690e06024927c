"""FullGrad: its parts add up to the logit, and its map is the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast import analysis
from bbfast.analysis._fullgrad import fullgrad, implicit_bias
from bbfast.analysis.tools.grad_cam import GradCAM
from bbfast.attacks import AttackResult
from bbfast.errors import ConfigError


class Small(nn.Module):
    """All that FullGrad takes apart: biases with and without places, BatchNorms, ReLUs in place, a sum, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.plain, self.bare = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.middle, self.flat, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = F.max_pool2d(x + self.relu(self.bare(self.plain(x))), 2)
        out: Tensor = self.head(self.relu(self.flat(self.middle(x.mean((2, 3))))))
        return out


@pytest.fixture(scope="module")
def net() -> Small:
    generator = torch.Generator().manual_seed(0)
    made = Small().double().eval()
    for key, value in made.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(drawn.abs() + 0.2 if key.endswith("running_var") else drawn)
    return made.requires_grad_(False)


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_parts_add_up_to_the_logit(net: Small) -> None:
    maps, total, logit = fullgrad(net, images())
    torch.testing.assert_close(logit, net(images()).amax(1), rtol=0, atol=0)
    torch.testing.assert_close(total, logit, rtol=1e-11, atol=1e-11)
    assert maps.shape == (5, 8, 8) and maps.dtype == torch.float64
    assert not any(layer._forward_hooks for layer in net.modules())
    # Each kind of bias has its part in it: the input's share alone is far off.
    x = images().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).amax(1).sum(), x)
    assert float(((slope * images()).flatten(1).sum(1) - logit).abs().min()) > 1e-3


def test_implicit_biases(net: Small) -> None:
    """What a layer makes of zeros is its bias."""
    for layer, zeros in ((net.norm, (1, 6, 2, 2)), (net.bare, (1, 6, 2, 2)), (net.flat, (1, 8)), (net.head, (1, 8))):
        out = layer(torch.zeros(zeros, dtype=torch.float64))
        bias = implicit_bias(layer, out)
        assert bias is not None
        torch.testing.assert_close(bias.expand_as(out), out)
    assert implicit_bias(net.plain, torch.zeros(1, 6, 2, 2)) is None and implicit_bias(net.relu, torch.zeros(1)) is None


def test_the_map_by_hand(net: Small) -> None:
    """Two layers: the input's part and the convolution's, channel by channel; the head's bias has no place."""
    model = nn.Sequential(net.first, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4).double()).eval()
    x = images()[:2]
    weight = model[3].weight.detach()
    best = model(x).argmax(1)
    slope = F.interpolate(weight[best].view(2, 6, 4, 4), scale_factor=2) / 4
    at_input = F.conv_transpose2d(slope, net.first.weight, padding=1)
    wanted = torch.zeros(2, 8, 8, dtype=torch.float64)
    for part in (x * at_input, slope * net.first.bias[:, None, None]):
        for i in range(2):
            size = part[i].abs()
            for channel in size:
                wanted[i] += (channel - size.min()) / (size.max() - size.min())
    torch.testing.assert_close(fullgrad(model, x)[0], wanted)


def test_the_tool(strong: AttackResult, tmp_path: Path) -> None:
    found = analysis.run(
        "grad_cam", strong, out=tmp_path, device="cpu", figures=False, method="fullgrad", n_stat=40, shown=2
    )
    assert found.numbers.meta["layer"] == "all layers"
    for side in ("clean", "bd"):
        assert 0 <= found.summary[f"completeness_error_{side}"] < 1e-3  # float32
        assert found.numbers.arrays[f"cam_{side}"].max() == 1
    assert found.summary["energy_bd"] > 3 * found.summary["energy_clean"], found.summary
    with pytest.raises(ConfigError, match="fullgrad looks at all layers and takes none"):
        GradCAM(method="fullgrad", layer="stage2")
