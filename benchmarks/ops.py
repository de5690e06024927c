"""The native operations on their own: time, bytes moved, share of the machine's copy bandwidth, and how much faster
they are.

Each operation against its plain PyTorch reference, eager and under torch.compile, on the same input; that both give
the same result is checked in the same run. Bytes are what must be read and written once; the copy bandwidth is
measured.

    python benchmarks/ops.py [--device cpu|cuda] [--batch 512] [--repeats 20] [--only warp ...] [--no-compile] [--json
    out.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _timing import copy_bandwidth, header, repeat, summary, write_json
from torch import Tensor

from bbfast import ops
from bbfast.ops import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: the operation, its arguments, and the bytes of its inputs and outputs."""

    name: str
    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backward: bool = False

    def call(self, module: Any) -> Callable[..., Any]:
        """The operation of ``module`` on these arguments, with the gradient of its sum if asked for."""
        function = getattr(module, self.op)
        if not self.backward:
            return lambda *a: function(*a, **self.options)
        return lambda *a: torch.autograd.grad(function(*a, **self.options).sum(), [x for x in a if _leaf(x)])

    def bytes_moved(self, result: Any) -> int:
        """Every input and every output once."""
        results = result if isinstance(result, tuple | list) else (result,)
        inputs = [*self.arguments, *self.options.values()]
        if self.op == "gather_augment":  # of the images only those that are taken
            images, index = self.arguments
            inputs = [images[: len(index)], index, *self.options.values()]
        elif self.op == "class_moments":
            inputs = list(self.arguments)
        once = sum(t.numel() * t.element_size() for t in (*inputs, *results) if isinstance(t, Tensor))
        if self.backward:  # the gradient of the result comes in as well
            once += sum(t.numel() * t.element_size() for t in self.arguments[:1])
        return once


def _leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def cases(batch: int, device: torch.device) -> list[Case]:
    """CIFAR-sized batches, and one of ImageNet size for each image operation."""
    g = torch.Generator().manual_seed(0)

    def pixels(n: int, side: int) -> Tensor:
        return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=g).to(device)

    def unit(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g).to(device)

    x, big = pixels(batch, 32), pixels(max(1, batch // 32), 224)
    f = x.float() / 255
    half = (torch.rand(batch, generator=g) < 0.5).to(device)
    mask, mask_big = unit(32, 32), unit(224, 224)
    axis = torch.linspace(-1, 1, 32)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).to(device)
    grid = (identity + 0.03 * unit(32, 32, 2)).clamp(-1, 1)
    memory = pixels(10_000, 32)
    index = torch.randint(0, len(memory), (batch,), generator=g).to(device)
    augment: dict[str, Any] = {
        "offset": torch.randint(0, 9, (batch, 2), generator=g).to(device),
        "flip": half,
        "padding": 4,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.243, 0.261),
    }
    features, labels = (
        torch.randn(5000, 512, generator=g).to(device),
        torch.randint(0, 10, (5000,), generator=g).to(device),
    )
    leaf = f.clone().requires_grad_()
    pattern_leaf, mask_leaf = unit(3, 32, 32).requires_grad_(), unit(32, 32).requires_grad_()
    logits = torch.randn(50_000, 10, generator=g).to(device)
    return [
        Case("patch uint8 32x32", "patch", (x, x[0], mask)),
        Case("patch uint8 32x32, half chosen", "patch", (x, x[0], mask, half)),
        Case("patch uint8 224x224", "patch", (big, big[0], mask_big)),
        Case("patch float32 32x32", "patch", (f, f[0], mask)),
        Case("patch float32 backward", "patch", (leaf, pattern_leaf, mask_leaf), backward=True),
        Case("blend uint8 32x32", "blend", (x, x[0], 0.2)),
        Case("blend uint8 32x32, truncate", "blend", (x, x[0].float(), 0.2), {"rounding": "truncate"}),
        Case("blend uint8 224x224", "blend", (big, big[0], 0.2)),
        Case("blend float32 32x32", "blend", (f, f[0], 0.2)),
        Case("warp uint8 32x32", "warp", (x, grid)),
        Case("warp float32 32x32", "warp", (f, grid)),
        Case("warp float32, a grid a sample", "warp", (f, grid.expand(batch, 32, 32, 2).contiguous())),
        Case("gather_augment float32", "gather_augment", (memory, index), augment),
        Case(
            "gather_augment float32 channels_last", "gather_augment", (memory, index), augment | {"channels_last": True}
        ),
        Case(
            "gather_augment bfloat16 channels_last",
            "gather_augment",
            (memory, index),
            augment | {"channels_last": True, "dtype": torch.bfloat16},
        ),
        Case("class_moments 5000 x 512, 10 classes", "class_moments", (features, labels, 10)),
        Case("softmax_entropy 50000 x 10", "softmax_entropy", (logits,)),
        Case("softmax_entropy 5000 x 1000", "softmax_entropy", (torch.randn(5000, 1000, generator=g).to(device),)),
    ]


def measure(case: Case, device: torch.device, repeats: int, bandwidth: float, with_compile: bool) -> dict[str, Any]:
    """Times the operation, the reference and the compiled reference; checks that they agree."""
    native, plain = case.call(ops), case.call(reference)
    result = native(*case.arguments)
    torch.testing.assert_close(tuple(result), tuple(plain(*case.arguments)), rtol=1e-4, atol=1e-4)
    ours = summary(repeat(lambda: native(*case.arguments), device, repeats))
    eager = summary(repeat(lambda: plain(*case.arguments), device, repeats))
    moved = case.bytes_moved(result)
    row = {
        "case": case.name,
        "seconds": ours,
        "reference_seconds": eager,
        "bytes": moved,
        "share_of_copy_bandwidth": moved / ours["median"] / bandwidth,
        "times_eager": eager["median"] / ours["median"],
        "times_compiled": None,
    }
    if with_compile and not case.backward:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about the reference
            compiled = torch.compile(plain, dynamic=False)
            compiled(*case.arguments)
        fast = summary(repeat(lambda: compiled(*case.arguments), device, repeats))
        row |= {"compiled_seconds": fast, "times_compiled": fast["median"] / ours["median"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device)
    facts = header(device) | {
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "copy_gb_per_second": bandwidth / 1e9,
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"{'':40s} {'median':>10s} {'q1..q3':>19s} {'of copy':>8s} {'x eager':>8s} {'x compiled':>10s}")
    rows = []
    for case in cases(arguments.batch, device):
        if arguments.only and case.op not in arguments.only:
            continue
        row = measure(case, device, arguments.repeats, bandwidth, not arguments.no_compile)
        rows.append(row)
        t, compiled = row["seconds"], row["times_compiled"]
        print(
            f"{case.name:40s} {t['median'] * 1e6:8.1f}us {t['q1'] * 1e6:8.1f}..{t['q3'] * 1e6:8.1f} "
            f"{row['share_of_copy_bandwidth']:8.2f} {row['times_eager']:7.1f}x "
            + (f"{compiled:9.1f}x" if compiled is not None else f"{'-':>10s}"),
            flush=True,
        )
    write_json(arguments.json, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
