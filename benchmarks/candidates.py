"""Which steps of the methods would gain from a kernel of their own? What they cost in plain torch, beside the network.

Each candidate is measured in plain torch on the sizes of its method, with gradients where the method takes them, and
set against (a) the least any kernel could take: the bytes that must be read and written, at the copy bandwidth of the
same run, and (b) the pass through the network that it goes with, of small_cnn, the smallest one there is. A kernel pays
where the step is a share of that pass worth having and plain torch is far from (a).

    python benchmarks/candidates.py [--device cpu|cuda] [--repeats 10] [--json out.json]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _timing import copy_bandwidth, header, repeat, summary, write_json
from torch import Tensor

from bbfast import models
from bbfast.defenses.mitigation._stamp import stamp
from bbfast.training.runtime import keep_freed_memory

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A step of a method: what is called, the bytes it must move, and the images that pass the network beside it."""

    name: str
    users: str
    call: Callable[[], Any]
    bytes_moved: int
    images: int
    backward: bool  # whether the network's backward pass goes with it


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def candidates(device: torch.device) -> Iterator[Candidate]:
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g).to(device)

    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    x = unit(128, 3, 32, 32)

    mask, pattern = unit(10, 1, 32, 32).requires_grad_(), unit(10, 3, 32, 32).requires_grad_()

    def stamped() -> None:
        torch.autograd.grad(stamp(x[:32], mask, pattern).sum(), (mask, pattern))

    # The batch of stamped images is written, and its gradient read.
    yield Candidate("stamp, 10 triggers", "NC, FeatureRE, MOTH", stamped, 2 * 10 * size(x[:32]), 320, True)

    delta, grad = unit(128, 3, 32, 32) - 0.5, unit(128, 3, 32, 32) - 0.5

    def project() -> Tensor:
        moved = delta + 0.1 * grad.sign()
        norm = moved.flatten(1).norm(dim=1).clamp(min=1e-12)
        return moved * (1 / norm).clamp(max=1).view(-1, 1, 1, 1)

    yield Candidate("step and L2 projection", "SAU, NPD, I-BAU, MOTH", project, 3 * size(delta), 128, True)

    maps = unit(128, 64, 16, 16)
    yield Candidate("spatial maximum", "EP", lambda: maps.amax((2, 3)), size(maps), 128, False)
    yield Candidate("spatial sum", "SCAn", lambda: maps.sum((2, 3)), size(maps), 128, False)
    m, v = unit(64, 1, 1), unit(64, 1, 1) + 0.5

    def likelihood() -> Tensor:
        return (-0.5 * ((maps - m) ** 2 / v + v.log())).amin((1, 2, 3))

    yield Candidate("batch-norm likelihood", "FLARE", likelihood, size(maps), 128, False)

    inner = maps.clone().requires_grad_()

    def attention() -> None:
        a = F.normalize(inner.pow(2).mean(1).flatten(1), dim=1)
        torch.autograd.grad(a.sum(), inner)

    yield Candidate("attention map", "NAD", attention, 3 * size(maps), 128, True)

    logits, labels = unit(128, 10), torch.randint(0, 10, (128,), generator=g).to(device)

    def reduce() -> tuple[Tensor, ...]:
        log = logits.log_softmax(1)
        top = log.max(1)
        return top.indices, top.values.exp(), F.nll_loss(log, labels, reduction="none"), -(log.exp() * log).sum(1)

    yield Candidate("prediction, confidence, loss, entropy", "detectors", reduce, size(logits), 128, False)

    z = unit(512, 128).requires_grad_()

    def contrast() -> None:
        similar = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.5
        similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool, device=device), -torch.inf)
        torch.autograd.grad(F.cross_entropy(similar, torch.arange(len(z), device=device).roll(256)), z)

    yield Candidate("NT-Xent of 2 x 256", "DBD, D-ST", contrast, 4 * 512 * 512 * 4, 512, True)

    weights = [torch.rand_like(p) for p in models.build("small_cnn", 10, 32).to(device).parameters()]

    def climb() -> None:
        norm = torch.stack(torch._foreach_norm(weights)).norm()
        torch._foreach_add(weights, torch._foreach_mul(weights, 0.05 / norm))

    yield Candidate("SAM's climb", "FT-SAM", climb, 3 * size(*weights), 128, True)

    order = torch.randperm(128, generator=g).to(device)
    yield Candidate("mixup", "D-ST, NAB", lambda: torch.lerp(x, x[order], 0.3), 3 * size(x), 128, True)
    theta = (torch.eye(2, 3).expand(128, 2, 3) + 0.05 * torch.rand(128, 2, 3, generator=g)).to(device)

    def rotate() -> Tensor:
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    yield Candidate("affine warp", "FCT, ShrinkPad", rotate, 2 * size(x), 128, False)
    stored = (x * 255).to(torch.uint8)

    def brighten() -> Tensor:
        scaled = (stored.unsqueeze(0) * torch.arange(2, 7, device=device).view(-1, 1, 1, 1, 1).float()).clamp(max=255)
        return ((scaled / 255 - mean) / std).flatten(0, 1)

    yield Candidate("5 brighter copies", "SCALE-UP", brighten, size(stored) + 5 * size(x), 640, False)
    region = torch.zeros(32, 32, dtype=torch.bool, device=device)
    region[4:12, 4:12] = True

    def paste() -> Tensor:
        return (torch.where(region, stored[:1], stored).float() / 255 - mean) / std

    yield Candidate("pasted region", "SentiNet", paste, size(stored) + size(x), 128, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json")
    given = parser.parse_args()
    device = torch.device(given.device)
    net = models.build("small_cnn", 10, 32).to(device).eval()
    images = torch.rand(128, 3, 32, 32, device=device)

    def forward() -> None:
        with torch.no_grad():
            net(images)

    def backward() -> None:
        torch.autograd.grad(net(images).sum(), list(net.parameters()))

    with keep_freed_memory(device):
        bandwidth = copy_bandwidth(device)
        passes = {
            name: summary(repeat(call, device, given.repeats, budget=1.0))["median"] / len(images)
            for name, call in (("forward", forward), ("backward", backward))
        }
        facts = header(device) | {"copy_gb_per_second": bandwidth / 1e9}
        facts |= {f"small_cnn_{name}_us_per_image": seconds * 1e6 for name, seconds in passes.items()}
        for name, value in facts.items():
            print(f"{name}: {value}")
        print(f"{'':40s} {'plain torch':>12s} {'least':>10s} {'of the network':>15s} {'could gain':>11s}")
        rows = []
        for c in candidates(device):
            seconds = summary(repeat(c.call, device, given.repeats, budget=0.5))["median"]
            least = c.bytes_moved / bandwidth
            network = c.images * passes["backward" if c.backward else "forward"]
            gain = max(0.0, seconds - least) / (network + seconds)
            rows.append({"candidate": c.name, "users": c.users, "seconds": seconds, "least": least, "network": network})
            print(
                f"{c.name + ' (' + c.users + ')':40s} {seconds * 1e6:10.0f}us {least * 1e6:8.0f}us "
                f"{100 * seconds / network:14.1f}% {100 * gain:10.1f}%",
                flush=True,
            )
    write_json(given.json, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
