"""What every built-in model must be: shapes, sizes, layers by role, names of its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bbfast import models
from bbfast.errors import UnsupportedModelError

# name: (parameters for 10 classes, norm layers, their class, channels of the stages, width of the penultimate vector)
FACTS: dict[str, tuple[int, int, str, tuple[int, ...], int]] = {
    "preactresnet18": (11_171_146, 16, "BatchNorm2d", (64, 128, 256, 512), 512),
    "small_cnn": (101_658, 8, "BatchNorm2d", (16, 24, 40, 64), 64),
    "vgg19_bn": (139_622_218, 16, "BatchNorm2d", (64, 128, 256, 512, 512), 4096),
    "vgg19": (139_611_210, 0, "", (64, 128, 256, 512, 512), 4096),
    "resnet18": (11_181_642, 20, "BatchNorm2d", (64, 128, 256, 512), 512),
    "convnext_tiny": (27_827_818, 23, "LayerNorm", (96, 192, 384, 768), 768),
    "vit_b_16": (85_806_346, 25, "LayerNorm", (768, 768, 768, 768), 768),
    "densenet161": (26_494_090, 161, "BatchNorm2d", (384, 768, 2112, 2208), 2208),
    "mobilenet_v3_large": (4_214_842, 46, "BatchNorm2d", (24, 40, 112, 960), 1280),
    "efficientnet_b3": (10_711_602, 78, "BatchNorm2d", (32, 48, 136, 1536), 1536),
}
# Sides of the stages' maps at 32 pixels (defenses_mitigation.md 1.6).
SIDES = {
    "preactresnet18": (32, 16, 8, 4),
    "small_cnn": (16, 8, 4, 4),
    "vgg19_bn": (16, 8, 4, 2, 1),
    "vgg19": (16, 8, 4, 2, 1),
}
LAST_CONV = {
    "preactresnet18": "layer4.1.conv2",
    "resnet18": "layer4.1.conv2",
    "vgg19": "features.34",
    "vgg19_bn": "features.49",
    "densenet161": "features.denseblock4.denselayer24.conv2",
    "mobilenet_v3_large": "features.16.0",
    "efficientnet_b3": "features.7.1.block.3.0",
    "convnext_tiny": "features.7.2.block.0",
    "vit_b_16": "1.encoder.layers.encoder_layer_11",
    "small_cnn": "layer4.0.conv2",
}


def abstract(name: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The model without memory: shapes are computed, values are not."""
    with torch.device("meta"):
        return models.build(name, num_classes, (in_channels, 32, 32)).eval()


def stages(name: str) -> list[str]:
    return [f"stage{number}" for number in range(1, len(FACTS[name][3]) + 1)]


def test_the_ten_models_are_there() -> None:
    assert set(FACTS) <= set(models.available())


@pytest.mark.parametrize("name", FACTS)
def test_parameters_and_norms(name: str) -> None:
    model = abstract(name)
    parameters, norms, kind, _, _ = FACTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    roles = models.roles(model)
    if norms:
        found = roles.modules("norms")
        assert len(found) == norms
        assert all(kind in [c.__name__ for c in type(module).__mro__] for module in found)
        assert all(isinstance(module.weight, nn.Parameter) for module in found)
    else:
        assert not roles.has("norms")
        with pytest.raises(
            UnsupportedModelError, match="layer role 'norms' cannot work on vgg19: the model has no such"
        ):
            roles.modules("norms")


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", FACTS)
def test_shapes_at_every_role(name: str, size: int) -> None:
    model = abstract(name)
    _, _, _, channels, width = FACTS[name]
    wanted = [*stages(name), "last_conv", "penultimate", "classifier"]
    x = torch.empty(2, 3, size, size, device="meta")
    kept, logits = models.forward_features(model, x, wanted)
    assert logits.shape == kept["classifier"].shape == (2, 10)
    assert kept["penultimate"].shape == (2, width)
    for number, (role, count) in enumerate(zip(stages(name), channels, strict=True)):
        if name == "vit_b_16":
            assert kept[role].shape == (2, 197, count)
        elif name in SIDES:
            side = SIDES[name][number] * size // 32
            assert kept[role].shape == (2, count, side, side)
        else:
            side = (8 >> number) * size // 32
            assert kept[role].shape == (2, count, side, side)


