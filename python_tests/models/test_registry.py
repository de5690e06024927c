from __future__ import annotations

import copy
import json
import urllib.error
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bbfast import models
from bbfast.errors import UnknownNameError, UnsupportedModelError
from bbfast.models._registry import MODELS


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names that a test registers, taken out again after it."""
    names: list[str] = []
    yield names
    for name in names:
        MODELS._entries.pop(name, None)


def small(**options: Any) -> nn.Module:
    return models.build("small_cnn", **{"num_classes": 4, "image_size": 16, **options}).eval()


class Net(nn.Module):
    """A network nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5, affine=False))
        self.hidden = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.hidden(self.body(x).mean((2, 3)))))
        return logits


class TestBuild:
    @pytest.mark.parametrize(
        ("size", "channels", "expected"),
        [
            (16, None, (3, 16, 16)),
            ((16, 20), None, (3, 16, 20)),
            ((1, 16, 20), None, (1, 16, 20)),
            (16, 2, (2, 16, 16)),
        ],
    )
    def test_image_sizes(self, size: Any, channels: int | None, expected: tuple[int, int, int]) -> None:
        model = small(image_size=size, in_channels=channels)
        spec = model.bbfast_spec
        assert isinstance(spec, models.ModelSpec)
        assert (spec.in_channels, *spec.image_size) == expected
        assert model(torch.zeros(2, *expected)).shape == (2, 4)

    def test_same_seed_same_weights(self) -> None:
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            states.append(small().state_dict()["conv1.weight"])
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_classes": 0}, ValueError, "num_classes must be a whole number >= 1, got 0"),
            ({"num_classes": 2.0}, ValueError, r"num_classes must be a whole number >= 1, got 2\.0"),
            ({"image_size": 0}, ValueError, "must be positive, got 0"),
            ({"image_size": (1, 2, 3, 4)}, ValueError, r"image_size must be a whole number, \(H, W\) or \(C, H, W\)"),
            ({"image_size": (16.0, 16)}, TypeError, "image_size must be a whole number"),
            ({"image_size": 32.5}, TypeError, r"image_size must be a whole number, .* got 32\.5"),
            ({"image_size": (1, 16, 16), "in_channels": 3}, ValueError, "in_channels must be that of image_size"),
            ({"pretrained": True}, ValueError, "pretrained must be False: there are no ImageNet weights for small_cnn"),
        ],
    )
    def test_bad_input_is_named(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            small(**options)

    def test_unknown_names_and_small_images(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown model 'preactresnet'; did you mean 'preactresnet18'"):
            models.build("preactresnet", 10, 32)
        with pytest.raises(UnknownNameError, match="unknown model"):
            models.info("nothing")
        with pytest.raises(ValueError, match=r"vgg19_bn needs images of at least 32 pixels a side, got \(28, 28\)"):
            models.build("vgg19_bn", 10, 28)

    def test_cards(self) -> None:
        for name in models.available():
            card = models.info(name)
            assert card["name"] == name and card["title"] and card["summary"] and card["paper"] and card["year"]
            assert {"stage1", "stage2", "stage3", "stage4", "last_conv", "classifier"} <= set(card["roles"])
            json.dumps(card)


class TestSpec:
    def test_round_trip(self) -> None:
        spec = small(image_size=(1, 16, 20)).bbfast_spec
        assert isinstance(spec, models.ModelSpec)
        assert models.ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        built = spec.build()
        assert built.bbfast_spec == spec and list(built.state_dict()) == list(small().state_dict())
        assert copy.deepcopy(built).bbfast_spec == spec

    def test_unknown_keys(self) -> None:
        with pytest.raises(TypeError):
            models.ModelSpec.from_dict({"name": "small_cnn", "num_classes": 2, "image_size": [4, 4], "depth": 3})


class TestPretrained:
    @pytest.fixture
    def weights(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
        import torchvision.models

        torch.manual_seed(5)
        state: dict[str, torch.Tensor] = torchvision.models.resnet18(num_classes=1000).state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
        return state

    def test_everything_that_fits_is_taken(self, weights: dict[str, torch.Tensor]) -> None:
        model = models.build("resnet18", 10, 32, pretrained=True)
        assert model.bbfast_spec.pretrained  # type: ignore[union-attr]
        for key, value in model.state_dict().items():
            assert key.startswith("fc.") or torch.equal(value, weights[key]), key
        assert model.state_dict()["fc.weight"].shape == (10, 512)

    def test_a_stem_of_other_channels_stays_fresh(self, weights: dict[str, torch.Tensor]) -> None:
        state = models.build("resnet18", 10, (1, 32, 32), pretrained=True).state_dict()
        assert state["conv1.weight"].shape == (64, 1, 7, 7)
        assert torch.equal(state["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])

    def test_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: Any, **kwargs: Any) -> None:
            raise urllib.error.URLError("no network")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
        with pytest.raises(
            models.WeightsError,
            match=r"IMAGENET1K_V1 of resnet18 cannot be loaded.*no network.*checkpoints.*pretrained=False",
        ):
            models.build("resnet18", 10, 32, pretrained=True)
        # A saved model is made again without its first weights.
        spec = models.ModelSpec("resnet18", 10, (32, 32), pretrained=True)
        assert spec.build(weights=False).bbfast_spec == spec


class TestThirdParty:
    def test_roles_are_given_at_registration(self, registered: list[str]) -> None:
        registered.append("mine")

        @models.register("mine", roles={"stage1": "body.0", "last_conv": "body.0", "norms": ("norm",)})
        def mine(spec: models.ModelSpec) -> nn.Module:
            assert (spec.num_classes, spec.image_size, spec.in_channels) == (2, (8, 8), 3)
            return Net()

        assert "mine" in models.available() and models.info("mine")["roles"]["norms"] == ["norm"]
        model = models.build("mine", 2, 8).eval()
        roles = models.roles(model)
        assert roles.names("norms") == ["norm"] and roles.names("classifier") == ["head"]
        assert models.features(model, torch.zeros(2, 3, 8, 8), "stage1").shape == (2, 5, 6, 6)
        with pytest.raises(
            UnsupportedModelError, match=r"'stage2' cannot work on mine: the model has no such layer \(its"
        ):
            roles.module("stage2")

    def test_wrong_registrations(self, registered: list[str]) -> None:
        registered.append("wrong")
        with pytest.raises(ValueError, match=r"role must be one of stage1.*got 'stage9'"):
            models.register("wrong", roles={"stage9": "body"})
        with pytest.raises(ValueError, match="model name 'small_cnn' is taken"):
            models.register("small_cnn")(lambda spec: Net())
        models.register("wrong", roles={"stage1": "absent"})(lambda spec: Net())
        with pytest.raises(UnsupportedModelError, match="'stage1' cannot work on wrong: it has no layer 'absent'"):
            models.roles(models.build("wrong", 2, 8))


class TestRoles:
    def test_of_any_module(self) -> None:
        model = Net().eval()
        roles = models.roles(model)
        assert roles.names("norms") == ["body.1"]
        assert roles.module("classifier") is model.head
        assert models.features(model, torch.zeros(2, 3, 8, 8), "penultimate").shape == (2, 6)
        for role in ("stage1", "last_conv"):
            assert not roles.has(role)
            with pytest.raises(UnsupportedModelError, match=f"layer role '{role}' cannot work on Net"):
                roles.modules(role)

    def test_layer_norms_where_there_is_no_batch_norm(self) -> None:
        model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4))
        roles = models.roles(model)
        assert roles.names("norms") == ["0"]
        with pytest.raises(UnsupportedModelError, match="'classifier' cannot work on Sequential"):
            roles.module("classifier")

    def test_unknown_roles_and_several_modules(self) -> None:
        roles = models.roles(small())
        with pytest.raises(UnknownNameError, match="unknown layer role 'stage_1'; did you mean 'stage1'"):
            roles.module("stage_1")
        with pytest.raises(ValueError, match=r"role 'norms' of small_cnn has 8 modules; use modules\('norms'\)"):
            roles.module("norms")

    def test_wrappers_are_looked_through(self) -> None:
        model = small()
        x = torch.zeros(2, 3, 16, 16)
        expected = models.features(model, x, "stage2")
        for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            assert models.roles(wrapped).model is model
            assert models.roles(wrapped).label == "small_cnn"
        assert torch.equal(models.features(nn.DataParallel(model), x, "stage2"), expected)

    def test_a_layer_that_the_forward_pass_skips(self, registered: list[str]) -> None:
        registered.append("skips")
        models.register("skips", roles={"stage1": "unused"})(lambda spec: Net())
        with pytest.raises(UnsupportedModelError, match="does not use that layer"):
            models.features(models.build("skips", 2, 8).eval(), torch.zeros(2, 3, 8, 8), "stage1")

    def test_hooks_are_gone_after_an_error(self) -> None:
        model = small()
        with pytest.raises(RuntimeError):
            models.features(model, torch.zeros(2, 7, 16, 16), "stage4")
        assert not any(module._forward_hooks for module in model.modules())

    def test_features_carry_gradients(self) -> None:
        model = small()
        x = torch.rand(2, 3, 16, 16, requires_grad=True)
        models.features(model, x, "penultimate").sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
