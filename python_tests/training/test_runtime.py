from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bbfast.training import Recipe, resolve_device
from bbfast.training.device import Numerics, choose_numerics, cpu_has_bf16, placed
from bbfast.training.program import Program
from bbfast.training.runtime import deterministic, forked_rng, keep_freed_memory, seed_generators
from bbfast.training.step import graph_obstacle

CPU = torch.device("cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU == resolve_device(CPU)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device 'cuda:99' does not exist: this machine shows torch . CUDA device"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match=r"device must be 'auto', 'cpu' or a name like 'cuda:0', got 'tpu0'"):
        resolve_device("tpu0")
    with pytest.raises(TypeError, match=r"device must be 'auto', a name like 'cuda:0' or a torch.device, got None"):
        resolve_device(None)  # type: ignore[arg-type]


def test_numerics_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    net, linear = nn.Sequential(nn.Conv2d(3, 3, 3)), nn.Linear(3, 3)
    for has_units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("bbfast.training.device.cpu_has_bf16", lambda has=has_units: has)
        assert choose_numerics("auto", "auto", net, CPU) == Numerics(expected, True)
    monkeypatch.setattr("bbfast.training.device.cpu_has_bf16", lambda: True)
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.LayerNorm(4))
    assert choose_numerics("auto", "auto", depthwise, CPU).precision == "bf16"
    assert choose_numerics("auto", "auto", depthwise.append(nn.BatchNorm2d(8)), CPU).precision == "fp32"
    assert choose_numerics("fp32", "auto", linear, CPU) == Numerics(torch.float32, False)
    assert choose_numerics("bf16", False, net, CPU) == Numerics(torch.bfloat16, False)
    assert Numerics(torch.bfloat16, True).precision == "bf16"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_units_are_asked_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert cpu_has_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch without the question
    assert cpu_has_bf16() is False


def test_placed_changes_the_layout_for_the_block_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 3))
    weight = net[0].weight
    values = weight.detach().clone()
    with placed(net, CPU, torch.channels_last):
        assert net[0].weight is weight and weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(weight, values)
    assert weight.is_contiguous() and torch.equal(weight, values)


def test_deterministic_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    state = lambda: (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)  # noqa: E731
    before = state()
    with pytest.raises(ZeroDivisionError), deterministic(True):
        assert state() == (True, True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ZeroDivisionError
    assert state() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic(False):
        assert cudnn.benchmark
    assert state() == before


def test_a_users_own_determinism_is_kept() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic(False):  # not asked for, but not switched off either
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with forked_rng(CPU):
        seed_generators(5, CPU)
        first = torch.rand(3)
        seed_generators(5, CPU)
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


MEMORY = """
import resource, torch
from bbfast.training.runtime import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each: above what glibc ever keeps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
with keep_freed_memory(torch.device("cpu")):
    with keep_freed_memory(torch.device("cpu")):
        faults()
    kept = faults()
print(plain, kept)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator only")
def test_freed_memory_is_kept_within_the_block() -> None:
    found = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout.split()
    plain, kept = map(int, found)
    assert kept < plain / 10


def test_keeping_memory_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with keep_freed_memory(CPU):
        assert torch.ones(3).sum() == 3


def test_what_keeps_a_step_from_being_captured() -> None:
    bf16, cuda = Numerics(torch.bfloat16, True), torch.device("cuda", 0)

    class Unsafe(Program):
        graph_safe = False

    assert graph_obstacle(Recipe(), Program(), bf16, cuda) is None
    assert graph_obstacle(Recipe(), Program(), bf16, CPU) == "training runs on cpu"
    assert graph_obstacle(Recipe(compile=True), Program(), bf16, cuda) == "the model is compiled"
    assert "Unsafe does not declare" in str(graph_obstacle(Recipe(), Unsafe(), bf16, cuda))
    assert "fp16" in str(graph_obstacle(Recipe(), Program(), Numerics(torch.float16, True), cuda))