@pytest.mark.parametrize("name", FACTS)
def test_last_conv_and_classifier(name: str) -> None:
    roles = models.roles(abstract(name))
    assert roles.names("last_conv") == [LAST_CONV[name]]
    assert isinstance(roles.module("last_conv"), nn.Module if name == "vit_b_16" else nn.Conv2d)
    linear = roles.module("classifier")
    assert isinstance(linear, nn.Linear) and linear.out_features == 10
    assert roles.names("classifier") == roles.names("penultimate")
    # The last linear layer of the network, whatever the registration says.
    assert linear is [module for module in roles.model.modules() if isinstance(module, nn.Linear)][-1]


@pytest.mark.parametrize("name", [name for name in FACTS if name not in ("vgg19", "vgg19_bn")])
def test_values_flow(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, 7, 32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        z, logits = models.features(model, x, "penultimate", with_logits=True)
        classifier = models.roles(model).module("classifier")
        assert torch.equal(classifier(z), logits)
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()
    # ViT's last layer too is drawn, not zero, as torchvision leaves it.
    assert (logits[0] - logits[1]).abs().max() > 0
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg19", "vgg19_bn"])
def test_values_flow_in_vgg(name: str) -> None:
    test_values_flow(name)


@pytest.mark.parametrize("name", FACTS)
def test_gray_images(name: str) -> None:
    model = abstract(name, in_channels=1)
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 10)
    assert model.bbfast_spec.in_channels == 1
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    colour = [module for module in abstract(name).modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(m.weight.shape[2:]) for m in convolutions] == [tuple(m.weight.shape[2:]) for m in colour]
    assert (convolutions[0].stride, convolutions[0].padding) == (colour[0].stride, colour[0].padding)
    assert (convolutions[0].bias is None) == (colour[0].bias is None)


def test_preactresnet18_has_the_names_of_the_benchmark() -> None:
    model = abstract("preactresnet18")
    keys = list(model.state_dict())
    assert list(dict(model.named_children())) == ["conv1", "layer1", "layer2", "layer3", "layer4", "linear"]
    assert keys[0] == "conv1.weight" and keys[-2:] == ["linear.weight", "linear.bias"]
    block = [key.removeprefix("layer2.0.") for key in keys if key.startswith("layer2.0.")]
    statistics = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert block == [
        *(f"bn1.{name}" for name in statistics),
        "conv1.weight",
        *(f"bn2.{name}" for name in statistics),
        "conv2.weight",
        "shortcut.0.weight",
    ]
    # Shortcuts stand only where width or resolution change; BN only in blocks.
    assert [key for key in keys if "shortcut" in key] == [f"layer{stage}.0.shortcut.0.weight" for stage in (2, 3, 4)]
    assert all(key.split(".")[2].startswith("bn") for key in keys if "running_mean" in key)
    assert len(keys) == 102


def test_preactresnet18_computes_what_the_paper_says() -> None:
    """The second block of stage 2 and the first of stage 3, written out; no BN and ReLU before the pooling."""
    torch.manual_seed(0)
    model = models.build("preactresnet18", 10, 32).eval()
    assert isinstance(model, nn.Module)
    x = torch.randn(2, 128, 8, 8)
    relu = torch.relu
    with torch.no_grad():
        same, down = model.get_submodule("layer2.1"), model.get_submodule("layer3.0")
        part = {name: dict(block.named_children()) for name, block in (("same", same), ("down", down))}
        for name, block in (("same", same), ("down", down)):
            layers = part[name]
            active = relu(layers["bn1"](x))
            inner = layers["conv2"](relu(layers["bn2"](layers["conv1"](active))))
            shortcut = layers["shortcut"](active) if name == "down" else x
            assert torch.allclose(block(x), inner + shortcut, atol=1e-6)
        kept, _ = models.forward_features(model, torch.randn(2, 3, 32, 32), ["stage4", "penultimate"])
    assert torch.allclose(kept["stage4"].mean((2, 3)), kept["penultimate"], atol=1e-6)
    assert (kept["penultimate"] < 0).any()


def test_vit_resizes_inside_and_its_names_start_with_one() -> None:
    model = abstract("vit_b_16")
    assert all(key.startswith("1.") for key in model.state_dict())
    assert {"1.class_token", "1.heads.head.weight", "1.encoder.pos_embedding"} <= set(model.state_dict())
    assert model[0](torch.rand(1, 3, 32, 32)).shape == (1, 3, 224, 224)  # type: ignore[index]


def test_hooks_see_values_before_the_activation_changes_them() -> None:
    for name in ("vgg19", "resnet18", "efficientnet_b3", "mobilenet_v3_large"):
        assert not any(getattr(module, "inplace", False) for module in abstract(name).modules()), name
