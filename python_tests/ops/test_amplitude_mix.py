from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import (
    batches,
    channels,
    chosen,
    image_dtypes,
    layouts,
    make_images,
    make_where,
    on_every_device_dtype_and_layout,
    seeds,
    sides,
    uniform,
)

from bbfast import ops
from bbfast.ops import reference


def steps(x: np.ndarray, trigger: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """One channel as the paper writes it: amplitude and phase apart, spectrum shifted, a square around its centre."""
    spectrum = np.fft.fft2(x.astype(np.float64))
    amplitude, phase = np.fft.fftshift(np.abs(spectrum)), np.angle(spectrum)
    wanted = np.fft.fftshift(np.abs(np.fft.fft2(trigger.astype(np.float64))))
    h, w = x.shape
    b = math.floor(beta * min(h, w))
    rows, columns = slice(h // 2 - b, h // 2 + b + 1), slice(w // 2 - b, w // 2 + b + 1)
    amplitude[rows, columns] = (1 - alpha) * amplitude[rows, columns] + alpha * wanted[rows, columns]
    return np.real(np.fft.ifft2(np.fft.ifftshift(amplitude) * np.exp(1j * phase)))


def by_numpy(x: torch.Tensor, trigger: torch.Tensor, alpha: torch.Tensor, beta: float) -> torch.Tensor:
    out = np.empty(x.shape)
    trigger = trigger.expand(x.shape)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            if out[n, c].size:
                out[n, c] = steps(x[n, c].double().numpy(), trigger[n, c].double().numpy(), float(alpha[n]), beta)
    return torch.from_numpy(out)


def assert_close_in(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    if dtype != torch.uint8:
        slack = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=slack)
        return
    sure = (exact - exact.floor() - 0.5).abs() > 1e-3
    torch.testing.assert_close(got[sure].double(), exact.round().clamp(0, 255)[sure], rtol=0, atol=0)
    assert (got.double() - exact.clamp(0, 255)).abs().max() <= 0.502 if got.numel() else True


@given(batches, channels, sides, sides, image_dtypes, layouts, chosen, st.sampled_from((0.0, 0.1, 0.34, 0.49)), seeds)
def test_is_the_method_step_by_step(n, c, h, w, dtype, layout, kind, beta, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    trigger = make_images((n, c, h, w), dtype, layout, seed + 1)
    trigger = trigger if seed % 2 and n else make_images((1, c, h, w), dtype, layout, seed + 1)[0]
    weights = uniform((n,), torch.float64, seed)
    alpha = (weights, torch.full((n,), 0.15, dtype=torch.float64))[seed % 2]
    where, before = make_where(kind, n, seed), x.clone()
    got = ops.amplitude_mix(x, trigger, 0.15 if seed % 2 else weights, beta, where)
    exact = by_numpy(x, trigger, alpha, beta)
    if where is not None:
        torch.testing.assert_close(got[~where], x[~where], rtol=0, atol=0)
        exact[~where] = x[~where].double()
    assert_close_in(got, exact, dtype)
    last = layout == "channels_last" and not x.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    where = make_where("some", 5, 0)
    for size in (7, 16, 33):
        x = make_images((5, 3, size, size), dtype, layout, size, device)
        alpha = uniform((5,), torch.float32, 0)
        got = ops.amplitude_mix(x, x[0], alpha.to(device), 0.2, where.to(device)).cpu()
        exact = by_numpy(x.cpu(), x[0].cpu(), alpha, 0.2)
        exact[~where] = x.cpu()[~where].double()
        assert_close_in(got, exact, dtype)


@given(seeds)
def test_phase_stays_and_so_do_amplitudes_outside_the_window(seed):
    x = make_images((2, 3, 32, 32), torch.float64, "contiguous", seed)
    trigger = make_images((1, 3, 32, 32), torch.float64, "contiguous", seed + 1)[0]
    before, after = torch.fft.fft2(x), torch.fft.fft2(ops.amplitude_mix(x, trigger, 0.3, 0.1))
    turn = torch.angle(after * before.conj())
    assert float(turn[(before.abs() > 1e-3) & (after.abs() > 1e-3)].abs().max()) < 1e-9
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[13:20, 13:20] = True  # rows and columns of the shifted spectrum, from the specification
    inside = torch.fft.ifftshift(inside)
    torch.testing.assert_close(after.abs()[..., ~inside], before.abs()[..., ~inside])
    wanted = 0.7 * before.abs() + 0.3 * torch.fft.fft2(trigger).abs()
    torch.testing.assert_close(after.abs()[..., inside], wanted[..., inside])


@given(image_dtypes, seeds)
def test_weight_zero_changes_nothing(dtype, seed):
    x = make_images((2, 3, 12, 9), dtype, "contiguous", seed)
    got = ops.amplitude_mix(x, x.flip(0)[0], 0.0, 0.3)
    torch.testing.assert_close(got, x, rtol=0, atol=0 if dtype == torch.uint8 else 1e-2)


def test_by_hand():
    # beta 0 leaves frequency 0: the mean moves towards the trigger's, the rest stays.
    x = torch.tensor([[[[10, 20], [30, 40]]]], dtype=torch.uint8)
    trigger = torch.full((1, 2, 2), 125, dtype=torch.uint8)
    assert ops.amplitude_mix(x, trigger, 0.5, 0.0).flatten().tolist() == [60, 70, 80, 90]
    # A black image has no amplitude and phase 0: it takes the trigger's brightness.
    black = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert ops.amplitude_mix(black, torch.full((1, 4, 4), 200.0), 0.25, 0.4).unique().tolist() == [50]
    one = torch.full((1, 1, 1, 1), 7, dtype=torch.uint8)
    assert ops.amplitude_mix(one, torch.full((1, 1, 1), 17.0), 0.5, 0.9).item() == 12


@pytest.mark.parametrize("kind", [None, "some"])
@pytest.mark.parametrize("one", [True, False])
def test_gradients(kind, one):
    where = make_where(kind, 3, 0)
    x = uniform((3, 2, 4, 5), torch.float64, 1).requires_grad_()
    trigger = uniform((2, 4, 5) if one else (3, 2, 4, 5), torch.float64, 2).requires_grad_()
    alpha = uniform((3,), torch.float64, 3, 0.1, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: ops.amplitude_mix(*a, 0.3, where), (x, trigger, alpha))
    assert torch.autograd.gradgradcheck(lambda *a: ops.amplitude_mix(*a, 0.3, where), (x, trigger, alpha))


def test_gradient_of_a_black_image_is_finite():
    x, trigger = torch.zeros(1, 1, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, requires_grad=True)
    ops.amplitude_mix(x, trigger, 0.5, 0.3).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(trigger.grad).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_compiles_as_one_graph(dtype):
    torch._dynamo.reset()
    x, where = make_images((3, 3, 8, 8), dtype, "contiguous", 0), make_where("some", 3, 0)

    def call(x, where):
        return ops.amplitude_mix(x, x[0], 0.2, 0.2, where)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, where), call(x, where), rtol=0, atol=0)


X = torch.zeros(2, 3, 4, 4)
T = torch.zeros(3, 4, 4)


@pytest.mark.parametrize("function", [ops.amplitude_mix, reference.amplitude_mix])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(), T, 0.5, 0.1), TypeError, "images must be a uint8 or floating tensor .* got int32"),
        ((X[0], T, 0.5, 0.1), ValueError, r"images must have four dimensions .* got float32 \[3, 4, 4\]"),
        ((X, T.to(torch.uint8), 0.5, 0.1), TypeError, "trigger must be a floating tensor .* got uint8"),
        ((X, T[0], 0.5, 0.1), ValueError, r"trigger must be \[3, 4, 4\] or \[2, 3, 4, 4\], got float32 \[4, 4\]"),
        ((X, T.to("meta"), 0.5, 0.1), ValueError, "trigger must be on cpu .* on meta"),
        ((X, T, 1.5, 0.1), ValueError, "alpha must lie in 0..1, got 1.5"),
        ((X, T, float("nan"), 0.1), ValueError, "alpha must lie in 0..1, got nan"),
        ((X, T, torch.full((2,), -1.0), 0.1), ValueError, "alpha must lie in 0..1"),
        ((X, T, torch.zeros(3), 0.1), ValueError, r"alpha must be a number or \[2\], got float32 \[3\]"),
        ((X, T, torch.zeros(2).int(), 0.1), TypeError, "alpha must be a number or a floating tensor .* got int32"),
        ((X, T, "half", 0.1), TypeError, "alpha must be a number or a floating tensor .* got str 'half'"),
        ((X, T, 0.5, 0.5), ValueError, r"beta must keep 2 \* floor\(beta \* 4\) below 4, got 0.5"),
        ((X, T, 0.5, -0.1), ValueError, "beta must be at least 0 and finite, got -0.1"),
        ((X, T, 0.5, float("inf")), ValueError, "beta must be at least 0 and finite, got inf"),
        ((X, T, 0.5, None), TypeError, "beta must be a number, got NoneType None"),
        ((X * float("nan"), T, 0.5, 0.1), ValueError, "images must not contain NaN"),
        ((X, T * float("nan"), 0.5, 0.1), ValueError, "trigger must not contain NaN"),
        ((X, T, 0.5, 0.1, torch.ones(1, dtype=torch.bool)), ValueError, r"where must have shape \[2\]"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"^amplitude_mix: {message}"):
        function(*arguments)
