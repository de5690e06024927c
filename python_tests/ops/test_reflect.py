from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from op_cases import (
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

MODES = ("ghost", "focus", "out_of_focus")


def ghost(r: np.ndarray, offset: tuple[int, int], first: float) -> np.ndarray:
    """Two copies on a canvas, cut and enlarged, ``[C, H, W]``."""
    dy, dx = offset
    c, h, w = r.shape
    canvas = np.zeros((c, h + dy, w + dx))
    canvas[:, :h, :w] += first * r
    canvas[:, dy:, dx:] += (1 - first) * r
    cut = torch.from_numpy(canvas[None, :, dy:h, dx:w].copy())
    return F.interpolate(cut, size=(h, w), mode="bilinear", align_corners=False)[0].numpy()


def blur(r: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian along both axes, borders mirrored without the edge, ``[C, H, W]``."""
    radius = math.ceil(2 * sigma)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (radius, radius)
        wide = np.pad(r, pad, mode="reflect")
        r = sum(k * np.take(wide, range(i, i + r.shape[axis]), axis) for i, k in enumerate(taps))
    return r


def hill(side: int) -> np.ndarray:
    interval = 7 / side
    bins = np.diff(scipy.stats.norm.cdf(np.linspace(-3 - interval / 2, 3 + interval / 2, side + 1)))
    kernel = np.sqrt(np.outer(bins, bins))
    return kernel / kernel.max()


def steps(x, r, mode, alpha_t, offset, ghost_alpha, sigma, att, window_offset) -> np.ndarray:
    """One image as the specification writes it; the result before it is cut to bytes, in 0..1."""
    t, r = x**2.2, r**2.2
    c, h, w = t.shape
    if mode == "focus":
        layer = (1 - alpha_t) * r
    elif mode == "ghost":
        layer = (1 - alpha_t) * ghost(r, offset, ghost_alpha)
    else:
        r = blur(r, sigma)
        for i in range(c):
            both = r[i] + t[i]
            over = both > 1
            r[i] -= (max(1.0, (both * over).sum() / (over.sum() + 1e-6)) - 1) * att
        y, z = window_offset
        layer = r.clip(0, 1) * hill(max(h, w))[y : y + h, z : z + w] * (1 - alpha_t / 2)
    return ((layer + alpha_t * t) ** (1 / 2.2)).clip(0, 1)


def by_numpy(x: torch.Tensor, r: torch.Tensor, mode: str, parameters: list[dict]) -> torch.Tensor:
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    out = np.empty(x.shape)
    r = r.expand(x.shape)
    for n in range(x.shape[0]):
        if out[n].size:
            out[n] = steps(x[n].double().numpy() / unit, r[n].double().numpy() / unit, mode, **parameters[n])
    return torch.from_numpy(out) * unit


def draw(shape: tuple[int, ...], seed: int, shared: bool) -> list[dict]:
    n, _, h, w = shape
    g = np.random.default_rng(seed)
    side = max(h, w)
    each = [
        {
            "alpha_t": float(np.float32(g.uniform(0, 1))),
            "offset": (int(g.integers(0, max(h, 1))), int(g.integers(0, max(w, 1)))),
            "ghost_alpha": float(np.float32(g.uniform(0, 1))),
            "sigma": float(np.float32(g.uniform(0.3, 5))),
            "att": float(np.float32(g.uniform(1.08, 1.18))),
            "window_offset": (int(g.integers(0, side - h + 1)), int(g.integers(0, side - w + 1))),
        }
        for _ in range(max(n, 1))
    ]
    return [each[0]] * max(n, 1) if shared else each


def arguments(parameters: list[dict], n: int, shared: bool, device: str = "cpu") -> dict:
    if shared:
        return dict(parameters[0])
    result = {}
    for name in parameters[0]:
        value = torch.tensor([p[name] for p in parameters])[:n]
        result[name] = value.to(device)
    return result


def assert_close_in(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    if dtype == torch.uint8:
        sure = (exact - exact.round()).abs() > 2e-2  # the root is steep near black
        torch.testing.assert_close(got[sure].double(), exact.trunc()[sure], rtol=0, atol=0)
        assert got.numel() == 0 or float((got.double() - exact).abs().max()) < 1.03
        return
    slack = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=slack)


@given(
    batches,
    channels,
    sides,
    sides,
    image_dtypes,
    layouts,
    chosen,
    st.sampled_from(MODES),
    st.booleans(),
    seeds,
)
def test_is_the_method_step_by_step(n, c, h, w, dtype, layout, kind, mode, shared, seed):
    x = make_images((n, c, h, w), dtype, layout, seed)
    r = make_images((1 if seed % 2 or n == 0 else n, c, h, w), dtype, layout, seed + 1)
    parameters = draw(x.shape, seed, shared)
    where, before = make_where(kind, n, seed), x.clone()
    r = r[0] if seed % 2 or n == 0 else r
    got = ops.reflect(x, r, mode, **arguments(parameters, n, shared), where=where)
    exact = by_numpy(x, r, mode, parameters)
    if where is not None:
        torch.testing.assert_close(got[~where], x[~where], rtol=0, atol=0)
        exact[~where] = x[~where].double() + (0.5 if dtype == torch.uint8 else 0)
    assert_close_in(got, exact, dtype)
    last = layout == "channels_last" and not x.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    for seed, mode in enumerate(MODES):
        x = make_images((5, 3, 16, 33), dtype, layout, seed, device)
        parameters = draw((5, 3, 16, 33), seed, False)
        got = ops.reflect(x, x.flip(0), mode, **arguments(parameters, 5, False, device)).cpu()
        assert_close_in(got, by_numpy(x.cpu(), x.cpu().flip(0), mode, parameters), dtype)


@pytest.mark.parametrize("case", ["ghost0", "ghost1", "blur0", "blur1"])
def test_golden_refool(case):
    data = golden("refool")
    x, r = nchw(data["images"]), nchw(data["reflections"])[torch.from_numpy(data["reflection_index"])]
    options: dict = {
        "ghost0": {"alpha_t": 0.4, "offset": (3, 5), "ghost_alpha": 0.3},
        "ghost1": {"alpha_t": 0.7, "offset": (8, 4), "ghost_alpha": 0.8},
        "blur0": {"alpha_t": 0.4, "sigma": 1.5},
        "blur1": {"alpha_t": 0.75, "sigma": 4.0},
    }[case]
    if case.startswith("blur"):
        options["att"] = torch.from_numpy(data[f"{case}_att"])
    got = ops.reflect(x, r, "ghost" if case.startswith("ghost") else "out_of_focus", **options)
    difference = (got.int() - nchw(data[f"{case}_blended"]).int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-3
    # The layers by themselves: the image behind nothing, and the ghost before nothing. (How far a blurred reflection is
    # lowered depends on the image behind it.)
    layers = {"transmission": (x, torch.zeros_like(x)), "reflection": (torch.zeros_like(x), r)}
    for name, (behind, before) in layers.items():
        if name == "transmission" or case.startswith("ghost"):
            layer = ops.reflect(behind, before, "ghost" if case.startswith("ghost") else "out_of_focus", **options)
            torch.testing.assert_close(layer.int(), nchw(data[f"{case}_{name}"]).int(), rtol=0, atol=1)


@given(st.sampled_from(MODES), image_dtypes, seeds)
def test_never_darker_than_the_image_behind_the_glass(mode, dtype, seed):
    x = make_images((2, 3, 16, 16), dtype, "contiguous", seed)
    r = make_images((2, 3, 16, 16), dtype, "contiguous", seed + 1)
    least = 0.4 ** (1 / 2.2) * x.double()
    got = ops.reflect(x, r, mode, alpha_t=0.4).double()
    assert bool((got >= least - (2 if dtype == torch.uint8 else 0.01)).all())


def test_by_hand():
    # Half of two equal lights is that light; with nothing reflected, alpha_t = 1 gives the image back.
    x = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    assert ops.reflect(x, x[0], "focus", alpha_t=0.5, rounding="nearest").unique().tolist() == [200]
    assert ops.reflect(x, x[0], "ghost", alpha_t=0.5, offset=(2, 3), rounding="nearest").unique().tolist() == [200]
    images = make_images((2, 3, 8, 8), torch.uint8, "contiguous", 0)
    for mode in MODES:
        clear = ops.reflect(images, torch.zeros(3, 8, 8), mode, alpha_t=1.0, rounding="nearest")
        torch.testing.assert_close(clear, images, rtol=0, atol=0)
    # The light of white at 0.25 is 0.25 ** (1 / 2.2) = 0.5325 of white: 135.8, cut to 135.
    white, black = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert ops.reflect(white, black, "focus", alpha_t=0.25).unique().tolist() == [135]
    assert ops.reflect(white, black, "focus", alpha_t=0.25, rounding="nearest").unique().tolist() == [136]


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_for_all_is_the_same_as_one_for_each(mode):
    x = make_images((3, 3, 16, 12), torch.float64, "contiguous", 0)
    each = {
        "alpha_t": torch.full((3,), 0.4),
        "offset": torch.tensor([[3, 5]] * 3),
        "ghost_alpha": torch.full((3,), 0.25),
        "sigma": torch.full((3,), 1.5),
        "att": torch.full((3,), 1.125),
        "window_offset": torch.tensor([[0, 2]] * 3),
    }
    one = {k: tuple(v[0].tolist()) if v.dim() == 2 else float(v[0]) for k, v in each.items()}
    scalar = {k: v[0] for k, v in each.items()}
    expected = ops.reflect(x, x.flip(0), mode, **one)
    torch.testing.assert_close(ops.reflect(x, x.flip(0), mode, **each), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(ops.reflect(x, x.flip(0), mode, **scalar), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [None, "some"])
def test_gradients(mode, kind):
    where = make_where(kind, 3, 0)
    x = uniform((3, 2, 4, 5), torch.float64, 1, 0.05, 0.5).requires_grad_()
    r = uniform((2, 4, 5), torch.float64, 2, 0.05, 0.5).requires_grad_()
    alpha = uniform((3,), torch.float64, 3, 0.2, 0.8).requires_grad_()
    sigma = uniform((3,), torch.float64, 4, 0.55, 0.95).requires_grad_()

    def call(x, r, alpha, sigma):
        return ops.reflect(x, r, mode, alpha_t=alpha, sigma=sigma, offset=(1, 2), where=where)

    if mode != "out_of_focus":
        sigma = sigma.detach()
    assert torch.autograd.gradcheck(call, (x, r, alpha, sigma))


@pytest.mark.parametrize("mode", MODES)
def test_gradient_at_black_is_finite(mode):
    x, r = torch.zeros(1, 1, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, requires_grad=True)
    ops.reflect(x, r, mode).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(r.grad).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_compiles_as_one_graph(mode, dtype):
    torch._dynamo.reset()
    x, where = make_images((3, 3, 8, 8), dtype, "contiguous", 0), make_where("some", 3, 0)

    def call(x, where, alpha):
        return ops.reflect(x, x[0], mode, alpha_t=alpha, sigma=alpha * 4, where=where)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    alpha = torch.tensor([0.3, 0.5, 0.7])
    torch.testing.assert_close(compiled(x, where, alpha), call(x, where, alpha), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_does_not_coarsen_it(mode):
    x = uniform((2, 3, 16, 16), torch.float32, 0)
    expected = ops.reflect(x, x[0], mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.reflect(x, x[0], mode), expected, rtol=0, atol=0)


X = torch.zeros(2, 3, 8, 6)
R = torch.zeros(3, 8, 6)


@pytest.mark.parametrize("function", [ops.reflect, reference.reflect])
@pytest.mark.parametrize(
    ("positional", "options", "error", "message"),
    [
        ((X.int(), R, "ghost"), {}, TypeError, "images must be a uint8 or floating tensor .* got int32"),
        ((X[0], R, "ghost"), {}, ValueError, r"images must have four dimensions .* got float32 \[3, 8, 6\]"),
        ((X, R[0], "ghost"), {}, ValueError, r"reflection must be \[3, 8, 6\] or \[2, 3, 8, 6\], got float32 \[8, 6\]"),
        ((X, R.to(torch.uint8), "ghost"), {}, TypeError, "reflection must be a floating tensor .* got uint8"),
        ((X, R.to("meta"), "ghost"), {}, ValueError, "reflection must be on cpu .* on meta"),
        ((X, R, "blur"), {}, ValueError, "mode must be one of 'ghost', 'focus', 'out_of_focus', got 'blur'"),
        ((X, R, ["ghost"]), {}, ValueError, r"mode must be one of .* got \['ghost'\]"),
        ((X, R, "focus"), {"alpha_t": 1.5}, ValueError, "alpha_t must lie in 0..1, got 1.5"),
        ((X, R, "focus"), {"alpha_t": torch.full((2,), -1.0)}, ValueError, "alpha_t must lie in 0..1"),
        ((X, R, "focus"), {"alpha_t": torch.zeros(3)}, ValueError, r"alpha_t must be a number or \[2\], got float32"),
        ((X, R, "focus"), {"alpha_t": True}, TypeError, "alpha_t must be a number or a floating tensor .* bool True"),
        ((X, R, "ghost"), {"ghost_alpha": -0.1}, ValueError, "ghost_alpha must lie in 0..1, got -0.1"),
        ((X, R, "ghost"), {"offset": (8, 0)}, ValueError, r"offset must lie in 0..7 and 0..5, got \(8, 0\)"),
        ((X, R, "ghost"), {"offset": (0, -1)}, ValueError, r"offset must lie in 0..7 and 0..5, got \(0, -1\)"),
        ((X, R, "ghost"), {"offset": 3}, TypeError, "offset must be two integers or an integer tensor, got int 3"),
        ((X, R, "ghost"), {"offset": (1.0, 2)}, TypeError, "offset must be two integers or an integer tensor"),
        ((X, R, "ghost"), {"offset": torch.tensor([[0, 0], [0, 6]])}, ValueError, "offset must lie in 0..7 and 0..5"),
        ((X, R, "ghost"), {"offset": torch.zeros(3, 2).int()}, ValueError, r"offset must be two integers or \[2, 2\]"),
        ((X, R, "ghost"), {"offset": torch.zeros(2, 2)}, TypeError, "offset must be two integers or an integer tensor"),
        ((X, R, "out_of_focus"), {"sigma": 0}, ValueError, "sigma must lie in 0.001..10000, got 0"),
        ((X, R, "out_of_focus"), {"sigma": torch.full((2,), 6.0)}, ValueError, "sigma must lie in 0.001..5"),
        ((X, R, "out_of_focus"), {"att": -1.0}, ValueError, "att must lie in 0..10, got -1.0"),
        ((X, R, "out_of_focus"), {"window_offset": (0, 3)}, ValueError, "window_offset must lie in 0..0 and 0..2"),
        ((X, R, "ghost"), {"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'truncate', got 'up'"),
        ((X * float("nan"), R, "ghost"), {}, ValueError, "images must not contain NaN"),
        ((X, R * float("nan"), "ghost"), {}, ValueError, "reflection must not contain NaN"),
        ((X, R, "ghost"), {"where": torch.ones(1, dtype=torch.bool)}, ValueError, r"where must have shape \[2\]"),
    ],
)
def test_bad_input_is_named(function, positional, options, error, message):
    with pytest.raises(error, match=f"^reflect: {message}"):
        function(*positional, **options)
