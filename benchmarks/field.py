"""What people use today where ``bbfast.ops`` has an operation: NumPy image by image, OpenCV, numba, SciPy, torch.

Each function has the arguments of the operation and gives a function to time, with everything converted beforehand that
its users would have in that form anyway (images as [H, W, C] arrays), and a function that brings its result into the
form of ours. Written from what the methods say; it is how they are commonly programmed, not how fast they could be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Way(NamedTuple):
    """How the field does it: what it uses, the work, its result in our form, and how far that may be from ours."""

    name: str
    run: Callable[[], Any]
    result: Callable[[Any], Tensor]
    tolerance: float = 1.0  # levels for bytes, relative for floats
    outliers: float = 0.0  # share of values that may be further away
    part: str | None = None  # the part of our result that it computes, where that is a tuple

    def agrees(self, ours: Any) -> bool:
        """Whether a run gives what our operation gave."""
        mine = (ours if self.part is None else getattr(ours, self.part)).double()
        theirs = self.result(self.run()).double()
        scale = 1 if self.tolerance >= 1 else theirs.abs().clamp(min=1)
        return float(((mine - theirs).abs() > self.tolerance * scale).float().mean()) <= self.outliers


def pictures(images: Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


def batch(results: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)


def _each(change: Callable[[np.ndarray], np.ndarray], images: Tensor, where: Tensor | None = None) -> Way:
    xs = pictures(images)
    chosen = [True] * len(xs) if where is None else where.tolist()
    return Way("NumPy, image by image", lambda: [change(x) if c else x for x, c in zip(xs, chosen, strict=True)], batch)


def patch(images: Tensor, pattern: Tensor, mask: Tensor, where: Tensor | None = None) -> Way:
    p, m = pictures(pattern[None])[0], mask.numpy()[:, :, None]
    return _each(lambda x: (x * (1 - m) + p * m).astype(x.dtype), images, where)


def blend(images: Tensor, pattern: Tensor, alpha: float, **_: Any) -> Way:
    p = pictures(pattern[None])[0]
    return _each(lambda x: ((1 - alpha) * x + alpha * p).astype(x.dtype), images)


def add(images: Tensor, delta: Tensor, **_: Any) -> Way | None:
    if delta.dim() == 4:
        return None
    d, top = pictures(delta[None])[0], 255 if images.dtype == torch.uint8 else 1
    return _each(lambda x: np.clip(x.astype(np.float32) + d, 0, top).astype(x.dtype), images)


def sinusoid(images: Tensor, **_: Any) -> Way:
    unit, top = (1, 255) if images.dtype == torch.uint8 else (255, 1)

    def change(x: np.ndarray) -> np.ndarray:
        column = np.arange(x.shape[1])
        wave = 20 * np.sin(2 * np.pi * column * 6 / x.shape[1]) / unit
        return np.clip(x.astype(np.float32) + wave[None, :, None], 0, top).astype(x.dtype)

    return _each(change, images)


def quantize(images: Tensor, levels: int = 8, dither: bool = False) -> Way | None:
    top = 255 if images.dtype == torch.uint8 else 1
    if not dither:
        return _each(
            lambda x: (np.round(x.astype(np.float32) / top * (levels - 1)) / (levels - 1) * top).astype(x.dtype), images
        )
    try:
        import numba
    except ImportError:
        return None

    @numba.njit
    def diffuse(x: np.ndarray) -> np.ndarray:
        h, w, _ = x.shape
        for i in range(h):
            for j in range(w):
                old = x[i, j].copy()
                new = np.round(old / top * (levels - 1)) / (levels - 1) * top
                x[i, j] = new
                error = old - new
                if j + 1 < w:
                    x[i, j + 1] += error * 7 / 16
                if i + 1 < h:
                    if j > 0:
                        x[i + 1, j - 1] += error * 3 / 16
                    x[i + 1, j] += error * 5 / 16
                    if j + 1 < w:
                        x[i + 1, j + 1] += error / 16
        return x

    xs = pictures(images)
    # The order in which a pixel's four errors are added is another one, so a tie may fall to the other side.
    return Way(
        "numba, image by image",
        lambda: (
            [np.clip(np.round(diffuse(x.astype(np.float64))), 0, 255).astype(x.dtype) for x in xs]
            if top == 255
            else [diffuse(x.astype(np.float64)).astype(x.dtype) for x in xs]
        ),
        batch,
        tolerance=1e-4 * top,
        outliers=0.02,
    )


def warp(images: Tensor, grid: Tensor) -> Way:
    grids = grid if grid.dim() == 4 else grid[None].expand(len(images), *grid.shape)

    def run() -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        y = torch.nn.functional.grid_sample(x, grids, align_corners=True)
        return (y * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else y

    return Way("grid_sample", run, lambda y: y, 1.0 if images.dtype == torch.uint8 else 1e-4)


def gather_augment(images: Tensor, index: Tensor, **options: Any) -> Way | None:
    if options["padding"] == 0 or options.get("dtype", torch.float32) != torch.float32:
        return None
    from torchvision.transforms.v2 import functional as F

    offset, flip, padding = options["offset"].tolist(), options["flip"].tolist(), options["padding"]
    side, rows = images.shape[-1], index.tolist()

    def one(row: int, o: list[int], f: bool) -> Tensor:
        x = F.crop(F.pad(images[row], [padding]), o[0], o[1], side, side)
        x = F.to_dtype(F.horizontal_flip(x) if f else x, torch.float32, scale=True)
        return F.normalize(x, options["mean"], options["std"])

    def run() -> Tensor:
        return torch.stack([one(*given) for given in zip(rows, offset, flip, strict=True)])

    return Way("torchvision v2, image by image", run, lambda y: y, 1e-5)


def spectral_add(
    images: Tensor, positions: Any, magnitude: float, color: str = "yuv", rounding: str = "nearest"
) -> Way | None:
    if images.dtype != torch.uint8:
        return None
    from spectral_add import by_opencv

    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(torch.get_num_threads())
    xs = np.stack(pictures(images))
    return Way("OpenCV, image by image", lambda: by_opencv(xs, color, magnitude), batch, 2.0, 1e-3)


def amplitude_mix(images: Tensor, trigger: Tensor, alpha: float, beta: float) -> Way:
    amplitude = np.fft.fftshift(np.abs(np.fft.fft2(trigger.numpy(), axes=(1, 2))), axes=(1, 2))
    _, h, w = trigger.shape
    half = int(np.floor(min(h, w) * beta))
    rows, columns = (slice(s // 2 - half, s // 2 + half + 1) for s in (h, w))

    def change(x: np.ndarray) -> np.ndarray:
        spectrum = np.fft.fft2(x.transpose(2, 0, 1), axes=(1, 2))
        own = np.fft.fftshift(np.abs(spectrum), axes=(1, 2))
        own[:, rows, columns] = (1 - alpha) * own[:, rows, columns] + alpha * amplitude[:, rows, columns]
        mixed = np.fft.ifftshift(own, axes=(1, 2)) * np.exp(1j * np.angle(spectrum))
        return np.clip(np.real(np.fft.ifft2(mixed, axes=(1, 2))), 0, 255).transpose(1, 2, 0).astype(x.dtype)

    return _each(change, images)


def dct2(x: Tensor, window: int | None = None) -> Way:
    import scipy.fft

    n, c, h, w = x.shape
    size = window or h
    blocks = x.view(n, c, h // size, size, w // size, size)

    def run() -> Any:
        return scipy.fft.dctn(blocks.numpy(), norm="ortho", axes=(3, 5), workers=torch.get_num_threads())

    return Way("SciPy, the batch", run, lambda y: torch.from_numpy(y).view(x.shape), 1e-3)


def channel_lipschitz(weight: Tensor, scale: Tensor) -> Way:
    def run() -> list[Tensor]:
        factors = scale.abs()
        return [torch.linalg.svdvals(w.flatten(1))[0] * s for w, s in zip(weight, factors, strict=True)]

    return Way("torch, an SVD a channel", run, torch.stack, 1e-3)


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> Way:
    x, y = features.numpy(), labels.numpy()

    def run() -> list[np.ndarray]:
        return [np.cov(x[y == k], rowvar=False) * (np.count_nonzero(y == k) - 1) for k in range(num_classes)]

    return Way("NumPy, a covariance a class", run, lambda s: torch.from_numpy(np.stack(s)), 1e-3, part="scatter")


def softmax_entropy(logits: Tensor) -> Way:
    import scipy.special
    import scipy.stats

    x = logits.numpy()
    return Way(
        "SciPy",
        lambda: scipy.stats.entropy(scipy.special.softmax(x, axis=1), axis=1),
        lambda y: torch.from_numpy(y),
        1e-4,
    )


def overlay_batch(images: Tensor, overlays: Tensor, pairs: Tensor, **options: Any) -> Way | None:
    if options.get("dtype", torch.float32) != torch.float32:
        return None
    try:
        import cv2
    except ImportError:
        return None
    from torchvision.transforms.v2 import functional as F

    xs, rs, numbers = pictures(images), pictures(overlays), pairs.tolist()

    def one(i: int, j: int) -> Tensor:
        x = torch.from_numpy(cv2.addWeighted(xs[i], 1, rs[j], 1, 0)).permute(2, 0, 1)
        return F.normalize(F.to_dtype(x, torch.float32, scale=True), options["mean"], options["std"])

    return Way(
        "OpenCV and torchvision, pair by pair", lambda: torch.stack([one(*p) for p in numbers]), lambda y: y, 1e-4
    )


def topk_update(state: Any, activations: Tensor, index: Tensor, k: int) -> Way | None:
    if state is not None:
        return None
    x = activations.numpy()
    return Way(
        "NumPy, sorted",
        lambda: np.take_along_axis(x, np.argsort(-x, axis=0)[:k], axis=0),
        lambda y: torch.from_numpy(y.T.copy()),
        0.0,
        part="values",
    )


def gram_powers(features: Tensor) -> Way:
    x = features.flatten(2).numpy()
    rows, columns = np.triu_indices(x.shape[1])

    def one(f: np.ndarray) -> np.ndarray:
        result = []
        for p in range(1, 9):
            g = f**p @ (f**p).T
            result.append((np.sign(g) * np.abs(g) ** (1 / p))[rows, columns])
        return np.stack(result)

    return Way("NumPy, sample by sample", lambda: [one(f) for f in x], lambda y: torch.from_numpy(np.stack(y)), 1e-3)


def usual_way(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Way | None:
    """The field's way of this call, or None where there is none, or its library is not installed."""
    make = globals().get(op)
    return None if make is None else make(*arguments, **options)
