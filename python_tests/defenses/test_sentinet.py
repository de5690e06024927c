"""SentiNet: Grad-CAM against autograd by hand, exact pastes, the clean curve, and a patch that decides the class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import defenses
from bbfast.data.imageset import ImageSet
from bbfast.defenses import DefenseResult
from bbfast.defenses.detection._gradcam import grad_cam, map_positions, salient
from bbfast.defenses.detection.sentinet import Boundary, masked_paste
from bbfast.defenses.run import build_view
from bbfast.defenses.view import DataFacts, DefenderView, Grants, Stream
from bbfast.errors import ConfigError, DataRequirementError, UnsupportedModelError
from bbfast.metrics import detection
from bbfast.models import build

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 12


class Patched(nn.Module):
    """Class 0, 1 or 2 by the leading colour, and 3 where there is a white 3x3 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        with torch.no_grad():
            self.conv.weight.zero_()
            for c in range(3):
                self.conv.weight[c, c, 1, 1] = std[c]
            self.conv.bias[:3] = mean
            # Mean of the nine pixels; their part above 0.55 counts, so that four or five white ones on black do not.
            self.conv.weight[3] = (std / 27).view(3, 1, 1)
            self.conv.bias[3] = mean.mean() - 0.55

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x).relu()
        colours = a[:, :3].mean(dim=(2, 3))
        return torch.cat((60 * colours, 120 * a[:, 3].amax(dim=(1, 2), keepdim=True)[:, :, 0]), 1)


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dark noise with one leading colour, and that colour."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (n, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 60
    return images, labels


def triggered(images: Tensor) -> Tensor:
    stamped = images.clone()
    stamped[:, :, -4:-1, -4:-1] = 255
    return stamped


def view_with(model: nn.Module, reserve: ImageSet, inspected: Tensor, **options: Any) -> DefenderView:
    facts = DataFacts("toy", 4, reserve.image_size, MEAN, STD)
    grants = Grants(model=model, reserve=reserve, stream=Stream(inspected))
    return DefenderView("sentinet", {"model", "reserve", "stream"}, facts, grants, **options)


def reserve_of(n: int, seed: int = 100) -> ImageSet:
    images, labels = pictures(n, seed)
    return ImageSet(images, labels, mean=MEAN, std=STD)


def rows(result: DefenseResult) -> tuple[Tensor, Tensor]:
    assert result.scores is not None
    assert result.flags is not None
    return result.scores, result.flags


def sentinet(**settings: Any) -> Any:
    return defenses.create("sentinet", **{"layer": "conv", "precision": "fp32", "overlays": 20, **settings})


def as_seen(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# -- Grad-CAM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_grad_cam_by_hand(frozen: bool) -> None:
    torch.manual_seed(0)
    model = build("small_cnn", 4, (32, 32)).eval().requires_grad_(not frozen)
    layer = model.get_submodule("layer4.0.conv2")
    x = torch.randn(3, 3, 32, 32)
    maps, labels = grad_cam(model, layer, x)
    for i in range(3):
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        logits = model(x[i : i + 1].requires_grad_())
        handle.remove()
        assert int(labels[i]) == int(logits.argmax())
        (slope,) = torch.autograd.grad(logits[0, labels[i]], kept[0])
        cam = (slope.mean(dim=(2, 3))[..., None, None] * kept[0]).sum(dim=1).relu()
        cam = nn.functional.interpolate(cam[None], (32, 32), mode="bilinear", align_corners=False)[0, 0].detach()
        torch.testing.assert_close(maps[i], (cam - cam.min()) / (cam.max() - cam.min()), atol=1e-4, rtol=0)
    assert all(p.grad is None for p in model.parameters())
    assert not layer._forward_hooks


def test_grad_cam_of_tokens() -> None:
    """At a transformer's last block only the class token has a gradient: its input is read instead."""

    class Block(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + tokens.mean(dim=1, keepdim=True).pow(3)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 5, 4, 4), Block(), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            patches = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.block(torch.cat((patches[:, :1] * 0, patches), 1))[:, 0])

    torch.manual_seed(0)
    model = Tokens().eval()
    maps, _ = grad_cam(model, model.block, torch.randn(6, 3, 16, 16))
    assert maps.shape == (6, 16, 16)
    assert int((maps.amax(dim=(1, 2)) == 1).sum()) >= 3


