from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bbfast import artifact, models


def model(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("small_cnn", classes, 16)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    trained = model(1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained(torch.randn(8, 3, 16, 16))
    artifact.write(tmp_path / "result", "model", config={}, tensors={"model": models.model_state(trained)})
    fresh = model(2)
    models.load_state(fresh, artifact.read(tmp_path / "result").tensors("model"))
    x = torch.randn(3, 3, 16, 16)
    assert torch.allclose(fresh.eval()(x), trained.eval()(x), atol=1e-6)
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_state_is_a_contiguous_copy() -> None:
    source = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = models.model_state(source)
    before = {key: value.clone() for key, value in state.items()}
    assert list(state) == list(source.state_dict())
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in state.values())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_misfits_are_named_and_nothing_is_loaded() -> None:
    target = model(1)
    before = models.model_state(target)
    state: dict[str, Tensor] = models.model_state(model(2, classes=5))
    del state["conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["layer1.0.bn1.weight"] = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError, match="tensors must be the state of a small_cnn") as caught:
        models.load_state(target, state)
    text = str(caught.value)
    assert "missing: conv1.weight;" in text and "unexpected: extra.weight;" in text
    assert (
        "of another shape: linear.weight (expected [4, 64], got [5, 64]), linear.bias (expected [4], got [5])" in text
    )
    assert "of another kind: layer1.0.bn1.weight (expected torch.float32, got torch.int64)" in text
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_long_lists_are_cut_short() -> None:
    with pytest.raises(ValueError, match=r"missing: .* and \d\d more"):
        models.load_state(model(), {})
    with pytest.raises(ValueError, match="state of a Linear: missing: bias, weight"):
        models.load_state(nn.Linear(2, 2), {})
