"""Loss landscape: how flat the minimum is, on clean and on triggered images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LossLandscape", "directions", "loss_and_share", "moved"]

_CEILING, _RADIUS, _DRAWN = 1e4, 0.25, 10.0


def directions(model: nn.Module, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor], float]:
    """Two random directions, filter-normalised: ``d_o *= |w_o| / |d_o|`` for each row (filter) ``o`` of a weight.

    Zero for what is no filter: parameters of one dimension (biases, norms), those with one value a row (a layer's scale
    ``[C, 1, 1]``), tokens and position embeddings. The second is drawn by the same law; what it has of the first is
    taken away, filter by filter, before its lengths are set, so the two are orthogonal and both have the filters'
    lengths.

    Returns:
        The directions in the order of ``model.parameters()``, and their cosine.
    """
    first, second = [], []
    for name, value in model.named_parameters():
        if value.ndim < 2 or value[0].numel() < 2 or name.endswith(("class_token", "pos_embedding")):
            first.append(torch.zeros_like(value))
            second.append(torch.zeros_like(value))
            continue
        rows = value.detach().float().flatten(1)
        one, two = torch.randn((2, *rows.shape), generator=generator).to(rows.device)
        two = two - one * ((one * two).sum(1, keepdim=True) / one.square().sum(1, keepdim=True))
        length = rows.norm(dim=1, keepdim=True)
        for kept, row in ((first, one), (second, two)):
            kept.append((row * (length / (row.norm(dim=1, keepdim=True) + 1e-10))).view_as(value).to(value.dtype))
    inner = [
        sum(float((a.double() * b.double()).sum()) for a, b in zip(x, y, strict=True))
        for x, y in ((first, second), (first, first), (second, second))
    ]
    return first, second, inner[0] / max((inner[1] * inner[2]) ** 0.5, 1e-30)


@contextmanager
def moved(model: nn.Module) -> Iterator[Any]:
    """Gives ``go(a, b, d1, d2)``, which sets the parameters to ``theta + a d1 + b d2``; afterwards they are, to the
    bit, what they were."""
    values = [value.detach() for value in model.parameters()]
    theta = [value.clone() for value in values]

    def go(a: float, b: float, first: list[Tensor], second: list[Tensor]) -> None:
        torch._foreach_copy_(values, theta)
        torch._foreach_add_(values, first, alpha=a)
        torch._foreach_add_(values, second, alpha=b)

    try:
        yield go
    finally:
        torch._foreach_copy_(values, theta)


@register_tool("loss_landscape")
class LossLandscape(Tool):
    """The loss around the model: ``L(a, b) = loss(theta + a d1 + b d2)`` for two random filter-normalised directions.

    Three readings of the same directions: the loss of clean test images with their classes, of triggered ones with the
    classes that the attacker wants, and the shares of both that the model says. BatchNorm statistics stay as they are
    unless ``bn="recalibrate"``. The directions are drawn from the seed and the shapes alone, so that models of one
    architecture are compared along the same random draws. ``points^2 * 2 n`` images are looked at.

    Arrays: ``a``, ``b`` f32 ``[points]``; ``loss_clean``, ``loss_bd``, ``acc``, ``asr`` f32 ``[points, points]``, row
    ``a``, column ``b``; losses that overflow count as 10,000. Table: one row for each side: loss at the centre, the
    largest within a radius of 0.25, their ratio (``sharpness``), and the distance in each direction at which accuracy
    or ASR falls below half of the centre's (NaN: nowhere on the grid).

    Source: Li et al., NeurIPS 2018, arXiv 1712.09913, section 4.
    """

    card = ToolCard(
        title="Loss landscape",
        question="How flat is the loss around the model, and is the backdoor's basin a sharper one?",
        paper="H. Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913",
        deviations=(
            "Clean and triggered test images have surfaces of their own along the same directions; BackdoorBench has "
            "one, of the training set.",
            "The grid has an odd number of points, 31 a side, so that the model itself is one of them; BackdoorBench's "
            "has 30.",
            "The second direction is made orthogonal to the first; BackdoorBench prints their cosine.",
            "Directions along eigenvectors of the Hessian are not offered.",
        ),
    )

    class Config(ToolConfig):
        """Settings of the loss landscape.

        Args:
            points: Points a side, odd.
            extent: The grid goes from ``-extent`` to ``extent``, in lengths of the filters.
            n: Images of each side.
            bn: ``fixed``: BatchNorm statistics stay; ``recalibrate``: they are measured on the clean images at each
                point.
            batch: Images at a time.
        """

        points: int = Field(31, ge=3, le=201)
        extent: float = Field(1.0, gt=0)
        n: int = Field(2000, ge=1)
        bn: Literal["fixed", "recalibrate"] = "fixed"
        batch: int = Field(500, ge=1)

        @field_validator("points")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("must be odd, so that the model itself is on the grid")
            return value

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        config = self.config
        views = [subject.view(name, config.n) for name in ("clean_test", "bd_test")]
        for view in views:
            subject.logits(view.images, config.batch)  # refuses a model that is not finite itself
        sets = [(list(subject.batches(v.images, config.batch)), v.given.to(subject.device)) for v in views]
        steps = np.linspace(-config.extent, config.extent, config.points)
        steps[config.points // 2] = 0.0
        first, second, cosine = directions(subject.model, subject.generator("loss landscape"))
        found = np.zeros((4, config.points, config.points))
        buffers = [(value, value.clone()) for value in subject.model.buffers()]
        with torch.no_grad(), moved(subject.model) as go:
            try:
                for i, a in enumerate(steps.tolist()):
                    for j, b in enumerate(steps.tolist()):
                        go(a, b, first, second)
                        if config.bn == "recalibrate":
                            _recalibrate(subject.model, sets[0][0])
                        for side, (batches, labels) in enumerate(sets):
                            found[side, i, j], found[2 + side, i, j] = loss_and_share(subject.model, batches, labels)
            finally:
                for value, before in buffers:
                    value.copy_(before)
        overflow = ~np.isfinite(found[:2]) | (found[:2] > _CEILING)
        found[:2][overflow] = _CEILING
        arrays = {"a": steps, "b": steps} | dict(zip(("loss_clean", "loss_bd", "acc", "asr"), found, strict=True))
        table = [
            {"images": side, "n": len(view)} | _sharpness(steps, loss, share)
            for side, view, loss, share in zip(("clean", "bd"), views, found[:2], found[2:], strict=True)
        ]
        summary = {f"{key}_{row['images']}": row[key] for row in table for key in ("centre", "rise", "sharpness")}
        return Numbers(
            {key: value.astype(np.float32) for key, value in arrays.items()},
            table,
            summary | {"cosine": cosine},
            {"bn": config.bn, "n": [len(view) for view in views], "overflowed": int(overflow.sum())},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        from matplotlib.colors import LogNorm

        arrays, meta = numbers.arrays, numbers.meta
        a, b = (arrays[key].astype(float) for key in ("a", "b"))
        middle = len(a) // 2
        note = f"{meta['caption']}; {meta['n'][0]} clean, {meta['n'][1]} triggered images; BatchNorm {meta['bn']}; "
        sides = (("clean", CLEAN, "-", "without trigger"), ("bd", POISONED, "--", "with trigger"))
        words = f"{note}random filter-normalised directions; cross: the model, lines: losses 0.1 and 1"
        with figure(10.4, 3.9, words) as made:
            axes = made.subplots(1, 3)
            levels = np.geomspace(0.01, _DRAWN, 25)
            for axis, (side, _, _, words) in zip(axes, sides, strict=False):
                loss = np.clip(arrays[f"loss_{side}"].astype(float), levels[0], levels[-1])
                drawn = axis.contourf(a, b, loss.T, levels=levels, norm=LogNorm(levels[0], levels[-1]), cmap="viridis")
                axis.contour(a, b, loss.T, levels=[0.1, 1.0], colors="w", linewidths=0.7)
                axis.plot(0, 0, "+", color="w", ms=9, mew=1.6)
                axis.set(title=words, xlabel="direction 1", ylabel="direction 2", aspect="equal")
            bar = made.colorbar(drawn, ax=axes[1], label="cross-entropy, clipped", ticks=[0.01, 0.1, 1, 10])
            bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "≥ 10"])
            bar.ax.minorticks_off()
            cut = axes[2]
            for side, colour, line, words in sides:
                loss = np.clip(arrays[f"loss_{side}"][:, middle], 1e-4, _DRAWN)
                cut.semilogy(a, loss, line, color=colour, label=words)
            cut.axvline(0, color="#BBBBBB", lw=0.8, ls=":")
            cut.set_xlabel("direction 1")
            cut.set_title("cross-entropy along direction 1", pad=22)
            cut.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1, columnspacing=1.0)
        return made


def loss_and_share(model: nn.Module, batches: list[Tensor], labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and share of ``labels`` that the model says."""
    loss, right, start = 0.0, 0, 0
    for x in batches:
        y = labels[start : start + len(x)]
        logits = model(x).float()
        loss += float(F.cross_entropy(logits, y, reduction="sum").double())
        # The largest of NaNs is the first class, which nobody said.
        right += int(((logits.argmax(1) == y) & logits.isfinite().all(1)).sum())
        start += len(x)
    return loss / start, right / start


def _recalibrate(model: nn.Module, batches: list[Tensor]) -> None:
    """BatchNorm statistics of the images, averaged over the batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x in batches:
        model(x)
    for norm, rate in zip(norms, rates, strict=True):
        norm.momentum = rate
        norm.eval()


def _sharpness(steps: np.ndarray, loss: np.ndarray, share: np.ndarray) -> dict[str, Any]:
    middle = len(steps) // 2
    near = np.hypot(steps[:, None], steps[None, :]) <= _RADIUS + 1e-9
    centre, most = float(loss[middle, middle]), float(loss[near].max())
    row: dict[str, Any] = {"centre": centre, "most_near": most, "rise": most - centre}
    row["sharpness"] = most / centre if centre > 0 else float("inf")
    cuts = {
        "+1": share[middle:, middle],
        "-1": share[middle::-1, middle],
        "+2": share[middle, middle:],
        "-2": share[middle, middle::-1],
    }
    for name, values in cuts.items():
        below = np.flatnonzero(values < values[0] / 2)
        row[f"half_at_{name}"] = float(steps[middle + below[0]]) if len(below) else float("nan")
    return row
