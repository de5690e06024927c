from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from op_cases import DEVICES, FLOATS, MEAN, STD, golden, layouts, make_images, nchw, seeds, small_network

from bbfast import ops
from bbfast.ops import ChannelStats, reference

KINDS = ("features", "tokens", "maps")
INF = float("inf")


def make_activations(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int):
    """Activations and their values as ``[N, positions, C]`` in float64."""
    n, c, h, w = shape
    maps = (make_images(shape, dtype, layout, seed) - 0.3) * (1 + seed % 7)
    rows = maps.double().permute(0, 2, 3, 1).reshape(n, h * w, c)
    if kind == "maps":
        return maps, rows
    if kind == "tokens":
        return maps.flatten(2).transpose(1, 2), rows
    if h * w == 0:
        return maps.new_zeros(n, c), rows.new_zeros(n, 1, c)
    return maps[:, :, 0, 0], rows[:, :1]


def by_numpy(rows: torch.Tensor, labels: torch.Tensor, classes: int) -> ChannelStats:
    result = []
    for k in range(classes):
        x = rows[labels == k].flatten(0, 1).numpy()
        n, c = x.shape
        result.append(
            (
                np.full(c, n),
                x.mean(0) if n else np.zeros(c),
                x.var(0, ddof=1) if n > 1 else np.zeros(c),
                x.min(0) if n else np.full(c, INF),
                x.max(0) if n else np.full(c, -INF),
                np.abs(x).mean(0) if n else np.zeros(c),
            )
        )
    return ChannelStats(*(torch.from_numpy(np.stack(field)) for field in zip(*result, strict=True)))


def assert_stats(got: ChannelStats, expected: ChannelStats, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert isinstance(got, ChannelStats)
    assert [t.dtype for t in got] == [torch.int64] + [torch.float64] * 5
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@given(
    st.sampled_from(KINDS),
    st.sampled_from((0, 1, 2, 5, 300)),
    st.sampled_from((0, 1, 3, 4, 8, 17, 33)),
    st.sampled_from((0, 1, 3, 7, 8)),
    st.sampled_from((0, 1, 3, 7, 33)),
    st.sampled_from(FLOATS),
    layouts,
    st.sampled_from((None, 1, 4)),
    seeds,
)
def test_agrees_with_numpy_and_the_reference(kind, n, c, h, w, dtype, layout, classes, seed):
    x, rows = make_activations(kind, (n, c, h, w), dtype, layout, seed)
    before = x.clone()
    if classes is None:
        expected = ChannelStats(*(t[0] for t in by_numpy(rows, torch.zeros(n), 1)))
        arguments = (x,)
    else:
        labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
        expected = by_numpy(rows, labels, classes)
        arguments = (x, labels, classes)
    assert_stats(ops.channel_stats(*arguments), expected)
    assert_stats(reference.channel_stats(*arguments), expected)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 300, 5, 5), (70, 3, 16, 16), (2, 5, 224, 224), (3, 512, 2, 2), (5, 1000, 8, 9)])
def test_shapes_that_take_several_tasks(shape):
    for layout in ("contiguous", "channels_last"):
        x, rows = make_activations("maps", shape, torch.float32, layout, 0)
        labels = torch.arange(shape[0]) % 3
        assert_stats(ops.channel_stats(x, labels, 3), by_numpy(rows, labels, 3))


