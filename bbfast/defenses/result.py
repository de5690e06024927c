"""What a defense gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbfast.errors import ArtifactError

__all__ = ["DefenseResult"]

_KIND = "defense"
_TRIGGER_FIELDS = ("mask", "pattern")


@dataclasses.dataclass(eq=False)
class DefenseResult:
    """The outcome of one defense on one attack.

    A defense fills in what it made; :func:`bbfast.defend` adds ``metrics``, ``seconds`` and ``config``.

    Args:
        kind: Kind of the result, the first of the card's ``kinds``.
        model: Repaired or newly trained model in eval mode: normalised images to logits; None if the method makes none.
        scores: float32 ``[N]`` in the order of the inspected set; higher is more suspicious; NaN where the method
            cannot score.
        flags: bool ``[N]``, the decision at the method's own threshold.
        threshold: On the scale of ``scores``: a number, float32 ``[K]`` for one a class, or None.
        trigger: Recovered triggers: class to ``mask`` float32 ``[1, H, W]``, ``pattern`` float32 ``[C, H, W]`` (both
            0..1, pixel space), ``norm`` (L1 of the mask) and ``success`` (rate on the hold-out, 0..1).
        verdict: ``backdoored`` (bool or None), ``targets`` (classes, most suspicious first), ``anomaly`` (class to
            index).
        metrics: Numbers by name, computed by the runner with the ground truth.
        seconds: Wall time of the method, without building its view and without evaluation.
        config: Everything that determines the result: defense, settings, seed, hold-out, the attack it was run on.
        history: One dict an epoch, numbers of the defender's side only.
        selection: What was chosen, by which criterion, on which data.
        info: Further facts: seconds by phase, what was read, counts.
    """

    kind: str
    model: nn.Module | None = None
    scores: Tensor | None = None
    flags: Tensor | None = None
    threshold: float | Tensor | None = None
    trigger: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    verdict: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the result into ``folder``: safetensors and JSON, atomically.

        Raises:
            ArtifactError: if the folder exists and ``overwrite`` is False, or cannot be written.
        """
        from bbfast import artifact

        tensors: dict[str, dict[str, Tensor]] = {}
        extra: dict[str, Any] = {
            "kind": self.kind,
            "seconds": self.seconds,
            "verdict": _text_keys(self.verdict),
            "history": _text_keys(self.history),
            "selection": _text_keys(self.selection),
            "info": _text_keys(self.info),
            "threshold": self.threshold if isinstance(self.threshold, float | int) else None,
            "trigger": {
                str(target): {key: value for key, value in one.items() if key not in _TRIGGER_FIELDS}
                for target, one in self.trigger.items()
            },
        }
        if self.model is not None:
            from bbfast.models.state import model_state

            spec = getattr(self.model, "bbfast_spec", None)
            extra["model"] = None if spec is None else spec.to_dict()
            tensors["model"] = model_state(self.model)
        scores = {"scores": self.scores, "flags": self.flags, "threshold": self.threshold}
        rows = {name: _cpu(value) for name, value in scores.items() if isinstance(value, Tensor)}
        if rows:
            tensors["scores"] = rows
        if self.trigger:
            tensors["trigger"] = {
                f"{target}.{field}": _cpu(one[field])
                for target, one in self.trigger.items()
                for field in _TRIGGER_FIELDS
            }
        artifact.write(
            Path(folder),
            _KIND,
            config=_text_keys(self.config),
            metrics=_text_keys(self.metrics),
            tensors=tensors,
            extra=extra,
            overwrite=overwrite,
        )
        return Path(folder)

    @staticmethod
    def load(folder: str | Path, model: nn.Module | None = None) -> DefenseResult:
        """Read a result written by :meth:`save`; checksums are verified.

        Args:
            folder: The result's folder.
            model: A model of the right architecture to receive the weights, for one that :func:`bbfast.models.build`
                did not make; its own weights are overwritten.

        Raises:
            ArtifactError: if the folder holds no defense result, is damaged, or ``model`` is wanted and missing.
        """
        from bbfast import artifact

        stored = artifact.read(Path(folder), _KIND)
        extra = stored.extra
        loaded = _load_model(stored, extra, model) if "model" in extra else None
        rows = stored.tensors("scores") if "scores" in stored.stems else {}
        patterns = stored.tensors("trigger") if extra["trigger"] else {}
        trigger = {
            int(target): {**{field: patterns[f"{target}.{field}"] for field in _TRIGGER_FIELDS}, **numbers}
            for target, numbers in extra["trigger"].items()
        }
        verdict = dict(extra["verdict"])
        if verdict.get("anomaly") is not None:
            verdict["anomaly"] = {int(key): value for key, value in verdict["anomaly"].items()}
        return DefenseResult(
            kind=extra["kind"],
            model=loaded,
            scores=rows.get("scores"),
            flags=rows.get("flags"),
            threshold=rows.get("threshold", extra["threshold"]),
            trigger=trigger,
            verdict=verdict,
            metrics=stored.metrics,
            seconds=extra["seconds"],
            config=stored.config,
            history=extra["history"],
            selection=extra["selection"],
            info=extra["info"],
        )


def _load_model(stored: Any, extra: dict[str, Any], model: nn.Module | None) -> nn.Module:
    from bbfast.models import ModelSpec
    from bbfast.models.state import load_state

    if model is None:
        if extra["model"] is None:
            raise ArtifactError(
                "the result's model was not made by bbfast.models.build, so its architecture is not stored; give one: "
                "DefenseResult.load(folder, model=...)"
            )
        with torch.random.fork_rng(devices=[]):
            model = ModelSpec.from_dict(extra["model"]).build(weights=False)
    load_state(model, stored.tensors("model"))
    return model.eval()


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _text_keys(value: Any) -> Any:
    """``value`` with every mapping's keys as text, as JSON wants them, and tensors as lists."""
    if isinstance(value, Mapping):
        return {str(key): _text_keys(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_text_keys(item) for item in value]
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    return value
