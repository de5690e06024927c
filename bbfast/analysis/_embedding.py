"""What t-SNE and UMAP share: features of a view, their principal components, statistics, and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast.analysis._layers import by_channel, finite
from bbfast.analysis.base import ToolConfig
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import class_colours, figure, legend, short_name
from bbfast.analysis.subject import Subject, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EmbeddingConfig", "draw_embedding", "embedding_numbers", "features", "principal", "sample", "statistics"]

_WIDEST, _NEIGHBOURS, _MOST = 16_384, 20, 5000
_NAMED, _LETTERS = 14, 24
"""Classes up to which each has its name in the legend, and letters of it."""


class EmbeddingConfig(ToolConfig):
    """Settings that all embeddings have.

    Args:
        view: ``mixed``: test images, a tenth of them triggered; ``bd_train``: the poisoned training set.
        layer: Name or role of the layer.
        c_sub: Classes at most, the target among them; poisoned samples of all classes stay.
        pca: Principal components that are embedded.
    """

    view: Literal["mixed", "bd_train"] = "mixed"
    layer: str = "last_conv"
    c_sub: int = Field(10, ge=1)
    pca: int = Field(50, ge=2)


def sample(subject: Subject, view: str, n: int | None, c_sub: int) -> View:
    """Samples of at most ``c_sub`` classes, as many of each, and poisoned ones; the same for every model."""
    whole = subject.view(view)
    wanted = whole.given[whole.poisoned].unique()
    if subject.num_classes > c_sub:
        others = torch.randperm(subject.num_classes, generator=subject.generator("classes"))
        others = others[~torch.isin(others, wanted)] if len(wanted) <= c_sub else others[:0]
        kept = torch.cat([wanted, others])[:c_sub]
        whole = whole.take((whole.poisoned | torch.isin(whole.labels, kept)).nonzero().flatten())
    return subject.some_of(whole, n, view)


def features(subject: Subject, layer: str, images: Tensor, tool: str = "an embedding") -> Tensor:
    """What a layer puts out, float32 ``[n, D]`` on the CPU: maps flattened, or their mean over space if that is more
    than 16,384 values an image; of tokens the first.

    Raises:
        UnsupportedModelError: naming the layer, if some of it is not finite.
    """
    name, module = subject.layer(layer)
    parts: list[Tensor] = []

    def keep(out: Tensor) -> None:
        out = finite(name, tool, out)
        if out.ndim == 3:
            out = out[:, 0]
        elif out.ndim == 4 and out[0].numel() > _WIDEST:
            out = by_channel(module, out).mean(2)
        parts.append(out.flatten(1).cpu())

    with subject.watching({name: keep}):
        subject.logits(images)
    return torch.cat(parts)


def principal(values: Tensor, count: int, seed: int) -> np.ndarray:
    """The first principal components of the samples, float32 ``[n, min(count, n, D)]``."""
    from sklearn.decomposition import PCA

    found = values.numpy()
    return np.asarray(PCA(min(count, *found.shape), random_state=seed).fit_transform(found), dtype=np.float32)


def statistics(points: np.ndarray, xy: np.ndarray, view: View) -> dict[str, float]:
    """Do the poisoned samples stand apart? On at most 5,000 samples.

    ``purity``: share of a poisoned sample's 20 nearest that are poisoned; ``purity_baseline``: share of poisoned
    samples. ``silhouette``, ``silhouette_2d``: mean over poisoned samples of ``(b - a) / max(a, b)``, ``a`` the mean
    distance to the other poisoned ones, ``b`` to the clean ones of the class that the attacker wants. ``separation``:
    ``|mean_p - mean_t| / sqrt(tr C_p / d + tr C_t / d)``. NaN where there are too few. Several targets: the mean over
    poisoned samples.

    Args:
        points: Features, ``[n, d]``; all but ``silhouette_2d`` are of them.
        xy: Their places in the plane, ``[n, 2]``.
        view: Which samples they are.
    """
    step = -(-len(points) // _MOST)
    points, xy = points[::step].astype(np.float64), xy[::step].astype(np.float64)
    poisoned, given, labels = (getattr(view, key).numpy()[::step] for key in ("poisoned", "given", "labels"))
    groups = [(poisoned & (given == t), ~poisoned & (labels == t)) for t in np.unique(given[poisoned])]
    out = {
        "purity": _purity(points, poisoned),
        "purity_baseline": float(poisoned.mean()),
        "silhouette": _weighted([(_silhouette(points[p], points[t]), p.sum()) for p, t in groups]),
        "silhouette_2d": _weighted([(_silhouette(xy[p], xy[t]), p.sum()) for p, t in groups]),
        "separation": _weighted([(_separation(points[p], points[t]), p.sum()) for p, t in groups]),
    }
    clean = {int(c): points[~poisoned & (labels == c)] for c in np.unique(labels[~poisoned])}
    spread = np.mean([np.sqrt(((own - own.mean(0)) ** 2).sum(1)).mean() for own in clean.values()])
    if poisoned.any() and spread > 0:
        centre = points[poisoned].mean(0)
        out |= {f"distance_to_{c}": float(np.linalg.norm(centre - own.mean(0)) / spread) for c, own in clean.items()}
    return out


def embedding_numbers(subject: Subject, view: View, points: np.ndarray, xy: np.ndarray, **more: float) -> Numbers:
    """The numbers of an embedding; ``more`` are further statistics."""
    found = statistics(points, xy, view) | more
    names = subject.class_names
    fields: dict[str, Any] = {key: value for key, value in found.items() if not key.startswith("distance_to_")}
    rows = [{"name": key, "value": value} for key, value in fields.items()]
    distances = [(int(key.removeprefix("distance_to_")), v) for key, v in found.items() if key not in fields]
    rows += [{"name": f"poisoned centre to class {names[c]} / spread", "value": v} for c, v in distances]
    if distances:
        fields["nearest_class"] = names[min(distances, key=lambda item: item[1])[0]]
    return Numbers(
        arrays={
            "xy": xy.astype(np.float32),
            "label": view.labels.numpy().astype(np.int16),
            "poison": view.poisoned.numpy(),
            "id": view.ids.numpy().astype(np.int32),
        },
        table=rows,
        summary=fields,
        meta={"target": subject.attack.target, "samples": len(view), "components": points.shape[1]},
    )


def draw_embedding(numbers: Numbers, title: str) -> Figure:
    """Classes in colours, poisoned samples black on top; large classes first, so that none hides a small one."""
    arrays, names = numbers.arrays, numbers.meta["class_names"]
    xy, labels, bad = arrays["xy"].astype(float), arrays["label"], arrays["poison"]
    low, high = xy.min(0), xy.max(0)
    xy = (xy - low) / np.where(high > low, high - low, 1)
    size = float(np.clip(9000 / len(xy), 0.6, 22))
    present = np.unique(labels[~bad])
    colours = dict(zip(present.tolist(), class_colours(len(present)), strict=True))
    note = f"{numbers.meta['caption']}; {numbers.meta['layer']}, {numbers.meta['components']} components, "
    with figure(6.6, 5.4, f"{note}{len(xy)} samples, {int(bad.sum())} with trigger") as made:
        axis = made.subplots()
        drawn = sorted(present.tolist(), key=lambda c: (-(labels == c).sum(), c))
        handles: dict[int, Any] = {}
        for label in drawn:
            own = (labels == label) & ~bad
            handles[label] = axis.scatter(xy[own, 0], xy[own, 1], s=size, alpha=0.7, lw=0, color=colours[label])
        crosses = axis.scatter(xy[bad, 0], xy[bad, 1], s=size, alpha=0.8, marker="x", lw=0.8, color="k")
        said = numbers.summary["purity"]
        known = f", 20-NN purity of the triggered {said:.2f}" if said is not None and np.isfinite(said) else ""
        axis.set(xticks=[], yticks=[], aspect="equal", title=f"{title}{known}")
        axis.set_xlabel(f"{title} 1")
        axis.set_ylabel(f"{title} 2")
        # Triggered samples last; of very many classes the target alone has a name.
        named = sorted(c for c in drawn if len(drawn) <= _NAMED or c == numbers.meta["target"])
        words = [*(_name(numbers, c, names) for c in named), "with trigger"]
        made_legend = legend(made, [*(handles[c] for c in named), crosses], words, loc="outside right center")
        for handle in made_legend.legend_handles:
            if handle is not None:
                handle.set(sizes=[24], alpha=1)
        for part in axis.collections:
            part.set_rasterized(True)
    return made


def _name(numbers: Numbers, label: int, names: list[str]) -> str:
    name = short_name(names[label], _LETTERS)
    return f"{name} (target)" if label == numbers.meta["target"] else name


def _purity(points: np.ndarray, poisoned: np.ndarray) -> float:
    """A poisoned sample's own place is not counted among its nearest."""
    count = min(_NEIGHBOURS, len(points) - 1)
    if not poisoned.any() or count < 1:
        return float("nan")
    rows = torch.from_numpy(np.flatnonzero(poisoned))
    whole, flags = torch.from_numpy(points), torch.from_numpy(poisoned)
    shares = []
    for part in rows.split(1024):
        distance = torch.cdist(whole[part], whole)
        distance[torch.arange(len(part)), part] = torch.inf
        shares.append(flags[distance.topk(count, largest=False).indices].double().mean(1))
    return float(torch.cat(shares).mean())


def _silhouette(poisoned: np.ndarray, clean: np.ndarray) -> float:
    if len(poisoned) < 2 or not len(clean):
        return float("nan")
    own, other = torch.from_numpy(poisoned), torch.from_numpy(clean)
    near = torch.cdist(own, own).sum(1) / (len(own) - 1)
    far = torch.cdist(own, other).mean(1)
    return float(((far - near) / torch.maximum(near, far).clamp_min(1e-12)).mean())


def _separation(poisoned: np.ndarray, clean: np.ndarray) -> float:
    if min(len(poisoned), len(clean)) < 2:
        return float("nan")
    spread = (poisoned.var(0, ddof=1).sum() + clean.var(0, ddof=1).sum()) / poisoned.shape[1]
    return float(np.linalg.norm(poisoned.mean(0) - clean.mean(0)) / max(np.sqrt(spread), 1e-12))


def _weighted(parts: list[tuple[float, Any]]) -> float:
    good = [(value, int(weight)) for value, weight in parts if np.isfinite(value)]
    return sum(v * w for v, w in good) / sum(w for _, w in good) if good else float("nan")
