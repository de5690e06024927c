"""Additions: built into a model in place, written into its plan, built again from it."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from bbfast import models
from bbfast.errors import UnknownNameError
from bbfast.models.additions.polarizer import Polarizer


def polarized(structure: str = "convbn") -> nn.Module:
    torch.manual_seed(0)
    model = models.build("small_cnn", 4, (12, 12)).eval()
    models.add(model, "polarizer", layer="layer4.0.conv1", channels=40, structure=structure)
    return model


def test_the_plan_tells_of_it() -> None:
    model = polarized()
    spec = model.bbfast_spec
    assert isinstance(spec, models.ModelSpec)
    again = models.ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    built = again.build(weights=False)
    models.load_state(built, models.model_state(model))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(built.eval()(x), model(x))
    assert "additions" not in models.build("small_cnn", 4, (12, 12)).bbfast_spec.to_dict()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("structure", ["convbn", "conv", "linear"])
def test_it_starts_as_the_identity(structure: str) -> None:
    torch.manual_seed(0)
    plain = models.build("small_cnn", 4, (12, 12)).eval()
    model, x = polarized(structure), torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() < model.state_dict().keys()
    assert models.roles(model).names("norms") == models.roles(plain).names("norms")


def test_maps_and_tokens_are_treated_alike() -> None:
    torch.manual_seed(0)
    layer = Polarizer(6)
    with torch.no_grad():
        layer.mix.weight += 0.3 * torch.randn(6, 6)
    x = torch.randn(3, 6, 2, 4)
    maps = copy.deepcopy(layer)(x)
    torch.testing.assert_close(layer(x.flatten(2).transpose(1, 2)), maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(Polarizer(6, "conv")(x), x)


def test_copies_have_a_layer_of_their_own() -> None:
    """A hook on the original's layer would be shared by its copies."""
    model, x = polarized(), torch.randn(2, 3, 12, 12)
    before = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
        assert isinstance(twin.get_submodule("layer4.0.conv1"), nn.Conv2d)
        with torch.no_grad():
            twin.get_submodule("layer4.0.conv1.polarizer").mix.weight.zero_()  # type: ignore[union-attr, operator]
        assert not torch.equal(twin(x), before) and torch.equal(model(x), before)


def test_errors() -> None:
    model = polarized()
    with pytest.raises(ValueError, match="has a polarizer already"):
        models.add(model, "polarizer", layer="layer4.0.conv1", channels=40)
    with pytest.raises(UnknownNameError, match="unknown model addition 'polariser'; did you mean 'polarizer'"):
        models.add(model, "polariser")
    assert len(model.bbfast_spec.additions) == 1  # type: ignore[union-attr, arg-type]
