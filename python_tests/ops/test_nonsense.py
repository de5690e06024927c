"""Every operation driven with nonsense: it computes what the reference computes, or raises an error that names the
operation and the argument. Never a crash, a hang or silent garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from op_cases import F32, FITTING
from torch import Tensor

from bbfast import ops
from bbfast.ops import reference

# What stands in for an argument: other ranks, sizes, dtypes, strides, values, and things that are no tensors.
NONSENSE: list[Any] = [
    *(
        torch.zeros(shape)
        for shape in ((), (0,), (1,), (2,), (3, 4), (3, 4, 6), (2, 3, 4, 6), (0, 3, 4, 6), (2, 0, 4, 6))
    ),
    *(torch.ones(2, 3, 4, 6, dtype=dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)),
    *(F32.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    *(torch.full((2, 3, 4, 6), value) for value in (float("nan"), float("inf"), -1e30, 2.0, -0.5)),
    torch.zeros(1, dtype=torch.uint8).expand(2, 3, 4, 6),  # all elements share one byte
    torch.zeros(1).expand(2, 3, 4, 6),
    torch.arange(200.0).as_strided((2, 3, 4, 6), (7, 5, 3, 1)),  # overlapping memory
    torch.zeros(2, 3, 4, 1 << 20, dtype=torch.uint8)[..., :: 1 << 19],  # huge strides
    F32.permute(3, 2, 1, 0),
    F32.clone().requires_grad_(),
    torch.tensor([-1, 5]),
    torch.tensor([2**62, -(2**62)]),
    torch.tensor([True, False, True]),
    torch.zeros(2, 3, 4, 6, device="meta"),
    torch.zeros(3, 4).to_sparse(),
    *(None, "", "nearest", "nonsense", -1, 0, 1, 7, 1.5, -0.5, float("nan"), float("inf"), True),
    *([], [1.0], [0.0] * 3, [float("nan")] * 3, ["a"] * 3, {}, object(), torch.float32, torch.int32, torch.complex64),
]


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, Exception | None]:
    generator = arguments.get("generator")
    if isinstance(generator, torch.Generator):
        generator.manual_seed(0)
    try:
        return function(**arguments), None
    except Exception as error:
        return None, error


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def test_every_operation_is_driven():
    assert set(FITTING) == set(reference.__all__)


@pytest.mark.parametrize("op", sorted(FITTING))
@settings(max_examples=300)
@given(data=st.data())
def test_nonsense_is_refused_by_name_or_computed_rightly(op, data):
    arguments = dict(FITTING[op])
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    for name in changed:
        arguments[name] = NONSENSE[data.draw(st.integers(0, len(NONSENSE) - 1))]
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor) and value.is_cpu}
    result, error = outcome(getattr(ops, op), arguments)
    for name, value in kept.items():
        torch.testing.assert_close(arguments[name], value, rtol=0, atol=0, equal_nan=True)
    if error is not None:
        assert isinstance(error, (TypeError, ValueError, IndexError)), repr(error)
        assert op in str(error), str(error)
        assert any(name in str(error) for name in arguments), str(error)
        return
    expected, reference_error = outcome(getattr(reference, op), arguments)
    assert reference_error is None, reference_error
    for got, value in zip(tensors(result), tensors(expected), strict=True):
        assert got.shape == value.shape and got.dtype == value.dtype and got.device == value.device
        if got.is_cpu:
            torch.testing.assert_close(
                got, value, rtol=1e-3 if got.dtype == torch.float16 else 1e-5, atol=1e-5, equal_nan=True
            )
