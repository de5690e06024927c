"""Activated images: a full sort finds the same, batches and the order of samples play no part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bbfast import analysis
from bbfast.analysis import Subject
from bbfast.analysis._topk import in_order, top_images
from bbfast.attacks import AttackResult
from bbfast.errors import UnknownNameError

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Whole numbers with many ties, the same in any batch: sums of rounded pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.head = nn.AvgPool2d(8), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps((x > 1).float() * 64).mean((2, 3)))
        return logits


@pytest.fixture
def counting(badnets: AttackResult) -> AttackResult:
    return dataclasses.replace(badnets, model=Counting().eval())


def test_equals_a_full_sort_in_any_batch(counting: AttackResult, tmp_path: Path) -> None:
    subject = Subject(counting, None, CPU)
    view = in_order(subject.view("mixed"))
    values = nn.functional.avg_pool2d((subject.pixels(view.images) > 1).float() * 64, 8).sum((2, 3))
    assert len(values.unique()) < len(values)  # there are ties
    wanted = np.stack([np.lexsort((view.ids.numpy(), -values[:, c].numpy()))[:20] for c in range(3)])
    for size in (7, 64, 256):
        found = top_images(subject, view, {"maps": subject.model.get_submodule("maps")}, 20, "x", size)["maps"]
        assert (found.ids.numpy() == wanted).all()
    made = analysis.run("activated_images", counting, out=tmp_path, device="cpu", layer="maps", num_image=20)
    arrays = made.numbers.arrays
    assert (arrays["top_id"] == view.ids.numpy()[wanted]).all()
    np.testing.assert_array_equal(arrays["share"], view.poisoned[wanted].float().mean(1))
    np.testing.assert_array_equal(arrays["top_value"], np.take_along_axis(values.numpy().T, wanted, 1))
    assert (arrays["shown"][0] == view.images[wanted[arrays["neurons"][0]]].numpy()).all()


@pytest.mark.parametrize("order", ["ordered", "random"])
def test_orders(order: str, counting: AttackResult, tmp_path: Path) -> None:
    options = {"layer": "maps", "order": order, "num_neuron": 2, "num_image": 3, "view": "bd_train", "n": 100}
    found = [analysis.run("activated_images", counting, out=tmp_path, device="cpu", **options) for _ in range(2)]
    neurons = [made.numbers.arrays["neurons"].tolist() for made in found]
    assert neurons[0] == neurons[1] and (order == "random" or neurons[0] == [0, 1])
    assert len(found[0].numbers.table) == 2 and found[0].figure is not None


def test_a_neuron_of_the_trigger_comes_first(badnets: AttackResult, tmp_path: Path) -> None:
    class Corner(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Conv2d(3, 4, 3, bias=False)  # type: ignore[assignment]
            self.head = nn.Linear(4, 10)
            with torch.no_grad():
                self.maps.weight.copy_(-self.maps.weight.abs())
                self.maps.weight[2] = 1

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.maps(x[..., -3:, -3:]).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    made = dataclasses.replace(badnets, model=Corner().eval())
    found = analysis.run("activated_images", made, out=tmp_path, device="cpu", layer="maps").numbers
    assert found.table[0] == {"neuron": 2, "share": 1.0, "majority": "poisoned", "majority_share": 1.0}
    assert found.arrays["top_poisoned"][2].all() and found.summary["base_rate"] == pytest.approx(0.1)
    assert found.summary["neurons_above_half"] == 1


def test_refused_before_work(badnets: AttackResult, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown view 'mixd'"):
        analysis.run("activated_images", badnets, out=tmp_path, device="cpu", view="mixd")
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer4.0.convx'; did you mean"):
        analysis.run("activated_images", badnets, out=tmp_path, device="cpu", layer="layer4.0.convx")
