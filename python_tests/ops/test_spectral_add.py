from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import (
    assert_same,
    batches,
    chosen,
    golden,
    image_dtypes,
    layouts,
    make_images,
    make_where,
    nchw,
    on_every_device_dtype_and_layout,
    seeds,
    uniform,
)

from bbfast import ops
from bbfast.ops import _spectral_add as module
from bbfast.ops import _ycrcb, reference

COLORS = ("yuv", "ycrcb", "rgb")
ROUNDINGS = ("nearest", "truncate", "wrap")
DIAGONAL = [(15, 15), (31, 31)]


LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
THERE = {
    "yuv": torch.stack([LUMA, *torch.tensor([[-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]], dtype=torch.float64)]),
    "ycrcb": torch.stack(
        [
            LUMA,
            0.713 * (torch.tensor([1.0, 0, 0], dtype=torch.float64) - LUMA),
            0.564 * (torch.tensor([0, 0, 1.0], dtype=torch.float64) - LUMA),
        ]
    ),
    "rgb": torch.eye(3, dtype=torch.float64),
}


def steps(x: torch.Tensor, positions, magnitude, channels, window, color) -> torch.Tensor:
    """The method as it is written, in float64 and without rounding: convert, transform, add, and all the way back."""
    unit = 255.0 if x.dtype == torch.uint8 else 1.0
    there, back = THERE[color], torch.linalg.inv(THERE[color])
    y = torch.einsum("ij,njhw->nihw", there, x.double() / unit)
    spectrum = ops.dct2(y, window)
    h, w = x.shape[2:] if window is None else (window, window)
    for channel in channels:
        for row, column in positions:
            spectrum[:, channel, row::h, column::w] += magnitude / 255
    return torch.einsum("ij,njhw->nihw", back, ops.idct2(spectrum, window)) * unit


