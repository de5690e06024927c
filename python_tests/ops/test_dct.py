from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from op_cases import (
    DEVICES,
    FLOATS,
    LAYOUTS,
    assert_same,
    batches,
    channels,
    golden,
    layouts,
    make_images,
    seeds,
    sides,
    uniform,
)

from bbfast import ops
from bbfast.ops import reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # Round-off grows with the largest coefficient of a block, which for an image is its mean times its side.
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def by_scipy(x: torch.Tensor, window: int | None, inverse: bool = False) -> torch.Tensor:
    out = x.double().numpy().copy()
    h, w = (x.shape[-2:]) if window is None else (window, window)
    transform = scipy.fft.idctn if inverse else scipy.fft.dctn
    for i in range(0, x.shape[-2], max(h, 1)):
        for j in range(0, x.shape[-1], max(w, 1)):
            block = out[..., i : i + h, j : j + w]
            if block.size:
                out[..., i : i + h, j : j + w] = transform(block, axes=(-2, -1), norm="ortho")
    return torch.from_numpy(out)


@given(batches, channels, sides, sides, st.sampled_from(FLOATS), layouts, st.booleans(), seeds)
def test_agrees_with_scipy(n, c, h, w, dtype, layout, inverse, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    before = x.clone()
    got = (ops.idct2 if inverse else ops.dct2)(x)
    assert got.dtype == dtype
    assert got.is_contiguous()
    close(got, by_scipy(x, None, inverse), dtype)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@given(st.sampled_from((1, 2, 3, 8, 33)), st.integers(0, 3), st.integers(0, 3), st.sampled_from(FLOATS), layouts, seeds)
def test_blocks_agree_with_scipy(window, rows, columns, dtype, layout, seed):
    x = make_images((2, 3, rows * window, columns * window), dtype, layout, seed)
    for inverse, function in ((False, ops.dct2), (True, ops.idct2)):
        close(function(x, window), by_scipy(x, window, inverse), dtype)


@given(st.sampled_from(((4, 6), (5, 4, 6), (2, 0, 4, 6), (2, 1, 3, 4, 6))), st.sampled_from((None, 2)), seeds)
def test_there_and_back_keeps_the_image_and_its_energy(shape, window, seed):
    x = uniform(shape, torch.float64, seed, -1, 1)
    y = ops.dct2(x, window)
    assert y.shape == x.shape
    torch.testing.assert_close(ops.idct2(y, window), x)
    torch.testing.assert_close(ops.dct2(ops.idct2(x, window), window), x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_devices_agree(device, dtype, layout):
    x = make_images((2, 3, 32, 48), dtype, layout, 0, device)
    for window in (None, 16):
        close(ops.dct2(x, window).cpu(), by_scipy(x.cpu(), window), dtype)


def test_values_by_hand():
    # A constant has its energy at (0, 0); [1, -1] is the second basis vector, [1, 0] the sum of both over sqrt 2.
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.dct2(x), torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.dct2(one), torch.full((2, 2), 0.5, dtype=torch.float64))
    assert ops.dct2(torch.full((4, 4), 3.0)).round(decimals=5).tolist() == [[12, 0, 0, 0], *[[0] * 4] * 3]
    torch.testing.assert_close(ops.dct2(x, 1), x)


def test_large_sides_keep_their_digits():
    x = uniform((1, 224, 1000), torch.float64, 0)
    torch.testing.assert_close(ops.dct2(x), by_scipy(x, None), rtol=0, atol=1e-11)


def test_golden_energy_of_ftrojan_stands_at_its_two_positions():
    data = golden("ftrojan")
    change = torch.from_numpy(data["idct_b"]).double() - torch.from_numpy(data["images"]).double()
    spectrum = ops.dct2(change.permute(0, 3, 1, 2), 32)
    expected = torch.zeros(32, 32, dtype=torch.float64)
    expected[15, 15] = expected[31, 31] = 20
    torch.testing.assert_close(spectrum, expected.expand_as(spectrum), rtol=0, atol=1e-4)


@pytest.mark.parametrize("function", [ops.dct2, ops.idct2])
@pytest.mark.parametrize(("shape", "window"), [((2, 3, 5), None), ((4, 6), 2), ((2, 1, 2, 2), None)])
def test_gradients(function, shape, window):
    x = uniform(shape, torch.float64, 0).requires_grad_()
    weight = uniform(shape, torch.float64, 1)
    back = ops.idct2 if function is ops.dct2 else ops.dct2
    (got,) = torch.autograd.grad((function(x, window) * weight).sum(), x)
    torch.testing.assert_close(got, back(weight, window))
    assert torch.autograd.gradcheck(lambda a: function(a, window), x)
    assert torch.autograd.gradgradcheck(lambda a: function(a, window), x)


def test_vmap_and_gradients_inside_it():
    x = uniform((3, 2, 4, 6), torch.float64, 0)
    torch.testing.assert_close(torch.func.vmap(lambda a: ops.dct2(a, 2), 1, 1)(x), ops.dct2(x, 2))
    energy = torch.func.vmap(torch.func.grad(lambda a: ops.dct2(a).square().sum()))
    torch.testing.assert_close(energy(x), 2 * x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.idct2(ops.dct2(x, 4) * 2, 4), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for side in (4, 8, 12):
        x = uniform((2, side, 8), torch.float32, side)
        torch.testing.assert_close(compiled(x), 2 * x)


def test_autocast_does_not_coarsen_it():
    x = uniform((2, 3, 32, 32), torch.float32, 0)
    expected = ops.dct2(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ops.dct2(x), expected)


def test_nan_stays_in_its_block():
    x = torch.zeros(4, 8)
    x[1, 2] = float("nan")
    assert ops.dct2(x, 4).isnan().any(0).tolist() == [True] * 4 + [False] * 4


def test_meta_tensors_have_a_shape():
    assert ops.dct2(torch.empty(2, 8, 4, device="meta"), 4).shape == (2, 8, 4)


@pytest.mark.parametrize("name", ["dct2", "idct2"])
@pytest.mark.parametrize(
    ("x", "window", "error", "message"),
    [
        (
            torch.zeros(2, 4, 4, dtype=torch.uint8),
            None,
            TypeError,
            r"x must be a floating .* \[..., H, W\], got uint8",
        ),
        (torch.zeros(4, 4, dtype=torch.complex64), None, TypeError, r"x must be a floating tensor .* got complex64"),
        (np.zeros((4, 4)), None, TypeError, r"x must be a floating tensor .* got ndarray"),
        (torch.zeros(4), None, ValueError, r"x must have at least two dimensions .* got float32 \[4\]"),
        (torch.zeros(4, 6), 4, ValueError, "window must be positive and divide 4 x 6, got 4"),
        (torch.zeros(4, 4), 8, ValueError, "window must be positive and divide 4 x 4, got 8"),
        (torch.zeros(4, 4), 0, ValueError, "window must be positive and divide 4 x 4, got 0"),
        (torch.zeros(4, 4), -2, ValueError, "window must be positive and divide 4 x 4, got -2"),
        (torch.zeros(4, 4), 2.0, TypeError, "window must be an integer or None, got float 2.0"),
        (torch.zeros(4, 4), True, TypeError, "window must be an integer or None, got bool True"),
    ],
)
def test_bad_input_is_named(name, x, window, error, message):
    for module in (ops, reference):
        with pytest.raises(error, match=f"^{name}: {message}"):
            getattr(module, name)(x, window)
