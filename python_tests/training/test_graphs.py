from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bbfast.data.imageset import ImageSet
from bbfast.training import Batch, Program, Recipe, train

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]
GPU = pytest.mark.gpu


def test_graphs_on_a_cpu_are_switched_off_with_a_reason(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="bbfast"):
        result = train(make_net(), make_set(20), recipe.replace(cuda_graphs=True), device="cpu")
    assert "CUDA graphs switched off: training runs on cpu" in caplog.text
    assert len(result.history) == 3


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_training_agrees(make_set: MakeSet, make_net: MakeNet, recipe: Recipe, precision: str) -> None:
    data = make_set(150)  # 9 full batches and one of 6: two shapes
    recipe = recipe.replace(precision=precision, epochs=6)
    plain, captured = make_net(), make_net()
    a = train(plain, data, recipe, device="cuda")
    b = train(captured, data, recipe.replace(cuda_graphs=True), device="cuda")
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for p, q in zip(plain.state_dict().values(), captured.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    losses = [[row["loss"] for row in result.history] for result in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance * 10)


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_that_cannot_be_captured_runs_directly(
    make_set: MakeSet, make_net: MakeNet, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    class ReadsOnHost(Program):
        graph_safe = True  # a false claim

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
            value, logits = super().loss(model, batch)
            return value * (1.0 if value.item() > 0 else 2.0), logits

    with caplog.at_level(logging.WARNING, logger="bbfast"):
        result = train(
            make_net(), make_set(150), recipe.replace(cuda_graphs=True), device="cuda", program=ReadsOnHost()
        )
    assert "cannot be captured" in caplog.text
    assert result.history[-1]["loss"] < result.history[0]["loss"]