def test_layers_that_give_no_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, SIZE), nn.Flatten(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    with pytest.raises(UnsupportedModelError, match="a map of one position for images of 12x12"):
        grad_cam(model, model[0], x)
    with pytest.raises(UnsupportedModelError, match="gives no map"):
        grad_cam(model, model[2], x)


@pytest.mark.parametrize(("size", "stage"), [(32, "features.5"), (64, "features.7.2.block.0")])
def test_on_small_images_an_earlier_stage_is_read(toy_attack: Any, size: int, stage: str) -> None:
    attack = toy_attack(build("convnext_tiny", 4, size), n=20, n_test=64, size=(3, size, size))
    defense = defenses.create("sentinet")
    view, _ = build_view(defense, attack, 0.2, 0, torch.device("cpu"))
    chosen = defense._layer(view)  # type: ignore[attr-defined]
    assert chosen is view.model.get_submodule(stage)
    assert map_positions(view.model, chosen, (3, size, size)) == 4


def test_masks() -> None:
    cam = torch.tensor([[[0.0, 0.9, 0.85], [0.5, 1.0, 0.2]], [[0.0, 0, 0], [0, 0, 1]], [[0.0, 0, 0], [0, 0, 0]]])
    top = salient(cam, "top", 0.5)
    assert top.flatten(1).int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6]
    assert salient(cam, "threshold", 0.85).flatten(1).int().tolist() == top.flatten(1).int().tolist()
    assert int(salient(torch.rand(1, 10, 10), "top", 0.15).sum()) == 15


def test_paste_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    top, ground = (torch.randint(0, 256, (3, 5, 3, 7, 6), generator=g, dtype=torch.uint8) for _ in range(2))
    mask = torch.rand(3, 1, 7, 6, generator=g) < 0.3
    expected = ground.numpy().copy()
    for i in range(3):
        rows_, columns = np.nonzero(mask[i, 0].numpy())
        expected[i][:, :, rows_, columns] = top[i].numpy()[:, :, rows_, columns]
    assert np.array_equal(masked_paste(top, ground, mask).numpy(), expected)


# -- the curve --------------------------------------------------------------------------------------------------------


def test_curve_is_a_parabola_through_the_highest_points() -> None:
    g = torch.Generator().manual_seed(0)
    conf = torch.rand(300, generator=g).double() * 0.5 + 0.4
    clean = torch.stack((conf, torch.rand(300, generator=g).double() * 0.5), 1)
    best: dict[int, tuple[float, float]] = {}
    for x, y in clean.tolist():
        if y > best.get(int(x / 0.02), (0.0, -1.0))[1]:
            best[int(x / 0.02)] = (x, y)
    xs, ys = np.array(list(best.values())).T
    expected = np.polynomial.Polynomial.fit(xs, ys, 2).convert().coef
    boundary = Boundary(clean)
    assert boundary.coefficients == pytest.approx(expected, rel=1e-6)
    point = torch.tensor([[0.6, 0.9]], dtype=torch.float64)
    height = np.polyval(expected[::-1], 0.6)
    slope = expected[1] + 2 * expected[2] * 0.6
    assert float(boundary.distance(point)) == pytest.approx((0.9 - height) / np.sqrt(1 + slope**2))
    # No running off: beyond the clean points the curve stays where it was.
    far = torch.tensor([[0.0, 0.9], [conf.min(), 0.9]], dtype=torch.float64)
    assert boundary.distance(far)[0] == boundary.distance(far)[1]
    order = torch.randperm(300, generator=g)
    assert Boundary(clean[order]).coefficients == pytest.approx(boundary.coefficients)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_curve_through_few_points(n: int) -> None:
    clean = torch.tensor([[0.3, 0.1], [0.5, 0.3], [0.5, 0.2]], dtype=torch.float64)[:n]
    boundary = Boundary(clean)
    assert boundary.coefficients == pytest.approx([0.1, 0, 0] if n == 1 else [-0.2, 1, 0])
    assert boundary.threshold(clean, "mean_below", 0.05) == pytest.approx(0.1 / 2**0.5 if n == 3 else 0, abs=1e-6)


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_threshold_lets_no_more_than_its_share_pass(fpr: float) -> None:
    clean = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)).double()
    boundary = Boundary(clean)
    limit = boundary.threshold(clean, "quantile", fpr)
    assert int((boundary.distance(clean).float() > limit).sum()) == int(fpr * 100)


