"""Every operation under ``torch.func``: vmap gives what a loop over its slices gives, grad what backward gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from op_cases import FITTING, make_images, uniform
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from bbfast import ops
from bbfast.ops import reference

B = 3
F32 = make_images((2, 3, 4, 6), torch.float32, "contiguous", 0)


def other(value: Tensor) -> Tensor:
    """Other values that fit as well: in the same range, or the same indices in another order."""
    return value * 0.75 if value.is_floating_point() else value.flip(0)


def batched(value: Tensor, dim: int) -> Tensor:
    return torch.stack((value, other(value), other(other(value))), dim)


def tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def check(function: Callable[..., Any], given: dict[str, Any], names: tuple[str, ...], dim: int) -> None:
    """vmap over the arguments ``names``, batched along ``dim``; every other argument is the same for all slices."""
    batches = [batched(given[name], dim) for name in names]

    def call(*slices: Tensor) -> tuple[Tensor, ...]:
        return tensors(function(**{**given, **dict(zip(names, slices, strict=True))}))

    loop = [call(*(b.select(dim, i) for b in batches)) for i in range(B)]
    for got, *expected in zip(vmap(call, dim)(*batches), *loop, strict=True):
        torch.testing.assert_close(got, torch.stack(expected), equal_nan=True)
        assert got.dtype == expected[0].dtype


def test_functions_are_all_of_them():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {"status"}
    assert set(FITTING) == functions == set(reference.__all__)


@pytest.mark.parametrize("op", sorted(FITTING))
def test_the_arguments_fit(op):
    assert len(tensors(getattr(ops, op)(**FITTING[op])))


@pytest.mark.parametrize("module", (ops, reference), ids=("kernel", "reference"))
@pytest.mark.parametrize("op", sorted(FITTING))
def test_vmap_is_a_loop(op, module):
    given = FITTING[op]
    names = [name for name, value in given.items() if isinstance(value, Tensor)]
    for count in range(1, len(names) + 1):
        for some in combinations(names, count):
            check(getattr(module, op), given, some, 0)
    if names:
        check(getattr(module, op), given, tuple(names), 1)


def test_wanet_grid_has_nothing_to_batch_and_draws_as_vmap_is_told():
    def draw(x: Tensor) -> Tensor:
        return ops.wanet_grid(8, generator=torch.Generator().manual_seed(0)) + x

    same = vmap(draw, randomness="same")(torch.zeros(2))
    torch.testing.assert_close(
        same, ops.wanet_grid(8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    )
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(torch.zeros(2))


STEPS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "channel_stats": lambda state, x, i: ops.channel_stats(x, i, 3, state),
    "class_moments": lambda state, x, i: ops.class_moments(x, i, 3, state),
    "topk_update": lambda state, x, i: ops.topk_update(state, x, i, 2),
}


@pytest.mark.parametrize("op", sorted(STEPS))
def test_vmap_goes_on_from_a_batch_of_states(op):
    step = STEPS[op]
    x = torch.randn(B, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    i = torch.randint(0, 3, (B, 2, 6), generator=torch.Generator().manual_seed(1))
    state = vmap(lambda a, b: step(None, a, b))(x[:, 0], i[:, 0])
    assert type(state).__name__ in ("ChannelStats", "Moments", "TopK")
    got = vmap(step)(state, x[:, 1], i[:, 1])
    for b in range(B):
        expected = step(step(None, x[b, 0], i[b, 0]), x[b, 1], i[b, 1])
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a[b], e, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
@pytest.mark.parametrize("op", ("add", "amplitude_mix", "patch", "reflect", "warp"))
def test_vmap_of_a_vmap_over_other_dimensions_and_over_none(op, layout):
    given = {**FITTING[op], "images": make_images((2, 3, 4, 6), torch.float32, layout, 0), "where": None}
    second = next(n for n in ("delta", "trigger", "pattern", "reflection", "grid") if n in given)
    given[second] = uniform(FITTING[op][second].shape, torch.float32, 1)

    def call(x: Tensor, y: Tensor) -> Tensor:
        return getattr(ops, op)(**{**given, "images": x, second: y})

    x, y = batched(given["images"], 4), batched(given[second], 1)
    got = vmap(vmap(call, (None, 1)), (4, None))(x, y)
    expected = [[call(x[..., i], y.select(1, j)) for j in range(B)] for i in range(B)]
    torch.testing.assert_close(got, torch.stack([torch.stack(row) for row in expected]))
    assert vmap(call, (4, None))(x[..., :0], given[second]).shape == (0, 2, 3, 4, 6)
    assert vmap(call, (None, 1))(given["images"], y[:, :0]).shape == (0, 2, 3, 4, 6)


def test_vmap_over_an_empty_dimension_of_what_is_plain_torch():
    assert vmap(ops.dct2)(torch.zeros(0, 2, 4, 6)).shape == (0, 2, 4, 6)
    assert vmap(lambda a: ops.idct2(a, 2))(torch.zeros(0, 2, 4, 6)).shape == (0, 2, 4, 6)
    assert vmap(ops.channel_lipschitz)(torch.zeros(0, 5, 3, 2)).shape == (0, 5)


@pytest.mark.filterwarnings("error")
def test_vmap_warns_of_nothing_and_its_errors_are_the_operation_s(capfd):
    index = torch.tensor([[0, 1], [1, 7]])
    with pytest.raises(IndexError, match=r"gather_augment: index must lie in 0\.\.1, got "):
        vmap(lambda i: ops.gather_augment(FITTING["gather_augment"]["images"], i))(index)
    with pytest.raises(ValueError, match=r"add: delta must be \[3, 4, 6\]"):
        vmap(ops.add)(F32[None], F32[None, 0, 0])
    vmap(ops.softmax_entropy)(torch.zeros(2, 3, 4))
    assert "batching rule" not in capfd.readouterr().err


DIFFERENTIABLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: ops.add(x, y - 0.5),
    "amplitude_mix": lambda x, y: ops.amplitude_mix(x, y, 0.3, 0.3),
    "blend": lambda x, y: ops.blend(x, y, 0.3) + ops.blend(x, y, x[0, 0]),
    "dct2": lambda x, y: ops.dct2(x * y),
    "idct2": lambda x, y: ops.idct2(x * y),
    "patch": lambda x, y: ops.patch(x, y, y[:1]),
    "reflect": lambda x, y: ops.reflect(x, y, "ghost", offset=(1, 2)),
    "sinusoid": lambda x, y: ops.sinusoid(x) * y,
    "softmax_entropy": lambda x, y: ops.softmax_entropy(x.flatten(1) * y.flatten()),
    "spectral_add": lambda x, y: ops.spectral_add(x, [(1, 1)], 30.0, window=2) * y,
    "warp": lambda x, y: ops.warp(x, torch.stack((y[0], y[1]), -1) - 0.5),
}


@pytest.mark.parametrize("op", sorted(DIFFERENTIABLE))
def test_grad_jvp_and_gradients_inside_vmap(op):
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return DIFFERENTIABLE[op](x, y).square().sum()

    x, y = uniform((B, 2, 3, 4, 6), torch.float64, 0, 0.1, 0.9), uniform((B, 3, 4, 6), torch.float64, 1, 0.1, 0.9)
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    sum(loss(a, b) for a, b in zip(*leaves, strict=True)).backward()  # type: ignore[union-attr]
    expected = [leaf.grad for leaf in leaves]
    # One gradient for each sample, and the gradient of all samples' sum.
    torch.testing.assert_close(list(vmap(grad(loss, (0, 1)))(x, y)), expected)
    torch.testing.assert_close(list(grad(lambda a, b: vmap(loss)(a, b).sum(), (0, 1))(x, y)), expected)
    slope = jvp(lambda a, b: vmap(loss)(a, b).sum(), (x, y), (x, y))[1]
    torch.testing.assert_close(slope, (expected[0] * x).sum() + (expected[1] * y).sum())
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x[0], x[0]), y[0])
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, (expected[0][0] * x[0]).sum())
