from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import (
    assert_same,
    batches,
    channels,
    chosen,
    golden,
    image_dtypes,
    layouts,
    make_images,
    make_where,
    nchw,
    on_every_device_dtype_and_layout,
    seeds,
    sides,
    uniform,
)

from bbfast import ops
from bbfast.ops import reference


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, seeds)
def test_agrees_with_the_reference_to_the_bit(n, c, h, w, dtype, layout, kind, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    amplitude, frequency = ((20.0, 6), (40, 6), (30.5, 8), (-300.0, 0.25), (0, 1), (np.float32(10), -3))[seed % 6]
    where = make_where(kind, n, seed)
    before = x.clone()
    for rounding in ("nearest", "truncate"):
        got = ops.sinusoid(x, amplitude, frequency, where, rounding=rounding)
        assert_same(got, reference.sinusoid(x, amplitude, frequency, where, rounding=rounding))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@given(image_dtypes, seeds)
def test_is_the_addition_of_the_same_wave_to_every_row(dtype, seed):
    x = make_images((2, 3, 5, 33), dtype, "contiguous", seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wave = 20 * torch.sin(2 * math.pi * torch.arange(33, dtype=torch.float64) * 6 / 33)
    wave = wave if dtype == torch.uint8 else wave / 255
    assert_same(ops.sinusoid(x), ops.add(x, wave.to(wide).expand(3, 5, 33)))


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, size in enumerate((7, 16, 33)):
        x = make_images((5, 3, size, size), dtype, layout, seed, device)
        where = make_where("some", 5, seed)
        for rounding in ("nearest", "truncate"):
            got = ops.sinusoid(x, 30.0, 5, where.to(device), rounding=rounding).cpu()
            expected = reference.sinusoid(x.cpu(), 30.0, 5, where, rounding=rounding)
            if device == "cpu":
                assert_same(got, expected)
            else:  # the sine itself may differ in its last bit
                torch.testing.assert_close(got, expected, rtol=1e-6 if dtype != torch.uint8 else 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 224, 224), (2, 1, 1, 5000), (2, 3, 300, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_and_narrow_images(shape, layout):
    x = make_images(shape, torch.uint8, layout, 0)
    assert_same(ops.sinusoid(x), reference.sinusoid(x))


def test_known_values():
    """The row of the attack's specification: delta 40, f 6, 32 columns."""
    row = [0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955]
    out = ops.sinusoid(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8), 40.0, 6)[0, 0, 0]
    assert out[:8].tolist() == [100 + round(v) for v in row]
    assert out[8:16].tolist() == [100 - round(v) for v in row]
    assert ops.sinusoid(torch.full((1, 1, 2, 4), 250, dtype=torch.uint8), 20, 1).flatten().tolist() == [
        250, 255, 250, 230, 250, 255, 250, 230,
    ]  # fmt: skip


def test_float_images_take_the_amplitude_in_levels_and_are_clamped():
    out = ops.sinusoid(torch.tensor([[[[0.5, 0.5, 0.5, 0.05]]]]), 51.0, 1).flatten()
    torch.testing.assert_close(out, torch.tensor([0.5, 0.7, 0.5, 0.0]))


@pytest.mark.parametrize("delta,f", [(40, 6), (20, 6), (30, 8)])
@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
def test_golden_sig_is_exact(delta, f, prefix):
    data = golden("sig")
    out = ops.sinusoid(nchw(data[f"{prefix}images"]), delta, f, rounding="truncate")
    torch.testing.assert_close(out, nchw(data[f"{prefix}out_{delta}_{f}"]), rtol=0, atol=0)
    wave = (ops.sinusoid(torch.full((1, 1, 1, 32), 0.5, dtype=torch.float64), delta, f).flatten() - 0.5) * 255
    torch.testing.assert_close(wave.float(), torch.from_numpy(data[f"pattern_{delta}_{f}"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "some"])
def test_gradients(kind):
    where = make_where(kind, 3, 0)
    x = uniform((3, 2, 4, 5), torch.float64, 1).requires_grad_()
    (got,) = torch.autograd.grad(ops.sinusoid(x, 60, 1, where).square().sum(), x)
    (expected,) = torch.autograd.grad(reference.sinusoid(x, 60, 1, where).square().sum(), x)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda a: ops.sinusoid(a, 60, 1, where), x)
    assert torch.autograd.gradgradcheck(lambda a: ops.sinusoid(a, 60, 1, where), x)


def test_the_number_of_threads_does_not_change_a_bit():
    x = make_images((96, 3, 33, 32), torch.uint8, "contiguous", 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append((ops.sinusoid(x), ops.sinusoid(x.float() / 255)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.sinusoid(x, 30.0), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for dtype in (torch.uint8, torch.float32):
        x = make_images((3, 3, 5, 8), dtype, "contiguous", 0)
        assert_same(compiled(x), ops.sinusoid(x, 30.0))


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize("function", [ops.sinusoid, reference.sinusoid])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(),), TypeError, "sinusoid: images must be a uint8 or floating tensor .* got int32"),
        ((X[0],), ValueError, r"sinusoid: images must have four dimensions .* got float32 \[3, 4, 4\]"),
        ((X * float("nan"),), ValueError, "sinusoid: images must not contain NaN"),
        ((X, "high"), TypeError, "sinusoid: amplitude must be a number, got str 'high'"),
        ((X, torch.tensor(3.0)), TypeError, "sinusoid: amplitude must be a number, got float32"),
        ((X, True), TypeError, "sinusoid: amplitude must be a number, got bool True"),
        ((X, float("inf")), ValueError, "sinusoid: amplitude must be finite, got inf"),
        ((X, 20.0, None), TypeError, "sinusoid: frequency must be a number, got NoneType None"),
        ((X, 20.0, float("nan")), ValueError, "sinusoid: frequency must be finite, got nan"),
        ((X, 20.0, 6, torch.ones(3, dtype=torch.bool)), ValueError, r"sinusoid: where must have shape \[2\]"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)


def test_unknown_rounding_is_named():
    with pytest.raises(ValueError, match="sinusoid: rounding must be 'nearest' or 'truncate', got 'up'"):
        ops.sinusoid(X, rounding="up")


@pytest.mark.parametrize("delta", [torch.zeros(5), torch.zeros(4).double()])
def test_the_operation_itself_refuses_a_row_that_does_not_fit(delta):
    with pytest.raises(ValueError, match=r"^sinusoid: delta must be"):
        torch.ops.bbfast.add(X, delta, None, False)
