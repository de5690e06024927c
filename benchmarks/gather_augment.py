"""Making training batches: bbfast.ops.gather_augment against what one would otherwise use, in one run.

10,000 CIFAR-like images, batch 128, shuffled, random crop of 32 from 4 pixels of padding, horizontal flip, normalise.
Compared with (a) torchvision.transforms.v2 on the uint8 batch, which draws one crop and one flip a batch, and (b) the
field's usual way: a PIL image a sample through torchvision.transforms in a DataLoader, with 0 and with 2 workers; the
better one counts.

    python benchmarks/gather_augment.py [--npz data.npz] [--images 10000] [--batch 128] [--turns 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from _timing import header, write_json
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from bbfast import ops

MEAN, STD, PADDING = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), 4


def load_images(path: str | None, count: int) -> Tensor:
    """``count`` uint8 images ``[N, 3, 32, 32]``: of an npz file (key train_images, NHWC), repeated as needed, or
    random."""
    if path is None:
        return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with np.load(path) as file:
        images = torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2).contiguous()
    return images[torch.arange(count) % len(images)]


def ours(images: Tensor, batch: int, dtype: torch.dtype, channels_last: bool) -> Iterator[Tensor]:
    """One epoch: the order and every sample's crop and flip are drawn, then a batch is one call."""
    n = len(images)
    order = torch.randperm(n)
    offset = torch.randint(0, 2 * PADDING + 1, (n, 2))
    flip = torch.rand(n) < 0.5
    for start in range(0, n, batch):
        part = slice(start, start + batch)
        yield ops.gather_augment(
            images,
            order[part],
            offset=offset[part],
            flip=flip[part],
            padding=PADDING,
            mean=MEAN,
            std=STD,
            dtype=dtype,
            channels_last=channels_last,
        )


def batch_v2(images: Tensor, batch: int) -> Iterator[Tensor]:
    """torchvision v2 on the batch: the same crop and flip for all its images."""
    size = images.shape[-1]
    transform = v2.Compose(
        [
            v2.RandomCrop(size, padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    for index in torch.randperm(len(images)).split(batch):
        yield transform(images[index])


class PerSample(torch.utils.data.Dataset[Tensor]):
    """The field's data set: a PIL image a sample, transformed one at a time."""

    def __init__(self, images: Tensor) -> None:
        size = images.shape[-1]
        self.pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.RandomCrop((size, size), padding=PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.pictures[i])


def rate(epoch: Callable[[], Iterator[Tensor]], count: int, at_least: float) -> float:
    """Images a second of whole passes, as many as it takes to fill ``at_least`` seconds."""
    begin = time.perf_counter()
    passes = 0
    while passes == 0 or time.perf_counter() - begin < at_least:
        assert sum(len(x) for x in epoch()) == count
        passes += 1
    return passes * count / (time.perf_counter() - begin)


def rates(ways: dict[str, Callable[[], Iterator[Tensor]]], count: int, turns: int) -> dict[str, list[float]]:
    """Every way in turn, ``turns`` times after one turn to warm up: a machine that others load as well treats all
    alike."""
    result: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, epoch in ways.items():
            value = rate(epoch, count, at_least=0.5)
            if turn:
                result[name].append(value)
    return result


def check_same(images: Tensor) -> None:
    """The two fast ways give the same numbers for the same crop (none here)."""
    index = torch.arange(min(64, len(images)))
    x = ops.gather_augment(images, index, mean=MEAN, std=STD)
    y = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(images[index])
    torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", help="npz file with train_images, uint8 [N, 32, 32, 3]; random images otherwise")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = load_images(arguments.npz, arguments.images)
    facts = header(torch.device("cpu")) | {"images": len(images), "batch": arguments.batch, "turns": arguments.turns}
    for name, value in facts.items():
        print(f"{name}: {value}")
    check_same(images)

    n, b, turns = len(images), arguments.batch, arguments.turns
    data = PerSample(images)

    def loader(workers: int) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter(torch.utils.data.DataLoader(data, b, shuffle=True, num_workers=workers))

    ways = {
        "bbfast float32": lambda: ours(images, b, torch.float32, False),
        "bbfast float32 channels_last": lambda: ours(images, b, torch.float32, True),
        "bbfast bfloat16 channels_last": lambda: ours(images, b, torch.bfloat16, True),
        "torchvision v2 batch": lambda: batch_v2(images, b),
        "PIL per sample, 0 workers": loader(0),
        "PIL per sample, 2 workers": loader(2),
    }
    measured = rates(ways, n, turns)
    medians = {name: statistics.median(values) for name, values in measured.items()}
    for name, values in measured.items():
        print(f"{name:32s} {medians[name]:12,.0f} images/s  ({min(values):,.0f} .. {max(values):,.0f})")
    field = max(medians["PIL per sample, 0 workers"], medians["PIL per sample, 2 workers"])
    ratios = {
        "over torchvision v2 batch": medians["bbfast float32"] / medians["torchvision v2 batch"],
        "over PIL per sample": medians["bbfast float32"] / field,
    }
    for name, value in ratios.items():
        print(f"bbfast float32 {name}: {value:.1f}x")
    write_json(arguments.json, {"facts": facts, "images_per_second": measured, "ratios": ratios})


if __name__ == "__main__":
    main()
