"""Poisoning in the frequency domain: bbfast.ops.spectral_add against what one would otherwise use, in one run.

FTrojan's and CTRL's settings on uint8 images, blocks of 32 x 32. Compared with (a) plain torch on the batch: colours,
DCT and inverse as matrix products, colours back, and (b) the field's usual way: OpenCV, image by image and block by
block, if it is installed (`pip install opencv-python-headless`). That all give the same images (but for a level where a
value lies on the edge of rounding) is checked in the same run.

    python benchmarks/spectral_add.py [--images 512] [--size 32] [--turns 7] [--json out.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from _timing import header, write_json
from torch import Tensor

from bbfast import ops

WINDOW, POSITIONS = 32, [(15, 15), (31, 31)]
YUV = torch.tensor([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
YCRCB = torch.tensor([[0.299, 0.587, 0.114], [0.713 * 0.701, -0.713 * 0.587, -0.713 * 0.114],
                      [-0.564 * 0.299, -0.564 * 0.587, 0.564 * 0.886]])  # fmt: skip


def by_products(images: Tensor, color: str, magnitude: float) -> Tensor:
    """The steps as they are written, on the whole batch."""
    there = YUV if color == "yuv" else YCRCB
    back = torch.linalg.inv(there)
    n, _, h, w = images.shape
    x = torch.einsum("ij,njp->nip", there, images.float().flatten(2)).view(n, 3, h, w)
    if color == "ycrcb":
        x = x.round()
    spectrum = ops.dct2(x[:, 1:], WINDOW)
    for row, column in POSITIONS:
        spectrum[..., row::WINDOW, column::WINDOW] += magnitude
    x[:, 1:] = ops.idct2(spectrum, WINDOW)
    if color == "ycrcb":
        x = x.round()
    return torch.einsum("ij,njp->nip", back, x.flatten(2)).round().clamp(0, 255).to(torch.uint8).view(n, 3, h, w)


def by_opencv(images: np.ndarray, color: str, magnitude: float) -> np.ndarray:
    """The field's usual way, with rounding where its code cuts off. ``[N, H, W, 3]``."""
    import cv2

    results = np.empty_like(images)
    there, back = YUV.numpy(), torch.linalg.inv(YUV).numpy()
    for n, image in enumerate(images):
        x = image.astype(np.float32) @ there.T if color == "yuv" else cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
        x = x.astype(np.float32)
        for channel in (1, 2):
            for i in range(0, x.shape[0], WINDOW):
                for j in range(0, x.shape[1], WINDOW):
                    block = cv2.dct(np.ascontiguousarray(x[i : i + WINDOW, j : j + WINDOW, channel]))
                    for position in POSITIONS:
                        block[position] += magnitude
                    x[i : i + WINDOW, j : j + WINDOW, channel] = cv2.idct(block)
        if color == "yuv":
            results[n] = np.clip(np.round(x @ back.T), 0, 255).astype(np.uint8)
        else:
            results[n] = cv2.cvtColor(np.clip(np.round(x), 0, 255).astype(np.uint8), cv2.COLOR_YCrCb2RGB)
    return results


def seconds(call: Callable[[], object], at_least: float = 0.2) -> float:
    """Of one call, as many as it takes to fill ``at_least``."""
    begin, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begin < at_least:
        call()
        calls += 1
    return (time.perf_counter() - begin) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=32, help="side; a multiple of 32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.images, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    try:
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
    except ImportError:
        cv2 = None
    facts = header(torch.device("cpu")) | {"images": list(shape), "opencv": getattr(cv2, "__version__", None)}
    for name, value in facts.items():
        print(f"{name}: {value}")
    measured: dict[str, dict[str, list[float]]] = {}
    for title, color, magnitude in (("FTrojan, ycrcb", "ycrcb", 30.0), ("CTRL, yuv", "yuv", 100.0)):
        ways: dict[str, Callable[[], object]] = {
            "bbfast": lambda c=color, m=magnitude: ops.spectral_add(images, POSITIONS, m, window=WINDOW, color=c),
            "torch, matrix products": lambda c=color, m=magnitude: by_products(images, c, m),
        }
        if cv2 is not None:
            ways["OpenCV, image by image"] = lambda c=color, m=magnitude: by_opencv(rows, c, m)
        mine = ways["bbfast"]().int()
        for name, way in ways.items():
            result = way()
            other = result if isinstance(result, Tensor) else torch.from_numpy(result).permute(0, 3, 1, 2)
            difference = (other.int() - mine).abs()
            # Chroma on the edge of rounding is worth up to 2 levels of blue; plain torch converts in float as well.
            assert int(difference.max()) <= 5 and float((difference > 2).float().mean()) < 1e-3, name
        # Turn by turn, so that a machine that others load as well treats all alike.
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.turns):
            for name, way in ways.items():
                times[name].append(seconds(way))
        best = statistics.median(times["bbfast"])
        for name, values in times.items():
            median = statistics.median(values)
            spread = f"({min(values) * 1e6:.0f} .. {max(values) * 1e6:.0f})"
            rate = f"{median / best:6.1f}x {arguments.images / median:12,.0f} images/s"
            print(f"{title:16s} {name:24s} {median * 1e6:10.0f} us {spread:24s} {rate}", flush=True)
        measured[title] = times
    write_json(arguments.json, {"facts": facts, "seconds": measured})


if __name__ == "__main__":
    main()
