"""Feature maps: the layer's output to the bit, tokens as a square, and layers without places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis._layers import spatial
from bbfast.attacks import AttackResult
from bbfast.errors import DataRequirementError, UnknownNameError, UnsupportedModelError

CPU = torch.device("cpu")


def test_equals_the_hooked_tensor(badnets: AttackResult, tmp_path: Path) -> None:
    wanted = int(badnets.backdoor_test.ids[3])
    found = analysis.run("feature_map", badnets, out=tmp_path, device="cpu", layer="layer3.0.conv1", id=wanted).numbers
    subject = Subject(badnets, None, CPU)
    whole, kept = subject.pairs(), []  # type: ignore[var-annotated]
    row = whole.ids.tolist().index(wanted)
    with subject.watching({"layer3.0.conv1": lambda out: kept.append(out.clone())}), torch.no_grad():
        subject.model(subject.pixels(torch.stack([whole.clean[row], whole.triggered[row]])))
    np.testing.assert_array_equal(found.arrays["clean"], kept[0][0])
    np.testing.assert_array_equal(found.arrays["bd"], kept[0][1])
    norms = (kept[0][1] - kept[0][0]).flatten(1).norm(dim=1)
    np.testing.assert_allclose(found.arrays["diff"], norms, rtol=1e-5)
    assert found.summary["id"] == wanted and found.summary["top_channel"] == int(norms.argmax())
    assert (np.diff(found.arrays["diff"][found.arrays["order"]]) <= 0).all()
    np.testing.assert_array_equal(found.arrays["image_clean"], whole.clean[row])


def test_before_an_activation_in_place(badnets: AttackResult, tmp_path: Path) -> None:
    """A ReLU that overwrites the convolution's output does not reach what was kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(10)).eval()
    model(torch.zeros(1, 3, 32, 32))
    made = dataclasses.replace(badnets, model=model)
    assert (analysis.run("feature_map", made, out=tmp_path, device="cpu", layer="0").numbers.arrays["clean"] < 0).any()


def test_tokens_are_laid_out_as_the_image(badnets: AttackResult, tmp_path: Path) -> None:
    model = VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10).eval()
    made = dataclasses.replace(badnets, model=model)
    layer = "encoder.layers.encoder_layer_0"
    found = analysis.run("feature_map", made, out=tmp_path, device="cpu", layer=layer)
    assert found.numbers.arrays["clean"].shape == (16, 4, 4) and found.figure is not None
    tokens = torch.arange(17.0).view(1, 17, 1)
    maps = spatial(nn.Identity(), tokens)
    assert maps is not None and maps[0, 0].tolist() == torch.arange(1.0, 17).view(4, 4).tolist()
    assert spatial(nn.Identity(), torch.zeros(1, 14, 3)) is None
    last: Tensor | None = spatial(nn.Linear(3, 5), torch.zeros(1, 7, 8, 5))
    assert last is not None and last.shape == (1, 5, 7, 8)


def test_refused(badnets: AttackResult, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 'linear': it puts out \[2, 10\], no maps"):
        analysis.run("feature_map", badnets, out=tmp_path, device="cpu", layer="linear")
    with pytest.raises(UnknownNameError, match="unknown layer 'layr4'; did you mean"):
        analysis.run("feature_map", badnets, out=tmp_path, device="cpu", layer="layr4")
    with pytest.raises(DataRequirementError, match="id must be the number of a test image with a triggered twin"):
        analysis.run("feature_map", badnets, out=tmp_path, device="cpu", id=10**6)
