"""AGPD: poisoned samples of a class pull its logit in another direction than clean ones do."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from bbfast.defenses._content import content_keys
from bbfast.defenses.base import Defense, DefenseConfig, register_defense
from bbfast.defenses.card import DefenseCard
from bbfast.defenses.detection._gradients import gradient_layers, layer_gradients
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.view import DefenderView
from bbfast.errors import DataRequirementError, UnsupportedModelError

__all__ = ["AGPD", "Absorption", "absorb", "class_gaps", "find_targets", "stop_round"]

_log = logging.getLogger(__name__)

_BINS = 99
_WINDOW = 10
_FEWEST_CLASSES = 8


@register_defense("agpd")
class AGPD(Defense):
    """Compare each sample's gradient of its label's logit with that of clean images of the class.

    1. ``g_l(x)``: gradient of the given label's logit by the output of layer ``l``, averaged over positions; all layers
       in one backward pass. ``r``: its mean over the reserve images of the class that are predicted correctly.
    2. For layer and class: the anchor is the sample least similar (cosine) to ``r``; ``gap`` is the root mean square,
       over the other samples, of the difference between their similarities to ``r`` and to the anchor.
    3. ``J* = max(0, gap - median) / (1.4826 (MAD + 1e-6))`` over the classes; the layer with the largest one is taken,
       its classes above ``anomaly_threshold`` are targets. If there are none: those with ``gap > gap_threshold`` in
       that of the second to fourth last layers that has most such classes.
    4. In a target class the anchor's group absorbs the samples that are nearer to its mean than to ``r``, round by
       round: ``rate = d(g, c) / (d(g, c) + d(g, r))``, ``d = 1 - cos``, scaled to 0..1 over the samples left; those up
       to ``tau`` join. The group before the 10 rounds in which the rates' histogram changes least (mean + 5 standard
       deviations of the Jensen-Shannon distance of consecutive rounds) is flagged.

    The score is minus the round in which a sample joined, ties by its rate, over the number of rounds: 0 for the
    anchor; -1 in classes that are not targets.

    **What it can see.** Poison whose logit depends on other channels than the class's own images use, in one or few
    target classes among at least 8 (a warning is logged with fewer). It cannot see all-to-all attacks by ``J*``, only
    by ``gap_threshold``. In small networks gradients hardly differ between samples, and no class may stand out: on
    digits with small_cnn the rounds rank poison rightly within its class, but ``J*`` mostly stays below its threshold,
    and scaled histograms stop too early.

    Samples of classes with fewer than ``min_samples`` samples, or without a reserve image that is predicted correctly,
    are not scored: score NaN, flag False, the classes listed in ``info["unscored"]``. The result does not depend on
    storage order. Memory: 4 bytes a sample and channel of the layers taken (768 MB for 50,000 samples and
    PreAct-ResNet18).

    Source: Yuan et al., arXiv 2312.06230. ``tau`` has no default in BackdoorBench; 0.05 is a reconstruction. Not copied
    from it: a pass over the whole data for each layer and class, a crash where the first round is the stop.
    """

    card = DefenseCard(
        title="Activation Gradient based Poisoned Sample Detection",
        paper="Yuan et al., Activation Gradient based Poisoned Sample Detection Against Backdoor Attacks, 2023",
        year=2023,
        arxiv="2312.06230",
        kinds=("detection",),
        needs=frozenset({"model", "poisoned_train", "reserve"}),
        summary="Finds the class whose samples pull its logit in two directions, and those that pull the wrong way.",
        deviations=(
            "All layers from one backward pass; BackdoorBench runs the model for each layer and class.",
            "tau is 0.05; the paper's code asks for it.",
            "Histograms are of the scaled rates, a reconstruction; histogram='raw' takes the rates before scaling.",
            "Gradients stay float32 and cosines are float64.",
            "Layers of ConvNeXt (depthwise convolutions) and ViT (blocks, mean over tokens) are ours.",
        ),
    )

    class Config(DefenseConfig):
        """Settings of AGPD.

        Args:
            reserve_per_class: Clean images a class.
            anomaly_threshold: ``J*`` of a target class.
            gap_threshold: Gap of a target class where no ``J*`` stands out.
            tau: Scaled rate up to which samples join the group.
            histogram: Rates whose histogram tells the stop: ``scaled`` may stop early where groups overlap, ``raw``
                late where they lie apart.
            min_samples: Fewest training samples of a class that is scored.
            batch_size: Images in a pass.
        """

        presets: ClassVar[dict[str, dict[str, Any]]] = {"bbfast": {}}

        reserve_per_class: int = Field(10, ge=1)
        anomaly_threshold: float = Field(math.exp(2), gt=0)
        gap_threshold: float = Field(0.3, gt=0, le=2)
        tau: float = Field(0.05, gt=0, lt=1)
        histogram: Literal["scaled", "raw"] = "scaled"
        min_samples: int = Field(10, ge=2)
        batch_size: int = Field(256, ge=1)

    def check(self, view: DefenderView) -> None:
        gradient_layers(view)
        if len(view.reserve) == 0:
            raise DataRequirementError("agpd needs clean images for its reference gradients, the reserve has none")

    def run(self, view: DefenderView) -> DefenseResult:
        cfg = self.config
        self.check(view)
        clock = time.perf_counter()
        layers = gradient_layers(view)
        images, labels = view.poisoned_train.images, view.poisoned_train.labels.to(view.device)
        order = content_keys(images).argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]
        gradients, _ = layer_gradients(view, images, labels, order, layers, cfg.batch_size)
        counts = torch.bincount(labels, minlength=view.num_classes)
        read = time.perf_counter()
        references = self._references(view, layers)
        calibrated = time.perf_counter()

        sizes = counts.tolist()
        wanted = [c for c in references if sizes[c] >= cfg.min_samples]
        start = [sum(sizes[:c]) for c in range(view.num_classes)]
        gaps = torch.full((len(layers), view.num_classes), torch.nan, dtype=torch.float64)
        anchors = torch.zeros(len(layers), view.num_classes, dtype=torch.int64)
        for number, values in enumerate(gradients):
            for c in wanted:
                mine = values[start[c] : start[c] + sizes[c]]
                gaps[number, c], anchors[number, c] = class_gaps(mine, references[c][number])
        layer, anomaly, targets = find_targets(gaps, cfg.anomaly_threshold, cfg.gap_threshold)

        ranked = labels[order]
        scored_class = torch.tensor([c in wanted for c in range(view.num_classes)], device=view.device)
        scores = torch.where(scored_class[ranked], -1.0, torch.nan).double()
        flags = torch.zeros_like(ranked, dtype=torch.bool)
        threshold, rounds = torch.full((view.num_classes,), torch.inf), {}
        for c in targets:
            rows = slice(start[c], start[c] + sizes[c])
            found = absorb(gradients[layer][rows], references[c][layer], int(anchors[layer, c]), cfg.tau, cfg.histogram)
            scores[rows] = found.scores
            flags[rows] = found.joined <= found.stop
            threshold[c] = -(found.stop + 0.75) / (found.rounds + 1)
            rounds[c] = {"rounds": found.rounds, "stop": found.stop}
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        done = time.perf_counter()

        if len(wanted) < _FEWEST_CLASSES:
            _log.warning("agpd: %d classes are scored; outliers among fewer than 8 mean little", len(wanted))
        return DefenseResult(
            kind=self.card.kinds[0],
            scores=scores[back].float().cpu(),
            flags=flags[back].cpu(),
            threshold=threshold.float(),
            verdict={
                "backdoored": bool(targets),
                "targets": targets,
                "anomaly": {c: float(anomaly[c]) for c in wanted},
            },
            info={
                "seconds": {"features": read - clock, "calibrate": calibrated - read, "score": done - calibrated},
                "calibration": {
                    "samples": len(view.reserve),
                    "anomaly_threshold": cfg.anomaly_threshold,
                    "gap_threshold": cfg.gap_threshold,
                },
                "layer": layers[layer],
                "gap": {c: float(gaps[layer, c]) for c in wanted},
                "absorption": rounds,
                "unscored": [c for c in range(view.num_classes) if sizes[c] and c not in wanted],
            },
        )

    def _references(self, view: DefenderView, layers: list[str]) -> dict[int, list[Tensor]]:
        """For each class with a correctly predicted reserve image: mean gradient of each layer, float64 ``[C]``."""
        images, labels = view.reserve.images, view.reserve.labels.to(view.device)
        order = content_keys(images).argsort(stable=True)
        gradients, predicted = layer_gradients(view, images, labels, order, layers, self.config.batch_size)
        known = labels[order]
        right = {c: (known == c) & (predicted == c) for c in range(view.num_classes)}
        found = {c: [g[rows].double().mean(dim=0) for g in gradients] for c, rows in right.items() if bool(rows.any())}
        if not found:
            reason = f"it predicts none of {len(images)} clean images correctly"
            raise UnsupportedModelError("agpd", type(view.model).__name__, reason, "has it been trained?")
        return found


def class_gaps(gradients: Tensor, reference: Tensor) -> tuple[float, int]:
    """The gap of one class at one layer, and its anchor.

    Args:
        gradients: ``[n, C]``, n >= 2.
        reference: float64 ``[C]``.

    Returns:
        ``||u - v|| / sqrt(n)`` over all samples but the anchor, with the cosines ``u`` to the reference and ``v`` to
        the anchor; and the anchor's row.
    """
    unit = normalize(gradients.double(), dim=1)
    to_reference = unit @ normalize(reference, dim=0)
    anchor = int(to_reference.argmin())
    difference = to_reference - unit @ unit[anchor]
    difference[anchor] = 0
    return float(difference.norm()) / math.sqrt(len(unit)), anchor


def find_targets(
    gaps: Tensor, anomaly_threshold: float = math.exp(2), gap_threshold: float = 0.3
) -> tuple[int, Tensor, list[int]]:
    """The layer to look at, the classes' ``J*`` there, and the target classes, most suspicious first.

    Args:
        gaps: float64 ``[L, K]``, layers early to late; NaN for classes not scored.
        anomaly_threshold: ``J*`` of a target.
        gap_threshold: Gap of a target in the second to fourth last layers, where no ``J*`` stands out.
    """
    middle = gaps.nanquantile(0.5, dim=1, keepdim=True)
    spread = 1.4826 * ((gaps - middle).abs().nanquantile(0.5, dim=1, keepdim=True) + 1e-6)
    anomaly = ((gaps - middle) / spread).clamp(min=0)
    top = anomaly.nan_to_num(nan=-1.0).amax(dim=1)
    layer = int(top.argmax())
    guilty = anomaly[layer] > anomaly_threshold
    if not bool(guilty.any()):
        late = range(max(len(gaps) - 4, 0), len(gaps) - 1)
        wide = {number: gaps[number] > gap_threshold for number in late}
        most = max((int(found.sum()) for found in wide.values()), default=0)
        if most:
            layer = next(number for number, found in wide.items() if int(found.sum()) == most)
            guilty = wide[layer]
    ranks = torch.where(guilty, gaps[layer], -torch.inf).argsort(descending=True, stable=True)
    return layer, anomaly[layer], [c for c in ranks.tolist() if guilty[c]]


@dataclasses.dataclass(frozen=True, eq=False)
class Absorption:
    """How the anchor's group grew.

    Args:
        scores: float64 ``[n]``, in ``(-1, 0]``; a sample that joined earlier has a higher one.
        joined: int64 ``[n]``, round in which the sample joined, from 1; 0 for the anchor.
        rounds: Number of rounds.
        stop: Last round that is flagged; 0 flags the anchor alone.
    """

    scores: Tensor
    joined: Tensor
    rounds: int
    stop: int


def absorb(
    gradients: Tensor,
    reference: Tensor,
    anchor: int,
    tau: float = 0.05,
    histogram: Literal["scaled", "raw"] = "scaled",
) -> Absorption:
    """Let the anchor's group grow over the whole class.

    Args:
        gradients: ``[n, C]`` of the class.
        reference: float64 ``[C]``.
        anchor: Row of the first member.
        tau: Scaled rate up to which samples join, in ``(0, 1)``.
        histogram: Which rates tell the stop.
    """
    values = gradients.double()
    unit = normalize(values, dim=1)
    from_reference = (1 - unit @ normalize(reference, dim=0)).clamp(min=0)
    n = len(values)
    left = torch.ones(n, dtype=torch.bool, device=values.device)
    left[anchor] = False
    joined = torch.zeros(n, dtype=torch.int64, device=values.device)
    place = values.new_zeros(n)
    total = values[anchor].clone()
    histograms, number = [], 0
    while bool(left.any()):
        number += 1
        from_group = (1 - unit @ normalize(total, dim=0)).clamp(min=0)
        rate = (from_group / (from_group + from_reference).clamp(min=1e-300))[left]
        low, high = rate.aminmax()
        scaled = (rate - low) / (high - low) if high > low else torch.zeros_like(rate)
        histograms.append(torch.histc(scaled if histogram == "scaled" else rate.clamp(max=1), _BINS, 0, 1) / len(rate))
        rows = left.nonzero()[:, 0]
        near = scaled <= tau
        new = rows[near]
        joined[new] = number
        place[new] = scaled[near]
        left[new] = False
        total = total + values[new].sum(dim=0)
    stop = stop_round(torch.stack(histograms)) if histograms else 0
    return Absorption(-(joined + 0.5 * place / tau) / (number + 1), joined, number, stop)


def stop_round(histograms: Tensor, window: int = _WINDOW) -> int:
    """How many rounds come before the ``window`` rounds in which the histogram changes least.

    Args:
        histograms: ``[T, bins]``, parts that sum to 1, one a round.
        window: Distances of consecutive rounds looked at together; all of them if there are fewer.
    """
    if len(histograms) < 2:
        return 0
    p, q = histograms[:-1], histograms[1:]
    middle = (p + q) / 2
    divergence = sum(torch.special.xlogy(x, x / middle.clamp(min=1e-300)).sum(dim=1) for x in (p, q)) / 2
    assert isinstance(divergence, Tensor)
    distance = divergence.clamp(min=0).sqrt()
    windows = distance.unfold(0, min(window, len(distance)), 1)
    return int((windows.mean(dim=1) + 5 * windows.std(dim=1, correction=0)).argmin())