@given(st.sampled_from(KINDS), st.integers(0, 30), st.integers(0, 30), st.sampled_from((None, 3)), seeds)
def test_pieces_give_the_same_as_the_whole(kind, first, second, classes, seed):
    x, rows = make_activations(kind, (first + second, 6, 3, 3), torch.float32, "contiguous", seed)
    labels = torch.randint(0, classes or 1, (first + second,), generator=torch.Generator().manual_seed(seed))
    whole = by_numpy(rows, labels, classes or 1)
    if classes is None:
        whole, labels = ChannelStats(*(t[0] for t in whole)), None
    for module in (ops, reference):
        state = None
        for part in (slice(0, first), slice(first, None)):
            kept = None if state is None else [t.clone() for t in state]
            after = module.channel_stats(x[part], None if labels is None else labels[part], classes, state)
            if kept is not None:
                assert_stats(state, ChannelStats(*kept), 0, 0)
            state = after
        assert_stats(state, whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd_offset"])
def test_devices_agree(device, dtype, kind, layout):
    for shape in ((517, 70, 1, 1), (60, 64, 8, 8), (40, 5, 9, 9), (3, 3, 70, 70)):
        x, rows = make_activations(kind, shape, dtype, layout, 0)
        labels = torch.arange(shape[0]) % 4 % 3  # class 3 has no samples
        half = shape[0] // 2
        there = x.to(device), labels.to(device)
        state = ops.channel_stats(there[0][:half], there[1][:half], 4)
        got = ops.channel_stats(there[0][half:], there[1][half:], 4, state)
        assert_stats(ChannelStats(*(t.cpu() for t in got)), by_numpy(rows, labels, 4))
        alone = ChannelStats(*(t.cpu() for t in ops.channel_stats(there[0])))
        assert_stats(alone, ChannelStats(*(t[0] for t in by_numpy(rows, labels * 0, 1))))


@pytest.mark.parametrize("module", [ops, reference])
def test_known_values(module):
    x = torch.tensor([[1.0, -2.0], [3.0, -2.0], [5.0, -2.0]])
    stats = module.channel_stats(x)
    assert stats.count.tolist() == [3, 3]
    assert stats.mean.tolist() == [3, -2]
    assert stats.var.tolist() == [4, 0]
    assert stats.biased_var.tolist() == [8 / 3, 0]
    assert stats.min.tolist() == [1, -2]
    assert stats.max.tolist() == [5, -2]
    assert stats.abs_mean.tolist() == [3, 2]


@pytest.mark.parametrize("module", [ops, reference])
def test_both_variances_are_those_of_torch(module):
    x = torch.randn(40, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    stats = module.channel_stats(x)
    torch.testing.assert_close(stats.var, x.double().var((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.biased_var, x.double().var((0, 2, 3), correction=0), rtol=1e-12, atol=0)
    assert module.channel_stats(x[:0]).biased_var.tolist() == [0] * 5


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("shape", [(300, 4, 1, 1), (300, 4, 3, 3), (30, 4, 20, 20)])
def test_values_far_from_zero_do_not_cancel(module, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = module.channel_stats(x + 1e8)
    # 1e8 leaves about 1e-8 of absolute precision in the input itself.
    torch.testing.assert_close(far.var, module.channel_stats(x).var, rtol=1e-6, atol=0)
    outlier = x.clone()
    outlier[0] = 1e9
    expected = outlier.var((0, 2, 3))
    torch.testing.assert_close(module.channel_stats(outlier).var, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("shape", [(60, 3, 1, 1), (60, 3, 3, 3), (60, 3, 9, 9)])
@pytest.mark.parametrize("place", [0, 59])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nan_and_infinity(module, shape, place, layout):
    x = torch.ones(shape).contiguous(memory_format=layout)
    x[place, 1, 0, 0] = float("nan")
    x[place, 2, 0, 0] = -INF
    for stats in (module.channel_stats(x), module.channel_stats(x[30:], state=module.channel_stats(x[:30]))):
        assert stats.count.tolist() == [x[:, 0].numel()] * 3
        assert stats.mean.tolist()[::2] == [1, -INF]
        assert stats.var.isnan().tolist() == [False, True, True]
        assert stats.min.tolist()[::2] == [1, -INF]
        assert stats.max.tolist()[::2] == [1, 1]
        assert stats.abs_mean.tolist()[::2] == [1, INF]
        for name in ("mean", "min", "max", "abs_mean"):
            assert getattr(stats, name)[1].isnan(), name
    parts = module.channel_stats(x, torch.arange(60) // 30, 2)
    clean = 1 - place // 59
    assert parts.max[clean].tolist() == [1, 1, 1]
    assert parts.mean[1 - clean].isnan().tolist() == [False, True, False]


def test_golden_tac():
    """Trigger-activation change: the mean over images of what the trigger changes in a channel, summed over positions;
    and the feature maps' own sums, image by image."""
    data = golden("tac")
    net = small_network(data)
    maps = {"images": {}, "images_bd": {}}
    with torch.no_grad():
        for name, found in maps.items():
            x = (nchw(data[name]) / 255 - MEAN) / STD
            for place, layer in enumerate(net):
                x = found[place] = layer(x)
    for place in (0, 1, 3, 4, 8):
        clean, triggered = (found[place] for found in maps.values())
        change = ops.channel_stats(
            (triggered - clean).contiguous(**({"memory_format": torch.channels_last} if clean.dim() == 4 else {}))
        )
        total = change.abs_mean * (change.count / 20)
        torch.testing.assert_close(total.float(), torch.from_numpy(data[f"tac_{place}"]), rtol=1e-4, atol=0)
        if place != 8:
            stats = ops.channel_stats(triggered, torch.arange(20), 20)
            sums = torch.from_numpy(data[f"feature_bd_sum_{place}"])
            torch.testing.assert_close((stats.mean * stats.count).float(), sums, rtol=1e-4, atol=1e-3)


X = torch.zeros(3, 2)
Y = torch.zeros(3, dtype=torch.int64)
S = ops.channel_stats(X, Y, 2)


@pytest.mark.parametrize("function", [ops.channel_stats, reference.channel_stats])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.int(),), TypeError, "activations must be a floating tensor, got int32"),
        ((None,), TypeError, "activations must be a floating tensor, got NoneType"),
        ((X[0],), ValueError, r"activations must be \[N, C\], \[N, T, C\] or \[N, C, H, W\], got float32 \[2\]"),
        ((X[None, None, None],), ValueError, r"activations must be \[N, C\]"),
        ((X, None, 2), ValueError, "num_classes needs labels, got 2 without"),
        ((X, Y), ValueError, "num_classes must be a positive integer, got None"),
        ((X, Y, 0), ValueError, "num_classes must be a positive integer, got 0"),
        ((X, Y, True), ValueError, "num_classes must be a positive integer, got True"),
        ((X, Y.int(), 2), TypeError, r"labels must be a int64 tensor \[3\], got int32"),
        ((X, Y[:2], 2), ValueError, r"labels must have shape \[3\], got int64 \[2\]"),
        ((X, Y + 2, 2), IndexError, "labels must lie in 0..1, got 2"),
        ((X, Y - 1, 2), IndexError, "labels must lie in 0..1, got -1"),
        ((X, Y.to("meta"), 2), ValueError, "labels must be on cpu .* on meta"),
        ((X, Y, 3, S), ValueError, r"state.count must be \[3, 2\], got int64 \[2, 2\]"),
        ((X, None, None, S), ValueError, r"state.count must be \[2\], got int64 \[2, 2\]"),
        ((X, Y, 2, S._replace(mean=S.mean.float())), TypeError, "state.mean must be a float64 tensor, got float32"),
        ((X, Y, 2, S._replace(var=S.var.to("meta"))), ValueError, "state.var must be on cpu"),
        ((X, Y, 2, [1, 2]), TypeError, "state must be a ChannelStats, got list"),
    ],
)
def test_bad_input_is_named(function, arguments, error, message):
    with pytest.raises(error, match=f"channel_stats: {message}"):
        function(*arguments)
