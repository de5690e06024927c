"""What a trigger does along the depth of a network: separability, trigger neurons, concentration of its change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bbfast.analysis._change import changes
from bbfast.analysis._layers import by_channel, channel_layers, finite
from bbfast.analysis._lipschitz import agreement, channel_bounds, paired
from bbfast.analysis._topk import classes_of, in_order, top_images
from bbfast.analysis.subject import Subject, View
from bbfast.models import roles

__all__ = ["blocks", "channel_changes", "gini", "overlap", "pooled", "probe_auroc", "probe_view", "trigger_neurons"]

_WHO = "study representation"
_FOLDS = 5


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The first convolution and every block by name, in the order of the network: the parts of each stage that is a
    sequence of several, else the stage; of a model whose stages are not known, every convolution and linear layer."""
    table, known = roles(model), dict(model.named_modules())
    names: list[str] = []
    for role in (f"stage{i}" for i in range(1, 6)):
        for name in table.names(role) if table.has(role) else ():
            stage = known[name]
            parts = [f"{name}.{child}" for child, _ in stage.named_children()] if type(stage) is nn.Sequential else []
            names += parts if len(parts) > 1 else [name]
    layers = _weighted(model)
    if not names:
        return layers
    first = next(iter(layers))
    return {name: known[name] for name in (() if any(first.startswith(f"{n}.") for n in names) else (first,))} | {
        name: known[name] for name in names
    }


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers but the classifier: a BatchNorm behind one has the same channels again."""
    logits = roles(model).table["classifier"]
    found = channel_layers(model, _WHO)
    return {n: m for n, m in found.items() if not isinstance(m, nn.BatchNorm2d) and n not in logits}


@torch.no_grad()
def pooled(subject: Subject, images: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, NDArray[np.float32]]:
    """What each layer puts out, averaged over space, float32 ``[n, C]``, by name."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keeper(name: str, layer: nn.Module) -> Any:
        return lambda out: kept[name].append(finite(name, _WHO, by_channel(layer, out)).mean(2).cpu())

    with subject.watching({name: keeper(name, layer) for name, layer in layers.items()}):
        for x in subject.batches(images):
            subject.model(x)
    return {name: torch.cat(parts).numpy() for name, parts in kept.items() if parts}


def probe_view(subject: Subject, n: int) -> View:
    """Poisoned training samples and as many clean ones that carry the target label, at most ``n`` of each.

    The clean ones are of the labels that the poisoned were given, all of them for an attack with many targets.
    """
    train = subject.view("bd_train")
    bad = train.poisoned.nonzero().flatten()
    clean = (~train.poisoned & torch.isin(train.given, train.given[bad].unique())).nonzero().flatten()
    count = min(len(bad), len(clean), n)
    generator = subject.generator("probe")
    picked = [group[torch.randperm(len(group), generator=generator)[:count]] for group in (bad, clean)]
    return train.take(torch.cat(picked))


def probe_auroc(features: NDArray[Any], truth: NDArray[np.bool_], seed: int = 0) -> tuple[float, float]:
    """AUROC of a logistic regression (L2 of weight 1, standardised features): mean and standard deviation over five
    stratified folds; NaN with fewer than five samples of a kind.

    Args:
        features: ``[n, C]``.
        truth: bool ``[n]``.
        seed: Of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(truth.sum(), (~truth).sum()) < _FOLDS:
        return float("nan"), float("nan")
    scores = []
    for train, test in StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(features, truth):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        probe.fit(features[train].astype(np.float64), truth[train])
        scores.append(roc_auc_score(truth[test], probe.decision_function(features[test].astype(np.float64))))
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def gini(values: ArrayLike) -> float:
    """Gini coefficient of non-negative values: 0 if all are equal, ``1 - 1 / n`` if one has all; NaN if all are 0."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    total = x.sum()
    if not len(x) or total <= 0:
        return float("nan")
    return float(((2 * np.arange(1, len(x) + 1) - len(x) - 1) * x).sum() / (len(x) * total))


def trigger_neurons(subject: Subject, n: int) -> dict[str, tuple[int, int]]:
    """For each convolution and linear layer the channels most of whose strongest images carry the trigger, and all its
    channels. As the tool activation_distribution counts: of ``mixed`` test images as many as carry the trigger."""
    view = in_order(subject.view("mixed", n))
    m = int(view.poisoned.sum())
    classes = classes_of(view, subject.num_classes)
    found = top_images(subject, view, _weighted(subject.model), m, _WHO)
    shares = {
        name: (classes[top.ids.cpu()] == subject.num_classes).double().mean(1).numpy() for name, top in found.items()
    }
    return {name: (int((share > 0.5).sum()), len(share)) for name, share in shares.items()}


def channel_changes(subject: Subject, n: int) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Trigger activation change of each channel of each convolution and linear layer: ``l2``, and ``z`` in standard
    deviations of the channel on clean images (see the tool trigger_activation_change)."""
    sums = changes(subject, subject.pairs(n), _weighted(subject.model), _WHO)
    return {one.name: (one.means()[1].double().numpy(), one.means()[2].double().numpy()) for one in sums}


def overlap(subject: Subject, l2: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """How far the channels that the trigger moves most are those that can amplify most: Jaccard index of the top 5 %
    and rank correlations, as the tool lipschitz has them; a convolution counts with the BatchNorm that it feeds."""
    layers = channel_layers(subject.model, _WHO)
    pairing = paired(subject.model, subject.image_size)
    norm_of = {conv: norm for norm, conv in pairing.convs.items()}
    bounds = {
        name: channel_bounds(layers[norm_of[name]], layers[name]).numpy()
        if name in norm_of
        else channel_bounds(layers[name]).numpy()
        for name in l2
    }
    names = [name for name in l2 if name in norm_of] or list(l2)
    return agreement(bounds, dict(l2), names)
