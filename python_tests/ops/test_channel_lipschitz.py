from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, golden, layouts, make_images, seeds

from bbfast import models, ops
from bbfast.ops import _channel_lipschitz as module_under_test
from bbfast.ops import reference

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def by_numpy(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    kernels = [k.reshape(k.shape[0], -1).numpy() for k in weight.double()]
    norms = [np.linalg.svd(k, compute_uv=False)[0] for k in kernels]
    result = torch.tensor(norms, dtype=torch.float64)
    return result if scale is None else result * scale.double().abs()


@given(
    st.sampled_from((0, 1, 2, 7, 33)),
    st.sampled_from((1, 3, 4, 20)),
    st.sampled_from((1, 2, 3, 7)),
    st.sampled_from((1, 3, 5)),
    st.sampled_from(FLOATS),
    layouts,
    st.booleans(),
    seeds,
)
def test_equals_the_decomposition_of_each_kernel(o, i, h, w, dtype, layout, with_scale, seed):
    weight = make_images((o, i, h, w), dtype, layout, seed) - 0.4
    scale = torch.randn(o, generator=torch.Generator().manual_seed(seed)) if with_scale else None
    kept = weight.clone()
    for module in (ops, reference):
        got = module.channel_lipschitz(weight, scale)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), by_numpy(weight, scale), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-3
        )
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (64, 128, 3, 3), (96, 1, 7, 7), (64, 128, 1, 1), (50, 80), (9, 4, 5)])
def test_layers_of_every_kind(device, shape):
    g = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(shape, generator=g), torch.randn(shape[0], generator=g)
    got = ops.channel_lipschitz(weight.to(device), scale.to(device)).cpu()
    torch.testing.assert_close(got.double(), by_numpy(weight, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("module", [ops, reference])
def test_by_hand(module):
    weight = torch.tensor([[[3.0, 0.0], [0.0, -4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert module.channel_lipschitz(weight, torch.tensor([-0.5, 3.0])).tolist() == pytest.approx([2, 6])
    assert module.channel_lipschitz(torch.tensor([[3.0, 4.0]])).tolist() == pytest.approx([5])
    assert module.channel_lipschitz(torch.zeros(3, 2, 3, 3)).tolist() == [0, 0, 0]
    assert module.channel_lipschitz(torch.zeros(3, 0, 3, 3)).tolist() == [0, 0, 0]
    assert module.channel_lipschitz(torch.zeros(0, 5, 3, 3)).shape == (0,)


def test_the_bound_scales_with_the_factor():
    weight = torch.randn(20, 6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = ops.channel_lipschitz(weight)
    torch.testing.assert_close(ops.channel_lipschitz(weight, torch.full((20,), -100.0)), 100 * plain)
    for size in (1e-200, 1e200):
        torch.testing.assert_close(ops.channel_lipschitz(weight * size), plain * size, rtol=1e-7, atol=0)


def test_pieces_give_the_same_as_the_whole(monkeypatch):
    weight = torch.randn(21, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = ops.channel_lipschitz(weight)
    monkeypatch.setattr(module_under_test, "_PIECE", 100)
    torch.testing.assert_close(ops.channel_lipschitz(weight), whole)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 3, 1, 1)])
def test_nan_and_infinity_stay_in_their_channel(module, shape):
    weight = torch.ones(shape)
    weight[0, 1, 0, 0] = float("nan")
    weight[2, 1, 0, 0] = float("inf")
    scale = torch.tensor([1.0, 1.0, 1.0, float("inf")])
    assert module.channel_lipschitz(weight).isnan().tolist() == [True, False, True, False]
    assert module.channel_lipschitz(weight, scale).isnan().tolist() == [True, False, True, True]


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    weight, scale = torch.randn(8, 5, 3, 3), torch.rand(8)
    compiled = torch.compile(ops.channel_lipschitz, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, scale), ops.channel_lipschitz(weight, scale))


def test_the_same_bits_again():
    weight = torch.randn(40, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.channel_lipschitz(weight), ops.channel_lipschitz(weight))


def test_golden_clp():
    data = {key: torch.from_numpy(v) for key, v in golden("clp").items() if v.dtype.kind == "f"}
    for layer, norm, name in ((0, 1, "bn0"), (3, 4, "bn1")):
        # The reference adds no eps to the variance.
        scale = data[f"small_w/{norm}.weight"] / data[f"small_w/{norm}.running_var"].sqrt()
        got = ops.channel_lipschitz(data[f"small_w/{layer}.weight"], scale)
        torch.testing.assert_close(got, data[f"small_{name}_lips"], rtol=1e-4, atol=0)


def test_golden_clp_prunes_the_same_channels():
    data = golden("clp")
    for layer, norm, name in ((0, 1, "bn0"), (3, 4, "bn1")):
        weight, gamma, var = (
            torch.from_numpy(data[f"small_w/{key}"])
            for key in (f"{layer}.weight", f"{norm}.weight", f"{norm}.running_var")
        )
        bound = ops.channel_lipschitz(weight, gamma / var.sqrt())
        pruned = (bound > bound.mean() + 3 * bound.std()).nonzero().flatten()
        assert pruned.tolist() == data[f"small_{name}_pruned"].tolist()


def test_golden_clp_of_preactresnet18():
    """The reference pairs a BatchNorm with the convolution that stands before it in the list of modules: for the first
    of a block that is the previous block's last one, and its 1 x 1 shortcut where it has one."""
    data = golden("clp")
    torch.manual_seed(0)
    modules = list(models.build("preactresnet18", 10, 32).named_modules())
    convolutions = [module for _, module in modules if isinstance(module, torch.nn.Conv2d)]
    sums = torch.stack([c.weight.detach().double().sum() for c in convolutions])
    torch.testing.assert_close(sums, torch.from_numpy(data["preactresnet18_conv_sums"]), rtol=0, atol=1e-6)
    names = data["preactresnet18_bn_names"].tolist()
    pruned = 0
    for name, module in modules:
        if isinstance(module, torch.nn.Conv2d):
            weight = module.weight
        elif name in names:
            key = f"preactresnet18_bn{names.index(name)}"
            gamma, var = (torch.from_numpy(data[f"{key}_{part}"]) for part in ("weight", "var"))
            bound = ops.channel_lipschitz(weight, gamma / var.sqrt())  # the reference adds no eps
            torch.testing.assert_close(bound, torch.from_numpy(data[f"{key}_lips"]), rtol=1e-4, atol=0)
            over = (bound > bound.mean() + 3 * bound.std()).nonzero().flatten().tolist()
            assert over == data[f"{key}_pruned"].tolist()
            pruned += len(over)
    assert len(names) == 16
    assert pruned == 15


W = torch.zeros(3, 2, 3, 3)


@pytest.mark.parametrize("function", [ops.channel_lipschitz, reference.channel_lipschitz])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W.int(),), TypeError, "weight must be a floating tensor, got int32"),
        ((None,), TypeError, "weight must be a floating tensor, got NoneType"),
        ((W.to_sparse(),), TypeError, "weight must be a floating tensor, got sparse_coo float32"),
        ((W[:, 0, 0, 0],), ValueError, r"weight must be \[C_out, C_in, ...\], got float32 \[3\]"),
        ((W, torch.ones(3).int()), TypeError, r"scale must be a floating tensor \[3\], got int32"),
        ((W, 2.0), TypeError, r"scale must be a floating tensor \[3\], got float 2.0"),
        ((W, torch.ones(2)), ValueError, r"scale must be \[3\], got float32 \[2\]"),
        ((W, torch.ones(3, 1)), ValueError, r"scale must be \[3\], got float32 \[3, 1\]"),
        ((W, torch.ones(3).to("meta")), ValueError, "scale must be on cpu .* on meta"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"channel_lipschitz: {message}"):
        function(*arguments)