# -- the defense ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"calibration": "mean_below"}])
def test_a_patch_that_decides_the_class(settings: dict[str, Any]) -> None:
    """The acceptance line. Regression: the references' normaliser, scores upside down, an oracle for the trigger."""
    model, images = Patched().eval(), pictures(60, 7)[0]
    with torch.no_grad():
        assert bool((model(as_seen(triggered(images))).argmax(1) == 3).all())
        assert bool((model(as_seen(images)).argmax(1) == pictures(60, 7)[1]).all())
    defense = sentinet(**settings)
    view = view_with(model, reserve_of(60), torch.cat((images, triggered(images))))
    points = defense._points(
        view,
        view.stream.images,
        view.reserve.images,
        view.reserve.images.flip(0),
        torch.arange(20).expand(120, 20),
        defenses.detection.sentinet.choose_numerics("fp32", True, model, view.device),
    )
    share = 1 / 3  # of the overlays are of a clean image's class already
    assert float(points[60:, 1].mean()) > 0.95
    assert float(points[:60, 1].mean()) < share + 0.1
    result = defense.run(view)
    scores, flags = rows(result)
    truth = torch.arange(120) >= 60
    metrics = detection(scores, truth, flags)
    assert metrics["auroc"] > 0.95
    assert metrics["tpr"] > 0.95
    assert metrics["fpr"] < 0.2
    assert torch.equal(flags, scores > result.threshold)


def test_scores_follow_the_image_not_its_place() -> None:
    model, images = Patched().eval(), torch.cat((pictures(9, 7)[0], triggered(pictures(9, 8)[0])))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    one = rows(sentinet().run(view_with(model, reserve_of(30), images)))[0]
    for batch_size in (1, 100):
        again = sentinet(batch_size=batch_size).run(view_with(model, reserve_of(30), images[order]))
        torch.testing.assert_close(rows(again)[0], one[order], atol=1e-5, rtol=0)
    assert not torch.equal(rows(sentinet().run(view_with(model, reserve_of(30), images, seed=1)))[0], one)


def test_reference_preset() -> None:
    result = sentinet(preset="reference").run(view_with(Patched().eval(), reserve_of(30), pictures(8)[0]))
    scores, flags = rows(result)
    assert result.threshold == 0.9
    assert bool(((scores >= 0.25) & (scores <= 1)).all())
    assert torch.equal(flags, scores > 0.9)
    assert result.info["calibration"]["rule"] == "confidence"


def test_models_of_the_zoo() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    reserve = ImageSet(images, torch.arange(6) % 4, mean=MEAN, std=STD)
    defense = defenses.create("sentinet")
    result = defense.run(view_with(build("small_cnn", 4, (32, 32)).eval(), reserve, images))
    assert bool(rows(result)[0].isfinite().all())
    assert result.info["overlays"] == 5
    with pytest.raises(UnsupportedModelError, match="last_conv"):
        defense.check(view_with(Patched(), reserve, images))
    with pytest.raises(UnsupportedModelError, match="no layer 'cnov'"):
        sentinet(layer="cnov").check(view_with(Patched(), reserve, images))
    flat = nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten(), nn.Linear(4, 4))
    for layer in ("0", "2"):
        with pytest.raises(UnsupportedModelError, match=f"layer '{layer}' does not give a map"):
            sentinet(layer=layer).check(view_with(flat, reserve, images))


def test_bad_input() -> None:
    model = Patched().eval()
    assert rows(sentinet().run(view_with(model, reserve_of(8), pictures(0)[0])))[0].shape == (0,)
    with pytest.raises(DataRequirementError, match="at least 2, the reserve has 1"):
        sentinet().check(view_with(model, reserve_of(1), pictures(3)[0]))
    black = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    assert bool(rows(sentinet().run(view_with(model, reserve_of(8), black)))[0].isfinite().all())
    with torch.no_grad():
        model.conv.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="its training diverged"):
        sentinet().run(view_with(model, reserve_of(8), pictures(3)[0]))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"overlays": 0}, "overlays"),
        ({"mask_level": 1.0}, "mask_level"),
        ({"fpr": 0.0}, "fpr"),
        ({"confidence": 1.0}, "confidence"),
        ({"inert": "nothing"}, "inert"),
    ],
)
def test_bad_settings(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        defenses.create("sentinet", **config)
