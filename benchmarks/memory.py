"""Peak memory of the operations: what a call takes at the most, beside its inputs and outputs.

    python benchmarks/memory.py [--device cpu|cuda] [--batch 512] [--only class_moments ...] [--json out.json]

"peak" is the process's resident memory (on CUDA: torch's allocated memory) at its highest during one call, less what it
was before, plus the inputs; the ratio is to inputs plus outputs, so 1 is the least there is. On the CPU it needs Linux,
whose kernel keeps the mark and resets it on request; pages count, so small cases are coarse.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
from _timing import header, write_json
from ops import Case, cases

from bbfast import ops
from bbfast.ops import reference


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def extra_bytes(case: Case, module: Any, device: torch.device) -> tuple[int, int]:
    """Bytes of inputs plus outputs, and the most that one call took beyond what was there before it."""
    call = case.call(module)
    moved = case.bytes_moved(call(*case.arguments))  # also starts the threads and fills the caches
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call(*case.arguments)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmRSS")
        result = call(*case.arguments)
        peak = status_bytes("VmHWM")
    del result
    return moved, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--json")
    given = parser.parse_args()
    device = torch.device(given.device)
    facts = header(device) | {"batch": given.batch}
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"{'':48s} {'in + out':>10s} {'peak':>6s} {'of the reference':>17s}")
    rows = []
    for case in cases(given.batch, device):
        if case.backward or (given.only and case.op not in given.only):
            continue
        moved, native = extra_bytes(case, ops, device)
        _, plain = extra_bytes(case, reference, device)
        # Outputs are part of what the call takes.
        inputs = moved - outputs(case)
        ratios = [(inputs + extra) / moved for extra in (native, plain)]
        rows.append({"case": case.name, "inputs_and_outputs": moved, "native": ratios[0], "reference": ratios[1]})
        print(f"{case.name:48s} {moved / 1e6:8.1f}MB {ratios[0]:6.2f} {ratios[1]:17.2f}", flush=True)
    write_json(given.json, {"facts": facts, "rows": rows})


def outputs(case: Case) -> int:
    result = case.call(ops)(*case.arguments)
    results = result if isinstance(result, tuple | list) else (result,)
    return sum(t.numel() * t.element_size() for t in results if isinstance(t, torch.Tensor))


if __name__ == "__main__":
    main()
