"""What holds for every registered operation; a new one without a sample here fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_cases import DEVICES, make_images, make_where, uniform

from bbfast import ops
from bbfast.ops import reference

pytestmark = pytest.mark.skipif(not ops.status().cpu, reason=f"compiled kernels not in use: {ops.status().reason}")


def registered() -> list[str]:
    """Names of all operations of torch.ops.bbfast."""
    return sorted(
        name.removeprefix("bbfast::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("bbfast::")
    )


def samples(op: str, device: str) -> Iterator[tuple[object, ...]]:
    """Arguments of the raw operation ``op``: with and without gradients, several dtypes and layouts."""
    yield from SAMPLES[op](device)


def _float_images(device: str) -> Iterator[torch.Tensor]:
    for dtype, layout in ((torch.float32, "contiguous"), (torch.float64, "channels_last"), (torch.bfloat16, "sliced")):
        yield make_images((3, 3, 5, 4), dtype, layout, 0, device).requires_grad_()


def _bytes(device: str) -> torch.Tensor:
    return make_images((3, 3, 5, 4), torch.uint8, "channels_last", 0, device)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _patch(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for x in _float_images(device):
        pattern = make_images((1, 3, 5, 4), x.dtype, "contiguous", 1, device).requires_grad_()
        yield x, pattern, uniform((1, 1, 5, 4), _wide(x), 2).to(device).requires_grad_(), where
    x = _bytes(device)
    yield x, x[:1], uniform((3, 3, 5, 4), torch.float32, 2).to(device), None


def _blend(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for x in _float_images(device):
        pattern = make_images((3, 3, 5, 4), x.dtype, "contiguous", 1, device).requires_grad_()
        yield x, pattern, 0.3, None, where, False
        yield x, pattern, 0.0, uniform((1, 1, 5, 4), _wide(x), 2).to(device).requires_grad_(), None, False
    yield _bytes(device), _bytes(device)[:1], 0.2, None, where, True


def _add(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for x in _float_images(device):
        yield x, uniform((3, 3, 5, 4), _wide(x), 2, -0.5, 0.5).to(device).requires_grad_(), where, False
        yield x, uniform((4,), _wide(x), 2, -0.5, 0.5).to(device).requires_grad_(), None, False
    yield _bytes(device), uniform((1, 3, 5, 4), torch.float32, 2, -50, 50).to(device), where, False
    yield _bytes(device), uniform((4,), torch.float64, 2, -50, 50).to(device), None, True


def _warp(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for x in _float_images(device):
        yield x, uniform((1, 5, 4, 2), _wide(x), 2, -1.1, 1.1).to(device).requires_grad_(), where, False
    yield _bytes(device), uniform((3, 5, 4, 2), torch.float32, 2, -1.1, 1.1).to(device), None, True


def _gather_augment(device: str) -> Iterator[tuple[object, ...]]:
    x, index = _bytes(device), torch.tensor([2, 0, 1, 1], device=device)
    offset, flip = torch.tensor([[0, 4], [1, 1], [2, 2], [4, 0]], device=device), make_where("some", 4, 0, device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield x, index, offset, flip, 2, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], dtype, True
    yield x, index, None, None, 0, [], [], torch.uint8, False


def _class_moments(device: str) -> Iterator[tuple[object, ...]]:
    labels = torch.tensor([0, 1, 1, 3, 0], device=device)
    state = ops.class_moments(torch.ones(5, 3, device=device), labels, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        yield uniform((5, 3), dtype, 0).to(device), labels, 4, None, None, None
        yield uniform((5, 3), dtype, 0).to(device), labels, 4, *state


def _spectral_add(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for x in _float_images(device):
        yield x, uniform((5, 2), _wide(x), 2).to(device), [1.0, 0.0, -0.5], False, 0, where
    for ycrcb in (False, True):
        yield _bytes(device), uniform((1, 4), torch.float32, 2, -50, 50).to(device), [0.0, 1.0, 1.0], ycrcb, 2, where


def _channel_stats(device: str) -> Iterator[tuple[object, ...]]:
    labels = torch.tensor([0, 2, 2], device=device)
    for x in _float_images(device):
        plain = x.detach()
        count, values = torch.ops.bbfast.channel_stats(plain, labels, 4, None, None)
        yield plain, labels, 4, count, values
        yield plain.flatten(2), None, 1, None, None
        yield plain.flatten(1), None, 1, None, None


def _gram_powers(device: str) -> Iterator[tuple[object, ...]]:
    for x in _float_images(device):
        yield x.detach(), [1, 3], False
        yield x.detach(), [2], True


def _overlay_batch(device: str) -> Iterator[tuple[object, ...]]:
    pairs = torch.tensor([[0, 2], [0, 1], [2, 0]], device=device)
    for x in (_bytes(device), next(_float_images(device)).detach()):
        yield x, x.flip(0), pairs, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 1.0, 0.5, True, torch.bfloat16, True
        yield x, x.flip(0), pairs, [], [], 0.6, 0.4, False, torch.float32, False


def _quantize(device: str) -> Iterator[tuple[object, ...]]:
    where = make_where("some", 3, 0, device)
    for dtype, layout in ((torch.float32, "contiguous"), (torch.float64, "channels_last"), (torch.bfloat16, "sliced")):
        yield make_images((3, 3, 5, 4), dtype, layout, 0, device), 8, True, where, False
    yield _bytes(device), 5, False, where, True
    yield _bytes(device), 11, True, None, False


def _softmax_entropy(device: str) -> Iterator[tuple[object, ...]]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        yield (uniform((5, 7), dtype, 0, -3, 3).to(device).requires_grad_(),)


def _topk_update(device: str) -> Iterator[tuple[object, ...]]:
    index = torch.tensor([3, 1, 4, 0, 9], device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = uniform((5, 7), dtype, 0, -3, 3).to(device)
        yield None, None, None, x, index, 3
        yield *torch.ops.bbfast.topk_update(None, None, None, x, index, 8), x, index + 10, 8


SAMPLES: dict[str, Callable[[str], Iterator[tuple[object, ...]]]] = {
    "add": _add,
    "blend": _blend,
    "channel_stats": _channel_stats,
    "class_moments": _class_moments,
    "gather_augment": _gather_augment,
    "gram_powers": _gram_powers,
    "overlay_batch": _overlay_batch,
    "patch": _patch,
    "quantize": _quantize,
    "softmax_entropy": _softmax_entropy,
    "spectral_add": _spectral_add,
    "topk_update": _topk_update,
    "warp": _warp,
}


def test_every_operation_has_a_sample_a_wrapper_and_a_reference():
    assert registered() == sorted(SAMPLES)
    assert set(registered()) <= set(reference.__all__)
    assert set(registered()) <= set(ops.__all__)
    assert set(registered()) == ops.status().kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", registered())
def test_opcheck(op, device):
    for arguments in samples(op, device):
        torch.library.opcheck(getattr(torch.ops.bbfast, op).default, arguments)


NO_GRADIENT = (
    "channel_stats",
    "class_moments",
    "gather_augment",
    "gram_powers",
    "overlay_batch",
    "quantize",
    "topk_update",
)
# Every wrapper once, as a user would call it inside a compiled function.
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda x, w: ops.add(x, x[0] - 0.5, w) + ops.sinusoid(x, 20.0, 6, w),
    "patch": lambda x, w: ops.patch(x, x[0], torch.ones(5, 4, device=x.device) * 0.5, w),
    "blend": lambda x, w: ops.blend(x, x.flip(0), 0.2, w) + ops.blend(x, x[0], x.mean((1, 2, 3))),
    "warp": lambda x, w: ops.warp(x, x[:1, :2].permute(0, 2, 3, 1)[0], w),
    "gather_augment": lambda x, w: ops.gather_augment(
        (x.detach() * 255).to(torch.uint8), torch.arange(3, device=x.device), flip=w, mean=[0.5] * 3, std=[0.2] * 3
    ),
    "class_moments": lambda x, w: ops.class_moments(x.flatten(1), w.long(), 2).scatter,
    "channel_stats": lambda x, w: ops.channel_stats(x, w.long(), 2, ops.channel_stats(x, w.long(), 2)).var,
    "gram_powers": lambda x, w: ops.gram_powers(x, (1, 2, 5)) + ops.gram_powers(x.flatten(2), (1, 2, 5), compat=True),
    "overlay_batch": lambda x, w: ops.overlay_batch(
        x, x.flip(0), torch.stack((w.long(), w.long() + 1), 1), mean=[0.5] * 3, std=[0.2] * 3, alpha=0.5
    ),
    "quantize": lambda x, w: ops.quantize(x, 4, False, w) + ops.quantize(x, 4, True, w),
    "softmax_entropy": lambda x, w: ops.softmax_entropy(x.flatten(1)),
    "spectral_add": lambda x, w: (
        ops.spectral_add(x, [(0, 0)], 30, window=1, where=w)
        + ops.spectral_add(x, [(4, 3)], 60, window=None, color="ycrcb")
    ),
    "topk_update": lambda x, w: (
        ops.topk_update(ops.topk_update(None, x.flatten(1), w.long(), 4), x.flatten(1) + 1, w.long() + 5, 4).values
    ),
}


@pytest.mark.parametrize("op", registered())
def test_compiles_as_one_graph(op):
    torch._dynamo.reset()
    x, where = make_images((3, 3, 5, 4), torch.float32, "contiguous", 0), make_where("some", 3, 0)
    call = CALLS[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, where), call(x, where), rtol=0, atol=0)
    if op in NO_GRADIENT:
        return
    gradients = []
    for function in (call, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf, where).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_inductor_compiles_all_of_them_as_one_graph():
    torch._dynamo.reset()
    x, where = make_images((3, 3, 5, 4), torch.float32, "contiguous", 0), make_where("some", 3, 0)

    def everything(x: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
        return [call(x, where) for call in CALLS.values()]

    for got, expected in zip(torch.compile(everything, fullgraph=True)(x, where), everything(x, where), strict=True):
        torch.testing.assert_close(got, expected)


def test_bad_values_inside_a_compiled_function_raise_the_same_error():
    torch._dynamo.reset()
    take = torch.compile(lambda x, i: ops.gather_augment(x, i), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"gather_augment: index must lie in 0\.\.1, got 7"):
        take(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([7]))


@pytest.mark.parametrize("op", registered())
def test_the_number_of_threads_does_not_change_a_bit(op):
    g = torch.Generator().manual_seed(0)
    x = make_images((96, 3, 33, 32), torch.uint8, "contiguous", 0)
    f = x.float() / 255
    runs: dict[str, Callable[[], object]] = {
        "add": lambda: (ops.add(x, 90 * f[0] - 45), ops.add(x, 90 * f - 45), ops.add(f, f[0] - 0.5)),
        "patch": lambda: (ops.patch(x, x[0], f[0, 0]), ops.patch(f, f[0], f[0, 0])),
        "blend": lambda: (ops.blend(x, x[0], 0.2), ops.blend(f, f[0], f[:, 0, 0, 0])),
        "warp": lambda: (ops.warp(x, f[:, :2].permute(0, 2, 3, 1)), ops.warp(f, f[0, :2].permute(1, 2, 0))),
        "gather_augment": lambda: ops.gather_augment(
            x, torch.arange(96), offset=torch.full((96, 2), 3), padding=4, channels_last=True
        ),
        "class_moments": lambda: ops.class_moments(f.flatten(1)[:, :150], torch.randint(0, 7, (96,), generator=g), 7),
        "channel_stats": lambda: [
            ops.channel_stats(a, labels, None if labels is None else 7)
            for a in (
                f,
                f.contiguous(memory_format=torch.channels_last),
                f[:, :, :7, :7],
                f.flatten(2).mT,
                f.flatten(1),
            )
            for labels in (None, torch.randint(0, 7, (96,), generator=g))
        ],
        "gram_powers": lambda: (ops.gram_powers(f), ops.gram_powers(f.flatten(1, 2)[:9].double(), (2, 7), compat=True)),
        "overlay_batch": lambda: [
            ops.overlay_batch(
                a, a, torch.randint(0, 96, (300, 2), generator=g), mean=[0.5] * 3, std=[0.2] * 3, channels_last=last
            )
            for a in (x, f)
            for last in (False, True)
        ],
        "quantize": lambda: (ops.quantize(x), ops.quantize(x, 11), ops.quantize(x, 8, True), ops.quantize(f, 8, True)),
        "softmax_entropy": lambda: [ops.softmax_entropy(torch.randn(5001, k, generator=g)) for k in (10, 300)],
        "spectral_add": lambda: [
            ops.spectral_add(images, [(7, 5)], 60, window=None, color=color)
            for images in (x, f, x.contiguous(memory_format=torch.channels_last))
            for color in ("yuv", "ycrcb")
        ],
        "topk_update": lambda: ops.topk_update(None, f.flatten(1)[:, :999].round(decimals=1), torch.arange(96), 20),
    }
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            g.manual_seed(0)
            results.append(runs[op]())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", registered())
def test_the_operation_itself_refuses_what_does_not_fit(op):
    """The registered operator checks shapes on its own: it never relies on its wrapper to stay inside its memory."""
    x, f = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)
    i, ii = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    wrong: dict[str, list[tuple[object, ...]]] = {
        "add": [
            (f[0], f[:1], None, False),
            (f, f[0], None, False),
            (f, f[:1, :1], None, False),
            (f, f[:1, :, :1], None, False),
            (f, f[:1].half(), None, False),
            (x, f[:1], None, True),
            (x, f[:1].double(), None, False),
            (f.int(), f[:1], None, False),
            (f, f[:1], torch.ones(3, dtype=torch.bool), False),
        ],
        "patch": [
            (f[0], f[:1], f[:1], None),
            (f, f[:1, :2], f[:1], None),
            (f, f[:1], f[:1, :, :3], None),
            (f, f[:1], f[:1].double(), None),
            (f, f[:1].half(), f[:1], None),
            (f.int(), f[:1].int(), f[:1], None),
            (f, f[:1], f[:1], torch.ones(3, dtype=torch.bool)),
            (f, f[:1], f[:1], torch.ones(2)),
            (f, f[:1], f[:1] + 2, None),
        ],
        "blend": [
            (f, f[0], 0.5, None, None, False),
            (f, f[:1], 2.0, None, None, False),
            (f, f[:1], 0.5, torch.zeros(3, 1, 1, 1), None, False),
            (f, f[:1], 0.5, torch.zeros(1, 1, 4, 3), None, False),
            (f, f[:1], 0.5, torch.zeros(2, 1, 1, 1, dtype=torch.float64), None, False),
            (x, x[:1], 0.5, torch.zeros(2, 1, 1, 1), None, True),
        ],
        "warp": [
            (f, torch.zeros(4, 4, 2), None, False),
            (f, torch.zeros(1, 4, 3, 2), None, False),
            (f, torch.zeros(3, 4, 4, 2), None, False),
            (f, torch.zeros(1, 4, 4, 2).double(), None, False),
        ],
        "gather_augment": [
            (f, i, None, None, 0, [], [], torch.float32, False),
            (x, i.int(), None, None, 0, [], [], torch.float32, False),
            (x, i, i, None, 0, [], [], torch.float32, False),
            (x, i, i.view(1, 2), None, 0, [], [], torch.float32, False),
            (x, i, None, torch.ones(3, dtype=torch.bool), 0, [], [], torch.float32, False),
            (x, i, None, None, -1, [], [], torch.float32, False),
            (x, i, None, None, 0, [1.0], [], torch.float32, False),
            (x, i, None, None, 0, [], [], torch.int32, False),
        ],
        "class_moments": [
            (f, i, 2, None, None, None),
            (f[0, 0], i, 2, None, None, None),
            (f[0, 0, :2], i.int(), 2, None, None, None),
            (f[0, 0, :2], i, 0, None, None, None),
            (f[0, 0, :2], i, 2, i, None, None),
            (f[0, 0, :2], i, 2, i, torch.zeros(2, 4), torch.zeros(2, 4, 4)),
            (f[0, 0, :2].int(), i, 2, None, None, None),
        ],
        "channel_stats": [
            (f[0, 0, 0], None, 1, None, None),
            (f[None], None, 1, None, None),
            (f, i.int(), 2, None, None),
            (f, i[:1], 2, None, None),
            (f, i, 0, None, None),
            (f, None, 2, None, None),
            (f, i, 2, torch.zeros(2, 3, dtype=torch.int64), None),
            (f, i, 2, torch.zeros(2, 4, dtype=torch.int64), torch.zeros(5, 2, 3, dtype=torch.float64)),
            (f, i, 2, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 2, 3)),
            (x, None, 1, None, None),
        ],
        "gram_powers": [(f[0], [1], False), (f, [0], False), (f, [33], True), (f, [1, -2], True), (x, [1], False)],
        "overlay_batch": [
            (*a, 1.0, 1.0, True, t, False)
            for *a, t in (
                (x[0], x, ii, [], [], torch.float32),
                (x, x[:, :2], ii, [], [], torch.float32),
                (x, f, ii, [], [], torch.float32),
                (f, f, ii, [], [], torch.float64),
                (x, x, ii.int(), [], [], torch.float32),
                (x, x, i, [], [], torch.float32),
                (x, x, ii, [0.5], [], torch.float32),
                (x, x, ii, [], [0.5], torch.float32),
                (x, x, ii, [], [], torch.uint8),
            )
        ],
        "quantize": [
            (f[0], 8, False, None, False),
            (f, 1, False, None, False),
            (f, 257, True, None, False),
            (f, -1, True, None, False),
            (f.int(), 8, True, None, False),
            (f, 8, False, torch.ones(3, dtype=torch.bool), False),
            (f, 8, False, torch.ones(2), False),
        ],
        "softmax_entropy": [(f,), (f[0, 0, :, :0],), (x[0, 0],)],
        "spectral_add": [
            (f[0], f[0, 0], [1.0] * 3, False, 0, None),
            (f.int(), f[0, 0], [1.0] * 3, False, 0, None),
            (f, f[0, 0].double(), [1.0] * 3, False, 0, None),
            (f, f[0], [1.0] * 3, False, 0, None),
            (f, f[0, 0, :3], [1.0] * 3, False, 0, None),
            (f, f[0, 0, :, :0], [1.0] * 3, False, 0, None),
            (f, f[0, 0], [1.0] * 2, False, 0, None),
            (f, f[0, 0], [1.0] * 3, True, 0, None),
            (x[:, :2], f[0, 0], [1.0] * 2, True, 0, None),
            (torch.zeros(2, 5, 4, 4), f[0, 0], [1.0] * 5, False, 0, None),
            (x, f[0, 0], [1.0] * 3, False, 3, None),
            (x, f[0, 0], [1.0] * 3, False, 0, torch.ones(2)),
        ],
        "topk_update": [
            (None, None, None, f, i, 1),
            (None, None, None, f[0, 0], i, 1),
            (None, None, None, f[0, 0, :2], i.int(), 1),
            (None, None, None, f[0, 0, :2], i, 0),
            (None, None, None, x[0, 0, :2], i, 1),
            (f[0, 0, :, :2], None, None, f[0, 0, :2], i, 2),
            (f[0, 0, :, :2], ii, i, f[0, 0, :2], i, 2),
            (f[0, 0, :, :2], f[0, 0, :, :2].long(), f[0, 0, 0].long(), f[0, 0, :2], i, 3),
            (f[0, 0].double(), f[0, 0].long(), f[0, 0, 0].long(), f[0, 0, :2], i, 4),
        ],
    }
    for arguments in wrong[op]:
        with pytest.raises(ValueError, match=f"^{op}: "):
            getattr(torch.ops.bbfast, op)(*arguments)
