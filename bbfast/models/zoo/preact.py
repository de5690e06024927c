"""Residual networks with pre-activation: the benchmark's PreAct-ResNet18 and a small one for small machines."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.models._registry import register
from bbfast.models._spec import ModelSpec

__all__ = ["PreActBlock", "PreActResNet"]

_PAPER = "K. He, X. Zhang, S. Ren, J. Sun, Identity Mappings in Deep Residual Networks, ECCV 2016, arXiv 1603.05027"
_ROLES = {"stage1": "layer1", "stage2": "layer2", "stage3": "layer3", "stage4": "layer4", "classifier": "linear"}


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, and a shortcut around it.

    Where the width or the resolution changes, the shortcut is a bare 1x1 convolution of the *activated* input (no BN),
    registered after ``conv2``; elsewhere it is the block's input itself.

    Args:
        in_planes: Channels of the input.
        planes: Channels of the output.
        stride: Of the first convolution and the shortcut.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_planes, h, w]`` to ``[N, planes, h/stride, w/stride]``."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + shortcut


class PreActResNet(nn.Module):
    """A 3x3 stem, four stages of :class:`PreActBlock`, average pooling and one linear layer.

    No BN and ReLU stand between the last block and the pooling (attacks.md 0.1), unlike in the paper.

    Args:
        blocks: Number of blocks of each stage.
        widths: Channels of each stage; the stem has those of the first.
        strides: Stride of the stem and of each stage.
        num_classes: Number of logits.
        in_channels: Channels of the images.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], strides: Sequence[int], num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=strides[0], padding=1, bias=False)
        planes = [widths[0], *widths]
        stages = [
            nn.Sequential(
                *(
                    PreActBlock(planes[i] if j == 0 else planes[i + 1], planes[i + 1], strides[i + 1] if j == 0 else 1)
                    for j in range(blocks[i])
                )
            )
            for i in range(4)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images ``[N, C, H, W]`` to logits ``[N, K]``."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


@register(
    "preactresnet18",
    roles={**_ROLES, "last_conv": "layer4.1.conv2"},
    title="PreAct-ResNet18",
    year=2016,
    paper=_PAPER,
    summary="The benchmark's main model: four stages of 64 to 512 channels, 11.2 M parameters.",
)
def preactresnet18(spec: ModelSpec) -> PreActResNet:
    """Strides 1, 2, 2, 2 after a stem of stride 1; 16 BN layers; ``linear`` has 512 inputs."""
    return PreActResNet((2, 2, 2, 2), (64, 128, 256, 512), (1, 1, 2, 2, 2), spec.num_classes, spec.in_channels)


@register(
    "small_cnn",
    roles={**_ROLES, "last_conv": "layer4.0.conv2"},
    title="Small PreAct CNN",
    year=2016,
    paper=_PAPER,
    summary="For small machines: one pre-activation block a stage, 16 to 64 channels, 0.1 M parameters.",
)
def small_cnn(spec: ModelSpec) -> PreActResNet:
    """Blocks as in PreAct-ResNet18, 8 BN layers; a stem of stride 2 makes it cheap, 32 pixels end as a map of 4x4."""
    return PreActResNet((1, 1, 1, 1), (16, 24, 40, 64), (2, 1, 2, 2, 1), spec.num_classes, spec.in_channels)
