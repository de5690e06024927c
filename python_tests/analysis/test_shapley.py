"""Shapley values: exact on a linear model, complete on a smooth one, as captum's, and on the trigger."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis._attribution import shown
from bbfast.analysis.tools.shapley import Shapley, expected_gradients
from bbfast.attacks import AttackResult

CPU = torch.device("cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_exact_for_a_linear_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x, background = torch.randn(3, 2, 2), torch.randn(8, 3, 2, 2)
    classes = torch.tensor([2, 0])
    # 8 pairs from 8 backgrounds: every one counts the same.
    phi = expected_gradients(model, x, background, classes, 16, generator())
    wanted = model[1].weight.detach()[classes].view(2, 3, 2, 2) * (x - background.mean(0))
    torch.testing.assert_close(phi, wanted, rtol=1e-4, atol=1e-5)
    gap = (model(x[None])[0] - model(background).mean(0))[classes]
    torch.testing.assert_close(phi.sum((1, 2, 3)), gap.detach(), rtol=1e-4, atol=1e-5)


def test_complete_on_a_smooth_net() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    x, background = 2 * torch.randn(3, 2, 2), 0.3 * torch.randn(50, 3, 2, 2)
    gap = (model(x[None])[0] - model(background).mean(0)).detach()
    classes = gap.abs().argsort(descending=True)[:2]
    phi = expected_gradients(model, x, background, classes, 1000, generator())
    assert bool(((phi.sum((1, 2, 3)) - gap[classes]).abs() < 0.05 * gap[classes].abs()).all())


def test_against_captum() -> None:
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    x, background = torch.randn(3, 2, 2), 0.5 * torch.randn(20, 3, 2, 2)
    phi = expected_gradients(model, x, background, torch.tensor([1]), 4000, generator())[0]
    exact = torch.stack(
        [captum.IntegratedGradients(model).attribute(x[None], b[None], target=1, n_steps=64)[0] for b in background]
    ).mean(0)
    torch.testing.assert_close(phi, exact.float().detach(), rtol=0, atol=0.03 * float(exact.abs().max()))


def test_the_trigger_speaks_for_the_target(strong: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("shapley", strong, out=tmp_path, device="cpu", figures=False, nsamples=100)
    assert found.summary["mask_share_bd"] > 0.5, found.summary
    assert found.summary["mask_share_clean"] < 0.2
    arrays = found.numbers.arrays
    assert arrays["phi"].shape == (8, 5, 32, 32) and arrays["phi"].dtype == np.float16
    assert (arrays["cls"] == 0).any(axis=1).all()
    pairs, _ = shown(Subject(strong, None, CPU), 4)
    assert arrays["id"].tolist() == pairs.ids.tolist()
    assert not set(arrays["id"].tolist()) & set(arrays["background"].tolist())
    assert len(arrays["background"]) == len(set(arrays["background"].tolist())) > 100


def test_draws_of_an_image_do_not_depend_on_the_others(strong: AttackResult) -> None:
    subject = Subject(strong, None, CPU)
    once, twice = (Shapley(nsamples=9, background=20, ranked=2).measure(subject) for _ in range(2))
    assert np.array_equal(once.arrays["phi"], twice.arrays["phi"]) and once.meta["nsamples"] == 9
    assert once.arrays["phi"].shape[:2] == (8, 2)
