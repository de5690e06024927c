"""The runner's judgement of a defense, with the ground truth that the defense never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbfast.data.imageset import ImageSet
from bbfast.defenses.result import DefenseResult

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult
    from bbfast.defenses.run import Population

__all__ = ["judge", "top_precision"]

_TOP_PERCENT = (1, 5)
_MODEL_METRICS = ("c_acc", "asr", "r_acc")


def judge(result: DefenseResult, attack: AttackResult, population: Population, device: torch.device) -> dict[str, Any]:
    """Metrics of whatever the defense gave: a model, scores and flags of training samples or of a stream, a verdict."""
    metrics: dict[str, Any] = {}
    if result.model is not None:
        metrics.update(_judge_model(result, attack, population, device))
    if result.scores is not None or result.flags is not None:
        metrics.update(_judge_samples(result, attack, population, device))
    if result.verdict:
        metrics.update(_judge_verdict(result, attack))
    return metrics


def _judge_model(
    result: DefenseResult, attack: AttackResult, population: Population, device: torch.device
) -> dict[str, Any]:
    from bbfast.evaluation import evaluate

    assert result.model is not None
    before = {name: attack.metrics.get(name) for name in _MODEL_METRICS}
    if not population.whole or None in before.values():
        # Before and after must be of the same images, and the reserve is no longer among them.
        before = evaluate(attack.model, population.test, population.backdoor_test, device=device)
    baseline = {name: float(before[name]) for name in _MODEL_METRICS}  # type: ignore[arg-type]
    metrics = evaluate(result.model, population.test, population.backdoor_test, baseline, device=device)
    return {**metrics, **{f"{name}_before": value for name, value in baseline.items()}}


def _judge_samples(
    result: DefenseResult, attack: AttackResult, population: Population, device: torch.device
) -> dict[str, Any]:
    from bbfast.training import predict_labels

    scores, flags = _rows(result.scores), _rows(result.flags)
    n = len(scores) if scores is not None else len(flags)  # type: ignore[arg-type]
    if population.stream is not None:
        stream = population.stream
        truth = stream.triggered
        _check_length(n, truth, "images of the stream")
        seen = ImageSet(stream.images, stream.wanted, mean=population.test.mean, std=population.test.std)
        effective = predict_labels(attack.model, seen, device=device) == stream.wanted
        whole = _detection(scores, truth, flags, "stream")
        part = _detection(_at(scores, effective), truth[effective], _at(flags, effective), "stream")
        return {**whole, **{f"effective_{name}": value for name, value in part.items() if name != "population"}}
    truth = attack.poisoned.cpu() if attack.role is None else attack.role.cpu() == 1
    _check_length(n, truth, "training samples")
    metrics = _detection(scores, truth, flags, "train")
    if scores is not None:
        metrics |= {f"precision_top_{percent:02d}": top_precision(scores, truth, percent) for percent in _TOP_PERCENT}
    return metrics


def _detection(scores: Tensor | None, truth: Tensor, flags: Tensor | None, population: str) -> dict[str, Any]:
    from bbfast.metrics import detection

    return {**detection(scores, truth, flags), "population": population, "samples": len(truth)}


def top_precision(scores: Tensor, truth: Tensor, percent: int) -> float:
    """Part of the ``percent`` % of samples with the highest scores that is poisoned: what isolating them would give.

    Of samples that tie for the last places the mean over all choices is taken, so that their order plays no part. NaN
    scores rank last. NaN if that part holds no sample.
    """
    count = percent * len(scores) // 100
    if not count:
        return float("nan")
    values = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = values.sort(descending=True).values[count - 1]
    above, tied = values > last, values == last
    share = (count - int(above.sum())) / int(tied.sum())
    return (int(truth[above].sum()) + share * int(truth[tied].sum())) / count


def _judge_verdict(result: DefenseResult, attack: AttackResult) -> dict[str, Any]:
    """The verdict as numbers, and whether it names the attacker's class (all-to-one attacks only)."""
    metrics: dict[str, Any] = {}
    if result.verdict.get("backdoored") is not None:
        metrics["backdoored"] = float(result.verdict["backdoored"])
    wanted = attack.backdoor_test.labels.unique()
    if "targets" in result.verdict and len(wanted) == 1:
        metrics["target_found"] = float(int(wanted) in result.verdict["targets"])
    return metrics


def _rows(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().cpu()


def _at(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values[mask]


def _check_length(n: int, truth: Tensor, what: str) -> None:
    if n != len(truth):
        raise ValueError(f"the defense scored {n} samples, expected one score for each of {len(truth)} {what}")
