"""The native operations on their own: time, bytes moved, share of the machine's copy bandwidth, and how much faster
they are.

Each operation against its plain PyTorch reference, eager and under torch.compile, and on the CPU against the field's
usual way (field.py; numba and OpenCV are used if they are installed: `pip install numba opencv-python-headless`), on
the same input; that all give the same result is checked in the same run. Bytes are what must be read and written once;
the copy bandwidth is measured. The allocator keeps freed memory, as in training, so that nothing is timed twice over by
page faults.

    python benchmarks/ops.py [--device cpu|cuda] [--batch 512] [--repeats 20] [--seconds 2] [--only warp ...]
        [--no-compile] [--json out.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _timing import copy_bandwidth, header, repeat, summary, write_json
from field import usual_way
from torch import Tensor

from bbfast import ops
from bbfast.ops import reference
from bbfast.training.runtime import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: the operation, its arguments, and the bytes of its inputs and outputs."""

    name: str
    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backward: bool = False
    compiles: bool = True  # whether the compiler is done with the reference in reasonable time

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
        elif self.op in ("channel_stats", "class_moments", "topk_update"):
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

    x, big = pixels(batch, 32), pixels(max(1, batch // 8), 224)
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
    delta = 60 * unit(3, 32, 32) - 30
    leaf = f.clone().requires_grad_()
    pattern_leaf, mask_leaf = unit(3, 32, 32).requires_grad_(), unit(32, 32).requires_grad_()
    maps = torch.randn(batch, 64, 32, 32, generator=g).to(device)
    deep = torch.randn(batch, 512, 4, 4, generator=g).to(device)
    stage = torch.randn(30, 256, 8, 8, generator=g).relu()
    drawn = torch.randint(0, 500, (64 * 64,), generator=g)
    pairs = torch.stack((torch.arange(64).repeat_interleave(64), drawn), 1).to(device)
    normal: dict[str, Any] = {"mean": augment["mean"], "std": augment["std"]}
    last = torch.channels_last
    kernel = torch.randn(512, 512, 3, 3, generator=g).to(device)
    sample_ids = torch.arange(5000, device=device)
    tops = ops.topk_update(None, features[:-256], sample_ids[:-256], 10)
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
        Case("add uint8 32x32", "add", (x, delta)),
        Case("add uint8 32x32, truncate", "add", (x, delta), {"rounding": "truncate"}),
        Case("add uint8 32x32, a delta a sample", "add", (x, 60 * f - 30)),
        Case("add uint8 224x224", "add", (big, 60 * unit(3, 224, 224) - 30)),
        Case("add float32 32x32", "add", (f, delta / 255)),
        Case("add float32 backward", "add", (leaf, unit(3, 32, 32).requires_grad_()), backward=True),
        Case("sinusoid uint8 32x32", "sinusoid", (x,)),
        Case("sinusoid uint8 32x32, truncate", "sinusoid", (x,), {"rounding": "truncate"}),
        Case("sinusoid uint8 224x224", "sinusoid", (big,)),
        Case("sinusoid float32 32x32", "sinusoid", (f,)),
        Case("quantize uint8 32x32", "quantize", (x,)),
        Case("quantize uint8 32x32, 11 levels", "quantize", (x, 11)),
        Case("quantize uint8 224x224", "quantize", (big,)),
        Case("quantize float32 32x32", "quantize", (f,)),
        Case("quantize uint8 32x32, dither", "quantize", (x, 8, True), compiles=False),
        Case("quantize uint8 224x224, dither", "quantize", (big, 8, True), compiles=False),
        Case("quantize float32 32x32, dither", "quantize", (f, 8, True), compiles=False),
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
        Case("spectral_add uint8 32x32, yuv", "spectral_add", (x, [(15, 15), (31, 31)], 100)),
        Case("spectral_add uint8 32x32, ycrcb", "spectral_add", (x, [(15, 15), (31, 31)], 30), {"color": "ycrcb"}),
        Case("spectral_add uint8 224x224, ycrcb", "spectral_add", (big, [(15, 15), (31, 31)], 30), {"color": "ycrcb"}),
        Case("spectral_add float32 32x32, yuv", "spectral_add", (f, [(15, 15), (31, 31)], 100)),
        Case("amplitude_mix uint8 32x32", "amplitude_mix", (x, x[0], 0.15, 0.1)),
        Case("reflect uint8 32x32, ghost", "reflect", (x, x[0], "ghost")),
        Case("reflect uint8 32x32, out of focus", "reflect", (x, x[0], "out_of_focus")),
        Case("dct2 float32 32x32", "dct2", (f,)),
        Case("dct2 float32 224x224 in blocks of 32", "dct2", (big.float(), 32)),
        Case(
            "channel_lipschitz 512 x 512 x 3 x 3",
            "channel_lipschitz",
            (kernel, kernel[:, 0, 0, 0].clone()),
            compiles=False,
        ),
        Case("channel_stats 512 x 64 x 32 x 32", "channel_stats", (maps,)),
        Case("channel_stats channels_last", "channel_stats", (maps.contiguous(memory_format=torch.channels_last),)),
        Case("channel_stats 512 x 512 x 4 x 4, classes", "channel_stats", (deep, labels[: len(deep)], 10)),
        Case("gram_powers 30 x 256 x 8 x 8", "gram_powers", (stage.to(device),)),
        Case("overlay_batch uint8 to float32", "overlay_batch", (x[:64], memory[:500], pairs), normal),
        Case(
            "overlay_batch uint8 to bfloat16 channels_last",
            "overlay_batch",
            (x[:64].to(memory_format=last), memory[:500].to(memory_format=last), pairs),
            normal | {"dtype": torch.bfloat16, "channels_last": True},
        ),
        Case("softmax_entropy 50000 x 10", "softmax_entropy", (logits,)),
        Case("topk_update 256 of 5000 x 512, k = 10", "topk_update", (tops, features[-256:], sample_ids[-256:], 10)),
        Case("topk_update 5000 x 512, k = 10", "topk_update", (None, features, sample_ids, 10)),
        Case("softmax_entropy 5000 x 1000", "softmax_entropy", (torch.randn(5000, 1000, generator=g).to(device),)),
    ]


def measure(
    case: Case, device: torch.device, repeats: int, seconds: float, bandwidth: float, with_compile: bool
) -> dict[str, Any]:
    """Times the operation, the reference and the compiled reference; checks that they agree."""
    native, plain = case.call(ops), case.call(reference)
    result = native(*case.arguments)
    torch.testing.assert_close(tuple(result), tuple(plain(*case.arguments)), rtol=1e-4, atol=1e-4)
    ours = summary(repeat(lambda: native(*case.arguments), device, repeats, seconds))
    eager = summary(repeat(lambda: plain(*case.arguments), device, repeats, seconds))
    moved = case.bytes_moved(result)
    row = {
        "case": case.name,
        "seconds": ours,
        "reference_seconds": eager,
        "bytes": moved,
        "share_of_copy_bandwidth": moved / ours["median"] / bandwidth,
        "times_eager": eager["median"] / ours["median"],
        "times_compiled": None,
        "field": None,
        "times_field": None,
    }
    way = None if case.backward or device.type != "cpu" else usual_way(case.op, case.arguments, case.options)
    if way is not None:
        assert way.agrees(result), f"{case.name}: {way.name} gives something else"
        usual = summary(repeat(way.run, device, min(repeats, 5), seconds))
        row |= {"field": way.name, "field_seconds": usual, "times_field": usual["median"] / ours["median"]}
    if with_compile and case.compiles and not case.backward:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about the reference
            compiled = torch.compile(plain, dynamic=False)
            compiled(*case.arguments)
        fast = summary(repeat(lambda: compiled(*case.arguments), device, repeats, seconds))
        row |= {"compiled_seconds": fast, "times_compiled": fast["median"] / ours["median"]}
    return row


def times(ratio: float | None) -> str:
    return f"{'-':>10s}" if ratio is None else f"{ratio:9.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each way of each case is timed")
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
    print(
        f"{'':40s} {'median':>10s} {'q1..q3':>19s} {'of copy':>8s} {'x eager':>8s} {'x compiled':>10s} {'x field':>10s}"
    )
    rows = []
    for case in cases(arguments.batch, device):
        if arguments.only and case.op not in arguments.only:
            continue
        with keep_freed_memory(device):
            row = measure(case, device, arguments.repeats, arguments.seconds, bandwidth, not arguments.no_compile)
        rows.append(row)
        t = row["seconds"]
        print(
            f"{case.name:40s} {t['median'] * 1e6:8.1f}us {t['q1'] * 1e6:8.1f}..{t['q3'] * 1e6:8.1f} "
            f"{row['share_of_copy_bandwidth']:8.2f} {row['times_eager']:7.1f}x {times(row['times_compiled'])} "
            f"{times(row['times_field'])} {row['field'] or ''}",
            flush=True,
        )
    write_json(arguments.json, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
