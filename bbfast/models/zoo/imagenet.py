"""torchvision's networks with its layer names, for images of any size and channels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from torch import nn

from bbfast.models._registry import register
from bbfast.models._spec import ModelSpec
from bbfast.models._weights import load_imagenet

__all__: list[str] = []

_WEIGHTS = "IMAGENET1K_V1"


def _stages(*names: str) -> dict[str, str]:
    return {f"stage{number}": name for number, name in enumerate(names, start=1)}


def _make(name: str, spec: ModelSpec, *, zero_head: str | None = None) -> nn.Module:
    """torchvision's network ``name``; ``zero_head`` names a last layer that torchvision starts at zero and is drawn."""
    make = getattr(importlib.import_module("torchvision.models"), name)
    model: nn.Module = make(weights=None, num_classes=spec.num_classes)
    if zero_head is not None:
        head = model.get_submodule(zero_head)
        head.reset_parameters()  # type: ignore[operator]
    for module in model.modules():
        # An activation that overwrites its input would change what a hook on the layer before it has kept.
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    if spec.in_channels != 3:
        _replace_stem(model, spec.in_channels)
    if spec.pretrained:
        load_imagenet(model, make, name, _WEIGHTS)
    return model


def _replace_stem(model: nn.Module, in_channels: int) -> None:
    """Put a fresh first convolution for ``in_channels`` in the place of the one for three."""
    name, stem = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    fresh = nn.Conv2d(
        in_channels,
        stem.out_channels,
        stem.kernel_size,  # type: ignore[arg-type]
        stride=stem.stride,  # type: ignore[arg-type]
        padding=stem.padding,  # type: ignore[arg-type]
        bias=stem.bias is not None,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, fresh)


def _vgg_roles(pools: tuple[int, ...], last_conv: int) -> Mapping[str, str]:
    names = _stages(*(f"features.{index}" for index in pools))
    return {**names, "last_conv": f"features.{last_conv}", "classifier": "classifier.6"}


_VGG = "K. Simonyan, A. Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv 1409.1556"


@register(
    "vgg19_bn",
    roles=_vgg_roles((6, 13, 26, 39, 52), 49),
    title="VGG19 with BatchNorm",
    year=2015,
    paper=_VGG,
    summary="16 convolutions with BN, pooling to 7x7, three linear layers; 139.6 M parameters.",
    min_size=32,
    weights=_WEIGHTS,
)
def vgg19_bn(spec: ModelSpec) -> nn.Module:
    """Stages are the outputs of the five max-poolings."""
    return _make("vgg19_bn", spec)


@register(
    "vgg19",
    roles=_vgg_roles((4, 9, 18, 27, 36), 34),
    title="VGG19",
    year=2015,
    paper=_VGG,
    summary="VGG19-BN without BN: no normalisation layer at all.",
    min_size=32,
    weights=_WEIGHTS,
)
def vgg19(spec: ModelSpec) -> nn.Module:
    """Stages are the outputs of the five max-poolings; there are no ``norms``."""
    return _make("vgg19", spec)


@register(
    "resnet18",
    roles={**_stages("layer1", "layer2", "layer3", "layer4"), "last_conv": "layer4.1.conv2", "classifier": "fc"},
    title="ResNet18",
    year=2016,
    paper="K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning, CVPR 2016, arXiv 1512.03385",
    summary="torchvision's ResNet18 with its 7x7 stem and max-pooling: 32 pixels end as one.",
    weights=_WEIGHTS,
)
def resnet18(spec: ModelSpec) -> nn.Module:
    """Four stages of 64 to 512 channels, 20 BN layers."""
    return _make("resnet18", spec)


@register(
    "convnext_tiny",
    roles={
        **_stages("features.1", "features.3", "features.5", "features.7"),
        "last_conv": "features.7.2.block.0",
        "classifier": "classifier.2",
    },
    title="ConvNeXt-Tiny",
    year=2022,
    paper="Z. Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545",
    summary="LayerNorm only; images go straight into the stem of stride 4; meant to start from ImageNet weights.",
    min_size=32,
    weights=_WEIGHTS,
)
def convnext_tiny(spec: ModelSpec) -> nn.Module:
    """Four stages of 96 to 768 channels."""
    return _make("convnext_tiny", spec)


@register(
    "vit_b_16",
    roles={
        **_stages(*(f"1.encoder.layers.encoder_layer_{index}" for index in (2, 5, 8, 11))),
        "last_conv": "1.encoder.layers.encoder_layer_11",
        "classifier": "1.heads.head",
    },
    title="ViT-B/16",
    year=2021,
    paper="A. Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929",
    summary="Resizes to 224x224 inside; LayerNorm only; meant to start from ImageNet weights.",
    weights=_WEIGHTS,
)
def vit_b_16(spec: ModelSpec) -> nn.Module:
    """``Sequential(Resize, ViT)``, so the state's names start with ``1.``.

    Stages are every third of the twelve encoder blocks; their outputs are tokens ``[N, 197, 768]``, class token first.
    ``last_conv`` is the last block: where other networks offer their last spatial map (defenses_detection.md 4).
    """
    from torchvision.transforms import Resize

    # torchvision starts the head at zero, which gives constant logits and no gradient to the images before training.
    return nn.Sequential(
        Resize((224, 224), antialias=True),
        _make("vit_b_16", spec, zero_head="heads.head"),
    )


@register(
    "densenet161",
    roles={
        **_stages(*(f"features.denseblock{number}" for number in range(1, 5))),
        "last_conv": "features.denseblock4.denselayer24.conv2",
        "classifier": "classifier",
    },
    title="DenseNet161",
    year=2017,
    paper="G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, CVPR 2017, arXiv 1608.06993",
    summary="Four dense blocks, 26.5 M parameters.",
    min_size=32,
    weights=_WEIGHTS,
)
def densenet161(spec: ModelSpec) -> nn.Module:
    """Stages are the dense blocks (before the transitions)."""
    return _make("densenet161", spec)


@register(
    "mobilenet_v3_large",
    roles={
        **_stages("features.3", "features.6", "features.12", "features.16"),
        "last_conv": "features.16.0",
        "classifier": "classifier.3",
    },
    title="MobileNetV3-Large",
    year=2019,
    paper="A. Howard et al., Searching for MobileNetV3, ICCV 2019, arXiv 1905.02244",
    summary="Depthwise convolutions and squeeze-excitation, 4.2 M parameters.",
    weights=_WEIGHTS,
)
def mobilenet_v3_large(spec: ModelSpec) -> nn.Module:
    """Stages are the last outputs at strides 4, 8, 16 and 32."""
    return _make("mobilenet_v3_large", spec)


@register(
    "efficientnet_b3",
    roles={
        **_stages("features.2", "features.3", "features.5", "features.8"),
        "last_conv": "features.7.1.block.3.0",
        "classifier": "classifier.1",
    },
    title="EfficientNet-B3",
    year=2019,
    paper="M. Tan, Q. Le, EfficientNet, ICML 2019, arXiv 1905.11946",
    summary="Depthwise convolutions and squeeze-excitation, 10.7 M parameters.",
    weights=_WEIGHTS,
)
def efficientnet_b3(spec: ModelSpec) -> nn.Module:
    """Stages are the last outputs at strides 4, 8, 16 and 32; ``last_conv`` is the reference's choice, in block 7."""
    return _make("efficientnet_b3", spec)
