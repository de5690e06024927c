"""How fast is the training engine? Images per second of ``bbfast.train`` beside the plain PyTorch loop of the field.

    python benchmarks/training.py                                    # PreAct-ResNet18, random 32 x 32 images
    python benchmarks/training.py --variants plain,fp32,bf16,auto    # what each part gains
    python benchmarks/training.py --data cifar10_small.npz --epochs 5  # accuracy, same recipe for both
    python benchmarks/training.py --model small_cnn --json out.json

The plain loop: torchvision transforms on each PIL image in a DataLoader, float32, default memory layout,
``loss.backward(); optimizer.step()``. Each variant has a process of its own (allocator settings and threads of one must
not help the other); the processes take turns, so that load from outside hits all alike. Speed: several steps a turn,
after one turn of warming up; medians and best turns. Compare ratios; figures depend on the machine.
On a busy machine, ``--threads 1 --clock cpu`` counts processor time instead of time on the wall.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

# What the variants of ours set; everything else is the recipe's default.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32": {"precision": "fp32", "channels_last": False},
    "fp32_cl": {"precision": "fp32", "channels_last": True},
    "bf16": {"precision": "bf16", "channels_last": False},
    "bf16_cl": {"precision": "bf16", "channels_last": True},
    "auto": {},
    "compile": {"compile": True},
    "graphs": {"cuda_graphs": True},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


def main() -> None:
    args = parse()
    variants = args.variants.split(",")
    unknown = set(variants) - set(VARIANTS)
    if unknown:
        sys.exit(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    spec = vars(args)
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    for name in variants:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, spec, theirs), daemon=True)
        process.start()
        workers[name] = process, ours
    print(f"{platform.processor() or platform.machine()}, {describe_device(args.device)}, torch {torch.__version__}")
    print(f"{args.threads} threads, {args.clock} time, {args.model}, batch {args.batch_size}", end="")
    if args.epochs:
        print(f", {args.epochs} epochs on {args.data}")
        results = {name: ask(workers[name][1]) for name in variants}
    else:
        print(f", {args.turns} turns of {args.steps} steps, after one turn to warm up")
        turns: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(args.turns + 1):
            for name in variants:
                seconds = ask(workers[name][1])["seconds"]
                if turn:
                    turns[name].append(args.steps * args.batch_size / seconds)
        results = {
            name: {
                "images_per_second_median": statistics.median(rates),
                "images_per_second_best": max(rates),
                "images_per_second": rates,
            }
            for name, rates in turns.items()
        }
    for process, connection in workers.values():
        connection.send("stop")
        process.join()
    show(results, variants[0])
    if args.json:
        facts = {"machine": platform.platform(), "torch": torch.__version__, **spec, "results": results}
        with open(args.json, "w") as file:
            json.dump(facts, file, indent=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="plain,auto", help=f"of {', '.join(VARIANTS)}; the first is the base")
    parser.add_argument("--model", default="preactresnet18")
    parser.add_argument("--data", help=".npz with train_images, train_labels, test_images, test_labels; default random")
    parser.add_argument("--epochs", type=int, default=0, help="train so long and report C-Acc instead of speed")
    parser.add_argument("--limit", type=int, default=0, help="use so many training images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    if args.epochs and not args.data:
        parser.error("--epochs needs --data")
    return args


def describe_device(device: str) -> str:
    from bbfast.training.device import cpu_has_bf16, resolve_device

    where = resolve_device(device)
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"CPU {'with' if cpu_has_bf16() else 'without'} bf16 units"


def ask(connection: Connection) -> dict[str, float]:
    connection.send("go")
    answer = connection.recv()
    if "error" in answer:
        sys.exit(answer["error"])
    return answer


def serve(variant: str, spec: dict[str, Any], connection: Connection) -> None:
    torch.set_num_threads(spec["threads"])
    try:
        run = Plain(spec) if variant == "plain" else Ours(spec, VARIANTS[variant])
        while connection.recv() == "go":
            connection.send(run())
    except EOFError:
        return  # the parent is gone
    except Exception as error:
        connection.send({"error": f"{variant}: {error!r}"})


def load(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images uint8 [N, H, W, C] and labels."""
    if not spec["data"]:
        rng = np.random.default_rng(0)
        n = spec["steps"] * spec["batch_size"]
        images, labels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n)
        return images, labels, images[:1], labels[:1]
    with np.load(spec["data"]) as file:
        x, y, test_x, test_y = (file[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels"))
    n = spec["limit"] or len(x)
    if not spec["epochs"]:
        n = spec["steps"] * spec["batch_size"]
    return x[:n], y[:n], test_x, test_y


def build(spec: dict[str, Any], classes: int) -> torch.nn.Module:
    from bbfast import models

    torch.manual_seed(spec["seed"])
    return models.build(spec["model"], classes, 32)


def to_set(images: np.ndarray, labels: np.ndarray) -> Any:
    from bbfast import ImageSet

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels, torch.from_numpy(labels).long(), mean=MEAN, std=STD)


class Ours:
    """``bbfast.train``; a turn is one epoch over as many images as it has steps."""

    def __init__(self, spec: dict[str, Any], settings: dict[str, Any]) -> None:
        from bbfast import Recipe

        x, y, test_x, test_y = load(spec)
        self.spec, self.train, self.test = spec, to_set(x, y), to_set(test_x, test_y)
        self.model = build(spec, int(y.max()) + 1)
        self.recipe = Recipe(
            epochs=spec["epochs"] or 1,
            batch_size=spec["batch_size"],
            lr=spec["lr"],
            flip=True,
            eval_every=0,
            **settings,
        )

    def __call__(self) -> dict[str, float]:
        from bbfast import train

        clock = CLOCKS[self.spec["clock"]]
        started = clock()
        result = train(self.model, self.train, self.recipe, seed=self.spec["seed"], device=self.spec["device"])
        seconds = clock() - started
        if not self.spec["epochs"]:
            return {"seconds": seconds}
        return finished(self.model, self.test, seconds, len(self.train) * len(result.history))


class Plain:
    """What a user writes without bbfast."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from torchvision import transforms

        from bbfast.training import resolve_device

        x, y, test_x, test_y = load(spec)
        self.spec, self.device, self.test = spec, resolve_device(spec["device"]), to_set(test_x, test_y)
        self.model = build(spec, int(y.max()) + 1).to(self.device)
        transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        pairs = Transformed(x, y, transform)
        self.loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            pairs, batch_size=spec["batch_size"], shuffle=True
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=spec["lr"], momentum=0.9, weight_decay=5e-4)
        self.epochs = spec["epochs"] or 1
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.epochs)

    def __call__(self) -> dict[str, float]:
        clock = CLOCKS[self.spec["clock"]]
        started = clock()
        self.model.train()
        for _ in range(self.epochs):
            for images, labels in self.loader:
                images, labels = images.to(self.device), labels.to(self.device)
                self.optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(self.model(images), labels)
                loss.backward()
                self.optimizer.step()
            if self.spec["epochs"]:
                self.scheduler.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = clock() - started
        if not self.spec["epochs"]:
            return {"seconds": seconds}
        return finished(self.model, self.test, seconds, len(self.loader.dataset) * self.epochs)  # type: ignore[arg-type]


class Transformed(torch.utils.data.Dataset[Any]):
    """One image at a time, as the field's data sets do."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def finished(model: torch.nn.Module, test: Any, seconds: float, images: int) -> dict[str, float]:
    from bbfast import predict

    accuracy = (predict(model, test).argmax(1) == test.labels).double().mean()
    return {"c_acc": float(accuracy), "seconds": seconds, "images_per_second_best": images / seconds}


def show(results: dict[str, dict[str, Any]], base: str) -> None:
    shown = [key for key, value in results[base].items() if isinstance(value, float)]
    print(f"{'':10}" + "".join(f"{key:>28}" for key in shown) + f"{'times ' + base + ' (best)':>24}")
    for name, values in results.items():
        ratio = values["images_per_second_best"] / results[base]["images_per_second_best"]
        print(f"{name:10}" + "".join(f"{values[key]:28.3f}" for key in shown) + f"{ratio:24.2f}")


if __name__ == "__main__":
    main()
