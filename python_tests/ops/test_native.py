"""The compiled module: what it says about itself, that importing touches nothing, and life without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bbfast
from bbfast import ops


def run(code: str) -> str:
    """Runs ``code`` in a fresh interpreter with warnings as errors unless it says otherwise; returns what it
    printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not ops.status().cpu, reason=f"compiled kernels not in use: {ops.status().reason}")
def test_build_info():
    from bbfast import _C

    info = _C.build_info()
    assert info["version"] == bbfast.__version__
    assert info["simd"] in info["simd_levels"]
    assert info["kernels"] == sorted(info["kernels"]) == _C.kernels()
    assert {"commit", "compiler", "cuda", "cuda_archs", "built_with_torch"} <= set(info)
    assert (info["cuda"] is None) == (not info["cuda_archs"])


@pytest.mark.skipif(not ops.status().cpu, reason=f"compiled kernels not in use: {ops.status().reason}")
def test_the_compiled_module_can_be_asked_before_torch_is_imported():
    out = run("import bbfast._C as c, sys; print(c.build_info()['version'], 'torch' in sys.modules)")
    assert out.split() == [bbfast.__version__, "False"]


def test_status_says_why_a_kind_of_kernel_is_not_in_use():
    state = ops.status()
    assert (state.reason == "") == (state.cpu and state.cuda)


def test_importing_the_operations_needs_neither_torchvision_nor_the_driver():
    code = """
import sys, warnings
warnings.simplefilter("error")
import bbfast.ops, torch
heavy = {"torchvision", "sklearn", "scipy", "pydantic", "typer", "rich", "yaml", "matplotlib", "jinja2",
         "safetensors", "PIL"}
print(sorted(heavy & set(sys.modules)))
print(torch.cuda.is_initialized())
print(any("libcuda.so" in line for line in open("/proc/self/maps")))
"""
    loaded, initialised, driver = run(code).splitlines()
    assert loaded == "[]"
    assert initialised == "False"
    assert driver == "False"


WITHOUT = """
import sys, warnings
sys.modules["bbfast._C"] = None  # what a missing or broken compiled module amounts to
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bbfast
    import bbfast.ops as ops
    from bbfast.ops import patch
ours = [w for w in caught if "bbfast" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, [str(w.message) for w in caught]
assert "pure PyTorch reference" in str(ours[0].message) and "pip install" in str(ours[0].message)
assert not ops.status().cpu and not ops.status().cuda and "bbfast._C" in ops.status().reason
import torch
x = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
assert torch.equal(patch(x, x[0] + 1, torch.ones(4, 4)), x + 1)
assert torch.equal(ops.blend(x, x[0] + 2, 0.5), x + 1)
assert torch.equal(ops.spectral_add(x, [(0, 0)], 8, (0, 1, 2), 4, "rgb"), x + 2)
warped = ops.warp(x, torch.zeros(4, 4, 2)).flatten(2)
assert torch.equal(warped.amin(2), warped.amax(2))
assert ops.gather_augment(x, torch.tensor([0, 0]), dtype=torch.uint8).shape == (2, 3, 4, 4)
assert ops.class_moments(torch.ones(2, 3), torch.tensor([0, 1]), 2).count.tolist() == [1, 1]
leaf = torch.zeros(1, 4, requires_grad=True)
ops.softmax_entropy(leaf).sum().backward()
for bad, error in ((lambda: ops.patch(x, x[0], torch.ones(4, 4) * 2), ValueError),
                   (lambda: ops.gather_augment(x, torch.tensor([1])), IndexError),
                   (lambda: ops.class_moments(torch.ones(1, 3), torch.tensor([5]), 2), IndexError)):
    try:
        bad()
    except error:
        continue
    raise AssertionError(error)
torch.compile(lambda a: ops.patch(a, a[0], torch.ones(4, 4)), fullgraph=True, backend="eager")(x)
print("fine")
"""


def test_without_the_compiled_module_the_reference_runs_and_one_warning_says_so():
    assert run(WITHOUT).strip() == "fine"


def test_other_devices_run_the_reference():
    x = torch.empty(2, 3, 4, 4, device="meta")
    out = ops.patch(x, x[0], torch.empty(4, 4, device="meta"))
    assert out.shape == x.shape
    assert out.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_kernels_run_on_the_current_stream():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
    mask = torch.ones(32, 32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = ops.patch(x, x[0], mask)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(out, x[:1].expand_as(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_kernels_can_be_captured_in_a_graph():
    x = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, device="cuda")
    index = torch.arange(16, device="cuda")
    ops.gather_augment(x, index, mean=[0.5] * 3, std=[0.2] * 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.gather_augment(x, index, mean=[0.5] * 3, std=[0.2] * 3)
    index += 16
    graph.replay()
    torch.testing.assert_close(out, ops.gather_augment(x, index, mean=[0.5] * 3, std=[0.2] * 3), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_index_out_of_range_on_cuda_is_told():
    code = """
import torch
from bbfast import ops
x = torch.zeros(2, 1, 2, 2, dtype=torch.uint8, device="cuda")
try:
    ops.gather_augment(x, torch.tensor([7], device="cuda"))
    torch.cuda.synchronize()
except Exception as error:
    print("raised", type(error).__name__)
"""
    out = run(code)
    assert "raised" in out
    assert "gather_augment: index must lie in 0..1, got 7" in out