@given(
    batches,
    st.sampled_from((1, 2, 3, 5, 16)),
    st.integers(0, 3),
    st.integers(0, 3),
    image_dtypes,
    layouts,
    chosen,
    st.sampled_from(COLORS),
    st.sampled_from(ROUNDINGS),
    seeds,
)
def test_agrees_with_the_reference_to_the_bit(n, window, rows, columns, dtype, layout, kind, color, rounding, seed):
    x = make_images((n, 3, rows * window, columns * window), dtype, layout, seed)
    where = make_where(kind, n, seed)
    places = [(seed % window, seed // 7 % window), (window - 1, 0)]
    options = {"channels": ((1, 2), (0,), (2, 0, 1))[seed % 3], "window": window, "color": color, "where": where}
    before = x.clone()
    got = ops.spectral_add(x, places, 90.0 - seed % 180, **options, rounding=rounding)
    assert_same(got, reference.spectral_add(x, places, 90.0 - seed % 180, **options, rounding=rounding))
    assert got.numel() == 0 or got.data_ptr() != x.data_ptr()
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    if where is not None:
        torch.testing.assert_close(got[~where], x[~where], rtol=0, atol=0)


@given(st.sampled_from((1, 2, 4, 5)), image_dtypes, layouts, chosen, seeds)
def test_rgb_takes_any_number_of_channels(c, dtype, layout, kind, seed):
    x = make_images((2, c, 6, 9), dtype, layout, seed)
    where = make_where(kind, 2, seed)
    got = ops.spectral_add(x, [(2, 1)], 50, [c - 1], 3, "rgb", where)
    assert_same(got, reference.spectral_add(x, [(2, 1)], 50, [c - 1], 3, "rgb", where))
    torch.testing.assert_close(got[:, : c - 1], x[:, : c - 1], rtol=0, atol=0)


@on_every_device_dtype_and_layout
def test_devices_agree(device, dtype, layout):
    where = make_where("some", 5, 0)
    for seed, (height, width, window) in enumerate(((7, 7, 7), (16, 32, 16), (33, 66, None), (16, 48, 8))):
        x = make_images((5, 3, height, width), dtype, layout, seed, device)
        for color in COLORS:
            for rounding in ROUNDINGS:
                got = ops.spectral_add(
                    x, [(5, 5), (6, 2)], 60, (1, 2), window, color, where.to(device), rounding=rounding
                )
                expected = reference.spectral_add(
                    x.cpu(), [(5, 5), (6, 2)], 60, (1, 2), window, color, where, rounding=rounding
                )
                # The pattern's cosines may differ in the last bit of a float64 between devices.
                slack = 0 if device == "cpu" else {torch.uint8: 1, torch.float64: 1e-12}.get(dtype, 1e-2)
                assert got.device.type == device
                torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=slack)


@given(
    st.sampled_from(((None, 6, 9), (3, 6, 9), (32, 32, 64))),
    st.sampled_from(COLORS),
    st.sampled_from((torch.float32, torch.float64)),
    seeds,
)
def test_is_the_method_step_by_step(sizes, color, dtype, seed):
    window, height, width = sizes
    x = make_images((2, 3, height, width), dtype, "contiguous", seed)
    places, channels = [(2, 1), (0, 0), (2, 1)], (1, 2)
    got = ops.spectral_add(x, places, 70, channels, window, color)
    expected = steps(x, places, 70, channels, window, color)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


@given(st.sampled_from(("yuv", "rgb")), seeds)
def test_bytes_are_the_method_step_by_step_rounded(color, seed):
    x = make_images((2, 3, 32, 32), torch.uint8, "contiguous", seed)
    exact = steps(x, DIAGONAL, 100, (1, 2), 32, color)
    sure = (exact - exact.floor() - 0.5).abs() > 1e-3  # elsewhere float32 may round to the other side
    got = ops.spectral_add(x, DIAGONAL, 100, color=color)
    torch.testing.assert_close(got[sure].double(), exact.round().clamp(0, 255)[sure], rtol=0, atol=0)


def test_tile_of_the_specification():
    black = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    tile = ops.spectral_add(black, DIAGONAL, 255, [0], 32, "rgb")[0, 0]
    expected = [0.03446, -0.02804, -0.03898, 0.01877, 0.04491, -0.01283]
    torch.testing.assert_close(tile[0, :6], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-6)
    for place, value in (((15, 15), 0.09054), ((16, 16), 0.09054), ((31, 31), 0.03446), ((5, 9), 0.02358)):
        assert float(tile[place]) == pytest.approx(value, abs=6e-6)
    assert float(tile.sum()) == pytest.approx(0, abs=1e-12)
    assert float(tile.square().sum()) == pytest.approx(2)
    spectrum = ops.dct2(tile)
    assert spectrum.abs().gt(1e-9).nonzero().tolist() == [list(p) for p in DIAGONAL]


def test_a_constant_by_hand():
    # Coefficient (0, 0) of a 2 x 2 block is half the sum: 20 there is 10 on each pixel.
    x = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    out = ops.spectral_add(x, [(0, 0)], 20, [2], 2, "rgb")
    assert out[0].flatten(1).tolist() == [[100] * 4, [100] * 4, [110] * 4]
    # V + 10 on grey: R + 11.398, G - 5.805, B as it was.
    out = ops.spectral_add(x, [(0, 0)], 20, [2], 2, "yuv")
    assert out[0].flatten(1).tolist() == [[111] * 4, [94] * 4, [100] * 4]
    # Cr + 10 on grey: R + 14.03, G - 7.14.
    out = ops.spectral_add(x, [(0, 0)], 20, [1], 2, "ycrcb")
    assert out[0].flatten(1).tolist() == [[114] * 4, [93] * 4, [100] * 4]


def test_roundings_at_the_ends_of_the_range():
    x = torch.tensor([3, 100, 253], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    for amount, expected in (
        (5.5, {"nearest": [8, 106, 255], "truncate": [8, 105, 255], "wrap": [8, 105, 2]}),
        (-5.5, {"nearest": [0, 94, 248], "truncate": [0, 94, 247], "wrap": [254, 94, 247]}),
    ):
        for rounding, values in expected.items():
            out = ops.spectral_add(x, [(0, 0)], amount, [0, 1, 2], 1, "rgb", rounding=rounding)
            assert out[0, 0, 0].tolist() == values, rounding


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("magnitude", [2**24, -(2.0**24), 1e6])
def test_huge_magnitudes_stay_defined(color, rounding, magnitude):
    x = make_images((2, 3, 4, 4), torch.uint8, "contiguous", 0)
    arguments = (x, [(1, 2)] * 50, magnitude, (1, 2), 4, color)
    assert_same(ops.spectral_add(*arguments, rounding=rounding), reference.spectral_add(*arguments, rounding=rounding))


@pytest.mark.parametrize(("rgb", "ycrcb"), [((200, 100, 50), (124, 182, 86)), ((10, 240, 30), (147, 30, 62))])
def test_ycrcb_of_the_specification(rgb, ycrcb):
    channels = _ycrcb.to_ycrcb(*(torch.tensor([v]) for v in rgb))
    assert tuple(int(c) for c in channels) == ycrcb


def test_ycrcb_there_and_back_of_every_hue():
    axis = torch.arange(0, 256, 3, dtype=torch.uint8)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).view(1, 3, 86, 86 * 86)
    same = ops.spectral_add(x, [(0, 0)], 0.0, window=1, color="ycrcb")
    assert_same(same, reference.spectral_add(x, [(0, 0)], 0.0, window=1, color="ycrcb"))
    assert int((same.int() - x.int()).abs().max()) <= 2
    gray = (x[:, 0] == x[:, 1]) & (x[:, 1] == x[:, 2])
    assert torch.equal(same[:, 0][gray], x[:, 0][gray])


FTROJAN = {
    "a": ("ycrcb", (1, 2), 30.0, DIAGONAL, 32),
    "b": ("rgb", (0, 1, 2), 20.0, DIAGONAL, 32),
    "c": ("ycrcb", (1, 2), 25.0, [(7, 7), (15, 15)], 16),
}


@pytest.mark.parametrize("case", FTROJAN)
@pytest.mark.parametrize("prefix", ["", "gtsrb_"])
def test_golden_ftrojan(case, prefix):
    data = golden("ftrojan")
    color, channels, magnitude, places, window = FTROJAN[case]
    x = nchw(data[f"{prefix}images"])
    plan = module._prepare(x, places, magnitude, channels, window, color, None, "wrap")
    start = torch.stack(_ycrcb.to_ycrcb(*x.int().unbind(1)), 1) if color == "ycrcb" else x
    tile = plan.pattern.repeat(32 // window, 32 // window)
    before_cast = torch.stack([start[:, c].double() + (tile if c in channels else 0) for c in range(3)], 1)
    if not prefix:
        torch.testing.assert_close(before_cast, nchw(data[f"idct_{case}"]).double(), rtol=0, atol=3e-5)
    # The reference's round-off decides where a value is whole, as it is in a channel that was not changed.
    changed = before_cast[:, list(channels)]
    sure = ((changed - changed.round()).abs() > 1e-3).all(1, keepdim=True).expand_as(x)
    got = ops.spectral_add(x, places, magnitude, channels, window, color, rounding="wrap")
    difference = (got.int() - nchw(data[f"{prefix}out_{case}"]).int()).abs()
    assert int(difference[sure].max()) <= (0 if color == "rgb" else 1)
    assert float(sure.float().mean()) > 0.9
    if color == "ycrcb":  # a Y lower by one lowers all three colours by one, if none is at an end
        inner = ((got > 0) & (got < 255)).all(1, keepdim=True).expand_as(x) & sure
        shift = (got.int() - nchw(data[f"{prefix}out_{case}"]).int()).masked_fill(~inner, 0)
        assert torch.equal(shift[:, 0], shift[:, 1])
        assert torch.equal(shift[:, 0], shift[:, 2])


@pytest.mark.parametrize(("case", "magnitude"), [("a", 100), ("b", 50)])
def test_golden_ctrl(case, magnitude):
    data = golden("ctrl")
    x, expected = nchw(data["images"]), torch.from_numpy(data[f"pre_{case}"]).double()
    exact = ops.spectral_add(x.double() / 255, DIAGONAL, magnitude, window=None) * 255
    torch.testing.assert_close(exact, expected, rtol=0, atol=2e-2)
    sure = (expected - expected.round()).abs() > 0.05
    inside = sure & (expected >= 0) & (expected <= 255)
    got, out = ops.spectral_add(x, DIAGONAL, magnitude, rounding="wrap"), nchw(data[f"out_{case}"])
    assert torch.equal(got[sure], out[sure])
    clamped = ops.spectral_add(x, DIAGONAL, magnitude, rounding="truncate")
    assert torch.equal(clamped[inside], out[inside])
    assert int((clamped[~inside & sure].int() % 255).max()) == 0


@pytest.mark.parametrize("prefix", ["a", "b"])
def test_golden_ctrl_of_gtsrb(prefix):
    data = golden("ctrl")
    x, magnitude = nchw(data["gtsrb_images"]), {"a": 100, "b": 50}[prefix]
    exact = ops.spectral_add(x.double() / 255, DIAGONAL, magnitude) * 255
    sure = (exact - exact.round()).abs() > 0.05
    got = ops.spectral_add(x, DIAGONAL, magnitude, rounding="wrap")
    assert torch.equal(got[sure], nchw(data[f"gtsrb_out_{prefix}"])[sure])


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("kind", [None, "some"])
def test_gradients(color, kind):
    where = make_where(kind, 3, 0)
    x = uniform((3, 3, 4, 6), torch.float64, 0).requires_grad_()
    weight = uniform((3, 3, 4, 6), torch.float64, 1)

    def run(function, a):
        return function(a, [(1, 1)], 30, (1, 2), 2, color, where)

    (got,) = torch.autograd.grad((run(ops.spectral_add, x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((run(reference.spectral_add, x) * weight).sum(), x)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda a: run(ops.spectral_add, a), x)
    assert torch.autograd.gradgradcheck(lambda a: run(ops.spectral_add, a), x)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_compiles_as_one_graph(color, dtype):
    torch._dynamo.reset()
    x, where = make_images((3, 3, 8, 8), dtype, "contiguous", 0), make_where("some", 3, 0)

    def call(x, where):
        return ops.spectral_add(x, [(1, 2), (3, 3)], 40, (1, 2), 4, color, where)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, where), call(x, where), rtol=0, atol=0)


def test_nan_and_infinity_in_float_images():
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 3] = float("nan")
    for where in (None, torch.tensor([True, False])):
        for color in COLORS:
            with pytest.raises(ValueError, match="spectral_add: images must not contain NaN"):
                ops.spectral_add(x, [(1, 1)], 30, (1, 2), 4, color, where)
    x[1, 2, 3, 3] = float("inf")
    for color in COLORS:
        assert_same(
            ops.spectral_add(x, [(1, 1)], 30, (1, 2), 4, color),
            reference.spectral_add(x, [(1, 1)], 30, (1, 2), 4, color),
        )


X = torch.zeros(2, 3, 4, 4)
P = [(1, 1)]


@pytest.mark.parametrize("function", [ops.spectral_add, reference.spectral_add])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.int(), P, 30), {}, TypeError, "images must be a uint8 or floating tensor .* got int32"),
        ((X[0], P, 30), {}, ValueError, r"images must have four dimensions .* got float32 \[3, 4, 4\]"),
        (
            (X[:, :1], P, 30),
            {},
            ValueError,
            r"images must be \[N, 3, H, W\] for color 'yuv', got .* \[2, 1, 4",
        ),
        ((X, 3, 30), {}, TypeError, "positions must be a sequence, got int 3"),
        ((X, torch.ones(1, 2), 30), {}, TypeError, "positions must be a sequence, got float32"),
        ((X, [], 30), {}, ValueError, "positions must not be empty"),
        ((X, [1, 1], 30), {}, TypeError, r"positions must be pairs \(row, column\) of integers, got int 1"),
        ((X, [(1, 1, 1)], 30), {}, TypeError, r"positions must be pairs .* got tuple \(1, 1, 1\)"),
        ((X, [(1.0, 1)], 30), {}, TypeError, r"positions must be pairs .* got tuple \(1.0, 1\)"),
        ((X, [(4, 1)], 30), {}, ValueError, r"positions must lie in a block of 4 x 4, got \(4, 1\)"),
        ((X, [(1, -1)], 30), {}, ValueError, r"positions must lie in a block of 4 x 4, got \(1, -1\)"),
        ((X, P, "big"), {}, TypeError, "magnitude must be a number, got str 'big'"),
        ((X, P, True), {}, TypeError, "magnitude must be a number, got bool True"),
        ((X, P, float("nan")), {}, ValueError, r"magnitude must lie in -2\*\*24..2\*\*24, got nan"),
        ((X, P, -float("inf")), {}, ValueError, r"magnitude must lie in -2\*\*24..2\*\*24, got -inf"),
        ((X, P, 30, 1), {}, TypeError, "channels must be a sequence, got int 1"),
        ((X, P, 30, ()), {}, ValueError, "channels must not be empty"),
        ((X, P, 30, (3,)), {}, ValueError, "channels must lie in 0..2, got 3"),
        ((X, P, 30, (-1,)), {}, ValueError, "channels must lie in 0..2, got -1"),
        ((X, P, 30, ("Y",)), {}, TypeError, "channels must be integers, got str 'Y'"),
        ((X, P, 30), {"window": 32}, ValueError, "window must be positive and divide 4 x 4, got 32"),
        ((X, P, 30), {"window": 3}, ValueError, "window must be positive and divide 4 x 4, got 3"),
        ((X, P, 30), {"window": "all"}, TypeError, "window must be an integer or None, got str 'all'"),
        ((X, P, 30), {"color": "hsv"}, ValueError, "color must be one of 'yuv', 'ycrcb', 'rgb', got 'hsv'"),
        ((X, P, 30), {"color": ["yuv"]}, ValueError, r"color must be one of .* got \['yuv'\]"),
        ((X, P, 30), {"rounding": "up"}, ValueError, "rounding must be one of 'nearest', 'truncate', 'wrap', got 'up'"),
        ((X, P, 30), {"where": torch.ones(3, dtype=torch.bool)}, ValueError, r"where must have shape \[2\]"),
        ((X, P, 30), {"where": torch.ones(2)}, TypeError, r"where must be a bool tensor \[2\], got float32"),
        ((X * float("nan"), P, 30), {}, ValueError, "images must not contain NaN"),
    ],
)
def test_bad_input_is_named(function, arguments, options, error, message):
    with pytest.raises(error, match=f"spectral_add: {message}"):
        function(*arguments, **({"window": 4} | options))


def test_positions_may_be_numpy_integers():
    places = np.array([[1, 1], [3, 2]])
    got = ops.spectral_add(X, [tuple(p) for p in places], np.float32(30), (np.int64(1),), 4)
    assert_same(got, ops.spectral_add(X, [(1, 1), (3, 2)], 30, (1,), 4))
