"""Grad-CAM: the formula, the trigger's share, tokens, layers in place, and the layer that is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbfast import analysis, models
from bbfast.analysis import Subject
from bbfast.analysis._attribution import captured, shown, trigger_mask
from bbfast.analysis.tools.grad_cam import GradCAM, cam, overlap
from bbfast.attacks import AttackResult
from bbfast.errors import UnknownNameError, UnsupportedModelError

CPU = torch.device("cpu")


def subject_of(attacked: AttackResult, model: nn.Module) -> Subject:
    """The attack's images seen by another model."""
    stand_in: Any = SimpleNamespace(model=model)
    return Subject(attacked, stand_in, CPU)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_the_formula(method: str) -> None:
    maps, slopes = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    got = cam(maps, slopes, (10, 10), method)
    for i in range(3):
        plain = torch.zeros(5, 5)
        for c in range(4):
            weight = {"gradcam": slopes[i, c].mean(), "hirescam": slopes[i, c], "layercam": slopes[i, c].clamp(min=0)}
            plain += weight[method] * maps[i, c]
        big = F.interpolate(plain.clamp(min=0)[None, None], (10, 10), mode="bilinear")[0, 0]
        torch.testing.assert_close(got[i], (big - big.min()) / (big.max() - big.min()))
    assert not bool(cam(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), (4, 4), method).any())


def test_against_captum(badnets: AttackResult) -> None:
    captum = pytest.importorskip("captum.attr")
    subject = Subject(badnets, None, CPU)
    images = subject.pairs(8).triggered
    name, module = subject.layer("last_conv")
    x = subject.pixels(images).requires_grad_()
    said = subject.logits(images).argmax(1)
    raw = captum.LayerGradCam(subject.model, module).attribute(x, said, relu_attributions=True).detach()
    big = F.interpolate(raw, (32, 32), mode="bilinear")[:, 0]
    low, high = big.amin((1, 2), keepdim=True), big.amax((1, 2), keepdim=True)
    got = GradCAM()._cams(subject, name, images)[0]
    torch.testing.assert_close(got, (big - low) / (high - low).clamp_min(1e-12), atol=1e-3, rtol=0)


def test_overlap_by_hand() -> None:
    maps = torch.zeros(2, 10, 10)
    maps[0, :3, :5] = 2.0
    maps[0, 9, 9] = 1.0
    mask = torch.zeros(2, 10, 10, dtype=torch.bool)
    mask[:, :3, :3] = True
    energy, iou = overlap(maps, mask)
    assert energy[0] == pytest.approx(18 / 31) and iou[0] == pytest.approx(9 / 15)
    assert np.isnan(energy[1]) and np.isnan(iou[1])


def test_the_trigger_takes_over(strong: AttackResult, tmp_path: Path) -> None:
    found = analysis.run("grad_cam", strong, out=tmp_path, device="cpu", figures=False, layer="stage2")
    assert found.summary["energy_bd"] > 3 * found.summary["energy_clean"], found.summary
    arrays = found.numbers.arrays
    assert arrays["cam_bd"].dtype == np.float16 and arrays["cam_bd"].shape == (4, 32, 32)
    assert arrays["mask"][-4:, -4:].min() > 0.9 and arrays["mask"][:-4].max() == 0
    pairs, _ = shown(Subject(strong, None, CPU), 4)
    assert arrays["id"].tolist() == pairs.ids.tolist() == Subject(strong, None, CPU).pairs(4).ids.tolist()


def test_the_layer_counts(badnets: AttackResult, tmp_path: Path) -> None:
    """The reference's tool gives the same whatever the layer."""
    maps = [
        analysis.run("grad_cam", badnets, out=tmp_path, device="cpu", figures=False, layer=layer, n_stat=4)
        for layer in ("stage1", "last_conv")
    ]
    assert np.abs(maps[0].numbers.arrays["cam_bd"] - maps[1].numbers.arrays["cam_bd"]).max() > 0.05
    with pytest.raises(UnknownNameError, match="unknown layer 'layer9'"):
        analysis.run("grad_cam", badnets, out=tmp_path, device="cpu", layer="layer9")
    with pytest.raises(UnsupportedModelError, match="is no map"):
        analysis.run("grad_cam", badnets, out=tmp_path, device="cpu", layer="classifier")


def test_what_works_in_place_leaves_the_map_alone(badnets: AttackResult) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3)
    nets = [
        nn.Sequential(convolution, nn.ReLU(inplace=flag), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        for flag in (True, False)
    ]
    nets[1][4] = nets[0][4]
    subjects = [subject_of(badnets, net) for net in nets]
    images = subjects[0].pairs(4).clean
    both = [GradCAM()._cams(subject, "0", images)[0] for subject in subjects]
    assert torch.equal(*both) and bool(both[0].any())
    with captured(subjects[0], "0") as kept:
        subjects[0].logits(images)
    assert float(kept[0].detach().min()) < 0


@pytest.mark.parametrize("name", ["vgg19_bn", "convnext_tiny"])
def test_other_models(name: str, badnets: AttackResult) -> None:
    torch.manual_seed(0)
    subject = subject_of(badnets, models.build(name, 10, 32))
    tool = GradCAM(shown=2, n_stat=2)
    if name == "convnext_tiny":  # 32 pixels end as one
        with pytest.raises(UnsupportedModelError, match="a single pixel"):
            tool.check(subject)
        tool = GradCAM(shown=2, n_stat=2, layer="stage3")
    tool.check(subject)
    assert bool(np.isfinite(tool.measure(subject).arrays["mean_bd"]).all())


def test_tokens_become_a_grid(badnets: AttackResult) -> None:
    """A small transformer laid out as ViT is: the last block's first norm still has a gradient."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    subject = subject_of(badnets, net)
    tool = GradCAM(shown=2, n_stat=2, layer="encoder.layers.encoder_layer_1.ln_1")
    tool.check(subject)
    torch.nn.init.normal_(subject.model.heads.head.weight)  # torchvision starts it at zero
    assert tool.measure(subject).arrays["cam_clean"].max() == 1


def test_mask(badnets: AttackResult) -> None:
    mask = trigger_mask(Subject(badnets, None, CPU).pairs(5))
    assert bool(mask[:, -4:, -4:].all()) and not bool(mask[:, :-4].any())
