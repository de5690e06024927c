"""Feature visualisation: activations rise, chunks and the other channels do not matter, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bbfast.analysis import Subject
from bbfast.analysis.tools.feature_visualization import FeatureVisualization, paint, transform
from bbfast.attacks import AttackResult
from bbfast.errors import UnknownNameError, UnsupportedModelError

CPU = torch.device("cpu")


def test_activations_rise(strong: AttackResult) -> None:
    """More than three times what noise gives, for nine channels in ten (without much regularisation)."""
    tool = FeatureVisualization(steps=60, channels=20, n_stat=50, l1=0.02, tv=0.02)
    found = tool.measure(Subject(strong, None, CPU))
    act, noise = found.arrays["act"], found.arrays["noise"]
    assert (act > noise).all() and (act > 3 * noise).mean() > 0.9
    assert found.arrays["img"].dtype == np.uint8 and found.arrays["img"].shape[1:] == (32, 32, 3)
    assert (np.diff(found.arrays["change"]) <= 0).all()


def test_chunks_and_company_do_not_matter(strong: AttackResult) -> None:
    subject = Subject(strong, None, CPU)
    whole = FeatureVisualization(steps=4, channels=6).measure(subject)
    for other in (FeatureVisualization(steps=4, channels=6, batch=2), FeatureVisualization(steps=4, channels=3)):
        part = other.measure(subject)
        count = len(part.arrays["channel"])
        assert part.arrays["channel"].tolist() == whole.arrays["channel"][:count].tolist()
        difference = part.arrays["img"].astype(int) - whole.arrays["img"][:count]
        assert np.abs(difference).max() <= 1
        np.testing.assert_allclose(part.arrays["act"], whole.arrays["act"][:count], rtol=1e-3, atol=1e-4)
    assert not subject.model.get_submodule(whole.meta["layer"])._forward_hooks


def test_a_template_is_found(badnets: AttackResult) -> None:
    """A channel that is the sum of the pixels times a pattern: the image takes the pattern's signs."""
    pattern = torch.ones(3, 32, 32)
    pattern[:, :, 16:] = -1
    net = nn.Sequential(nn.Conv2d(3, 1, 32), nn.Flatten(), nn.Linear(1, 10))
    with torch.no_grad():
        net[0].weight.copy_(pattern / 100)
    stand_in: Any = SimpleNamespace(model=net)
    found = FeatureVisualization(steps=60, layer="0", n_stat=20).measure(Subject(badnets, stand_in, CPU))
    image = found.arrays["img"][0].astype(int)
    assert (image[:, :13] > 128).mean() > 0.95 and (image[:, 19:] < 128).mean() > 0.95


def test_paint_and_transform() -> None:
    spectrum = torch.randn(2, 3, 8, 5, 2, generator=torch.Generator().manual_seed(0))
    images = paint(spectrum, 8, 8)
    assert images.shape == (2, 3, 8, 8) and 0 < float(images.min()) < float(images.max()) < 1
    torch.testing.assert_close(transform(images, torch.tensor([0.0, 1.0, 0.0, 0.0])), images)
    shifted = transform(images, torch.tensor([0.0, 1.0, 2.0, 0.0]))
    torch.testing.assert_close(shifted[..., :6], images[..., 2:], rtol=1e-4, atol=1e-5)


def test_linear_layers_and_refusals(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    tool = FeatureVisualization(layer="classifier", steps=2)
    tool.check(subject)
    assert len(tool.measure(subject).arrays["img"]) == 10
    with pytest.raises(UnknownNameError, match="unknown layer 'layer9'"):
        FeatureVisualization(layer="layer9").check(subject)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    stand_in: Any = SimpleNamespace(model=Tokens())
    tokens = Subject(badnets, stand_in, CPU)
    with pytest.raises(UnsupportedModelError, match="has no channels of maps"):
        FeatureVisualization(layer="block").check(tokens)
    FeatureVisualization(layer="embed").check(tokens)
