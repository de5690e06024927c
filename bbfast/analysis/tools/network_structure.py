"""Network structure: layers, shapes, parameters and work; and what a defense changed in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bbfast.analysis._layers import strip_width
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, OTHER, POISONED, TARGET, figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NetworkStructure", "layers_of"]

_KINDS = {"convolution": CLEAN, "norm": POISONED, "linear": TARGET, "other": OTHER}


def layers_of(model: nn.Module, image_size: tuple[int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """Every layer that has parameters of its own or does work, in the order of registration.

    Work is in multiply-accumulates for one image: of a convolution ``outputs C_in / groups kh kw``, of a linear layer
    ``outputs inputs``, of attention its two projections and ``2 T^2 D``; everything else counts as none.

    Args:
        model: In eval mode.
        image_size: ``(C, H, W)``.
        device: Of the model.

    Returns:
        ``layer``, ``type``, ``shape`` of the output (empty if it is not called), ``params`` (own ones; shared ones
        count where they come first), ``macs``.
    """
    shapes: dict[str, list[int]] = {}
    work: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, Tensor):
                shapes[name] = list(out.shape[1:])
                work[name] = work.get(name, 0) + _macs(module, inputs, out)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *image_size, device=device))
    finally:
        for handle in hooks:
            handle.remove()
    counted: set[int] = set()
    found = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted |= {id(p) for p in own}
        if own or work.get(name):
            shape = "x".join(map(str, shapes.get(name, [])))
            found.append(
                {
                    "layer": name or "(model)",
                    "type": type(module).__name__,
                    "shape": shape,
                    "params": sum(p.numel() for p in own),
                    "macs": work.get(name, 0),
                }
            )
    return found


@register_tool("network_structure")
class NetworkStructure(Tool):
    """The layers of the model with output shape, parameters and multiply-accumulates for one image.

    For a defended model also what it changed in each: ``|W - W0| / |W0|`` over the layer's parameters, the same of its
    running statistics, and the filters (rows, norm channels) that are all zero and were not before.

    Arrays (L layers): ``params``, ``macs`` int64 ``[L]``; of a defended model also ``rel_change``, ``stats_change``
    float64 ``[L]`` (NaN where there is nothing to compare) and ``pruned`` int64 ``[L]``. Table: a row a layer.
    """

    card = ToolCard(
        title="Network structure",
        question="What is the network made of, and what did the defense change in it?",
        deviations=(
            "A table and its figure instead of a graph of nodes, which needs the graphviz program.",
            "A defended model is compared with the attacked one, layer by layer.",
        ),
        quick=True,
    )
    Config = ToolConfig

    def measure(self, subject: Subject) -> Numbers:
        table = layers_of(subject.model, subject.image_size, subject.device)
        total = sum(p.numel() for p in subject.model.parameters())
        macs = sum(row["macs"] for row in table)
        for row in table:
            row["params_share"] = row["params"] / total if total else 0.0
            row["macs_share"] = row["macs"] / macs if macs else 0.0
        summary: dict[str, Any] = {"parameters": total, "macs": macs, "layers": len(table)}
        keys = ["params", "macs"]
        if subject.defense is not None:
            before = dict(subject.attacked_model.named_modules())
            after = dict(subject.model.named_modules())
            for row in table:
                name = "" if row["layer"] == "(model)" else row["layer"]
                row |= _compared(before.get(name), after[name])
            known = {row["layer"] for row in table}
            gone = [n for n, m in before.items() if n and n not in known and any(True for _ in m.parameters(False))]
            moved = [row["rel_change"] for row in table if math.isfinite(row["rel_change"])]
            summary |= {
                "largest_change": max(moved, default=float("nan")),
                "most_changed": max(
                    table, key=lambda row: row["rel_change"] if math.isfinite(row["rel_change"]) else -1.0
                )["layer"],
                "pruned": sum(row["pruned"] for row in table),
                "replaced": sum(row["replaced"] for row in table),
                "removed": len(gone),
            }
            keys += ["rel_change", "stats_change", "pruned"]
        kinds = {"params": np.int64, "macs": np.int64, "pruned": np.int64}
        return Numbers(
            arrays={key: np.array([row[key] for row in table], dtype=kinds.get(key, np.float64)) for key in keys},
            table=table,
            summary=summary,
            meta={
                "layers": [row["layer"] for row in table],
                "kinds": [_kind(row["type"]) for row in table],
                "defended": subject.defense is not None,
            },
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        names, kinds, summary = numbers.meta["layers"], numbers.meta["kinds"], numbers.summary
        at = np.arange(len(names))
        defended = numbers.meta["defended"]
        with figure(strip_width(len(names)), 7.0 if defended else 5.4, numbers.meta["caption"]) as made:
            axes = made.subplots(3 if defended else 2, 1, sharex=True)
            panels = [("params", "parameters"), ("macs", "multiply-\naccumulates")]
            panels += [("rel_change", "change of weights\n|W - W0| / |W0|")] if defended else []
            colours = [_KINDS[kind] for kind in kinds]
            for axis, (key, label) in zip(axes, panels, strict=True):
                axis.bar(at, np.nan_to_num(numbers.arrays[key].astype(float)), color=colours, width=0.8)
                axis.set(ylabel=label, xlim=(-0.7, len(names) - 0.3))
                axis.grid(axis="y", color="#DDDDDD", lw=0.5)
                axis.set_axisbelow(True)
                if key != "rel_change":
                    axis.yaxis.set_major_formatter(_engineering)
            if defended:
                for i in np.flatnonzero(numbers.arrays["pruned"]).tolist():
                    height = np.nan_to_num(numbers.arrays["rel_change"][i])
                    axes[-1].annotate(
                        str(numbers.arrays["pruned"][i]),
                        (i, height),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize=7,
                    )
                if summary["pruned"]:
                    axes[-1].set_title("number: filters newly zero", fontsize=9, loc="right")
                axes[-1].margins(y=0.15)
            axes[-1].set_xticks(at, names, rotation=90, fontsize=8 if len(names) > 24 else 9)
            from matplotlib.patches import Patch

            shown = [kind for kind in _KINDS if kind in kinds]
            axes[0].legend(
                handles=[Patch(color=_KINDS[kind], label=kind) for kind in shown],
                loc="lower right",
                bbox_to_anchor=(1.0, 1.0),
                ncols=len(shown),
                borderaxespad=0.1,
            )
            axes[0].set_title(
                f"{_engineering(summary['parameters'])} parameters, {_engineering(summary['macs'])} MACs", loc="left"
            )
        return made


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size[0] * module.kernel_size[1]
        return out[0].numel() * module.in_channels // module.groups * kernel
    if isinstance(module, nn.Linear):
        return out[0].numel() * module.in_features
    if isinstance(module, nn.MultiheadAttention):
        # Three projections in, one out, scores and their use; its output layer is never called as a module.
        tokens, width = out.shape[1], out.shape[2]
        return 4 * tokens * width**2 + 2 * tokens**2 * width
    return 0


def _compared(before: nn.Module | None, after: nn.Module) -> dict[str, Any]:
    """What changed of a layer's own parameters and buffers."""
    nan = float("nan")
    same = before is not None and type(before) is type(after)
    old, new = (_own(module) if module is not None else {} for module in (before, after))
    if not same or {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        return {"rel_change": nan, "stats_change": nan, "pruned": 0, "replaced": 1}
    assert before is not None
    keys = [key for key, _ in after.named_parameters(recurse=False)]
    pruned = 0
    if "weight" in keys and "weight" in old:
        zero = [(w["weight"].flatten(1) if w["weight"].dim() > 1 else w["weight"][:, None]) == 0 for w in (old, new)]
        pruned = int((zero[1].all(1) & ~zero[0].all(1)).sum())
    stats = [key for key in new if key not in keys]
    return {
        "rel_change": _relative(old, new, keys),
        "stats_change": _relative(old, new, stats),
        "pruned": pruned,
        "replaced": 0,
    }


def _own(module: nn.Module) -> Mapping[str, Tensor]:
    """Floating parameters and buffers of the layer itself."""
    both = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {key: value.detach().double() for key, value in both if value.is_floating_point()}


def _relative(old: Mapping[str, Tensor], new: Mapping[str, Tensor], keys: list[str]) -> float:
    if not keys:
        return float("nan")
    gap = sum(float((new[key] - old[key]).square().sum()) for key in keys)
    size = sum(float(old[key].square().sum()) for key in keys)
    return math.sqrt(gap / size) if size else (0.0 if not gap else float("nan"))


def _kind(name: str) -> str:
    if "Norm" in name:
        return "norm"
    if "Conv" in name:
        return "convolution"
    return "linear" if "Linear" in name else "other"


def _engineering(value: float, _: Any = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"
