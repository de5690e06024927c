"""The Hessian against dense ones, the density's mass, symmetry, and that nothing is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbfast.analysis import Subject
from bbfast.analysis._curvature import hessian_product, lanczos, rademacher
from bbfast.analysis.tools.hessian import Hessian, density
from bbfast.attacks import AttackResult

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 10)).eval()


def dense(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    named = dict(model.named_parameters())
    flat = torch.cat([value.detach().flatten() for value in named.values()]).double()

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([value.numel() for value in named.values()])
        state = {name: part.view(named[name].shape) for name, part in zip(named, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x.double(),)), y)

    return torch.autograd.functional.hessian(loss, flat)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_top_eigenvalues_of_a_tiny_net(badnets: AttackResult) -> None:
    stand_in: Any = SimpleNamespace(model=tiny())
    subject = Subject(badnets, stand_in, CPU)
    found = Hessian(n=40, probes=2, m=79, trace_probes=400, batch=16).measure(subject)
    for side, name in (("clean", "clean_test"), ("bd", "bd_test")):
        view = subject.view(name, 40)
        matrix = dense(subject.model, subject.pixels(view.images), view.given)
        values = torch.linalg.eigvalsh(matrix).flip(0).numpy()
        np.testing.assert_allclose(found.arrays[f"top_{side}"], values[:5], rtol=1e-3)
        row = next(row for row in found.table if row["images"] == side)
        assert row["error_of_lambda_max"] < 1e-3 * values[0] and row["n"] == 40
        assert row["lambda_min"] == pytest.approx(values[-1], rel=1e-2, abs=1e-4 * values[0])
        assert abs(row["trace"] - values.sum()) < 4 * row["trace_standard_error"] + 1e-4
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())


def test_linear_softmax(badnets: AttackResult) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10, bias=False)).eval()
    x, y = torch.randn(30, 3, 32, 32, generator=generator()), torch.arange(30) % 10
    product, size = hessian_product(model, lambda: iter(x.split(7)), y)
    values, _, _ = lanczos(product, rademacher(size, generator(), CPU), 60)
    pooled = F.avg_pool2d(x, 8).flatten(1).double()
    p = (pooled @ model[2].weight.detach().double().T).softmax(1)
    outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("nab,ni,nj->aibj", outer, pooled, pooled).reshape(size, size) / 30
    assert values[-1] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)
    u, v = torch.randn(2, size, generator=generator())
    assert float(u @ product(v)) == pytest.approx(float(v @ product(u)), rel=1e-4)
    torch.testing.assert_close(product(v), (matrix @ v.double()).float(), rtol=1e-3, atol=1e-4)


def test_quadratic() -> None:
    wanted = torch.tensor([-2.0, 0.5, 1.0, 3.0, 700.0])
    values, weights, errors = lanczos(lambda v: wanted * v, torch.ones(5), 100)
    np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-3)
    assert weights.sum() == pytest.approx(1) and errors.max() < 1e-2
    np.testing.assert_allclose(weights, 0.2, atol=1e-3)
    alone, _, _ = lanczos(lambda v: 2 * v, torch.ones(5), 100)
    np.testing.assert_allclose(alone, [2.0], rtol=1e-6)
    points, found = density(values[None], weights[None])
    assert np.trapezoid(found, points) == pytest.approx(1, abs=1e-3)
    near = abs(points - 700) < 5
    assert np.trapezoid(found[near], points[near]) == pytest.approx(0.2, abs=0.01)
    short = np.full((2, 3), np.nan)
    short[0], short[1, 0] = [0.0, 1.0, 2.0], 1.0
    points, found = density(short, np.array([[0.2, 0.3, 0.5], [1.0, 0, 0]]))
    near = abs(points - 1) < 0.1
    assert np.trapezoid(found[near], points[near]) == pytest.approx(0.65, abs=0.01)


def test_batches_do_not_matter_and_buffers_stay(badnets: AttackResult) -> None:
    subject = Subject(badnets, None, CPU)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    view = subject.view("clean_test", 20)
    products = [
        hessian_product(subject.model, lambda size=size: subject.batches(view.images, size), view.given)
        for size in (20, 7)
    ]
    v = rademacher(products[0][1], generator(), CPU)
    first, second = (product(v) for product, _ in products)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())


def test_attention_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    x = torch.randn(4, 5, 8, generator=generator())
    product, size = hessian_product(Net().eval(), lambda: iter([x]), torch.arange(4))
    assert bool(product(rademacher(size, generator(), CPU)).isfinite().all())
