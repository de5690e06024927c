"""Forward and backward of one batch: directly, or replayed from a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor, nn

from bbfast.data.loader import Batch
from bbfast.training.device import Numerics
from bbfast.training.program import Program
from bbfast.training.recipe import Recipe

__all__ = ["EagerStep", "GraphedStep", "graph_obstacle", "make_step"]

_log = logging.getLogger(__name__)
# Kernels choose their algorithms and workspaces in the first steps; those run directly.
_EAGER_STEPS = 3


class EagerStep:
    """Computes loss and gradients of a batch.

    Args:
        model: What the program's loss runs (compiled or not).
        program: Gives the loss.
        numerics: Number format.
        device: Where the model is.
        scaler: Loss scaler of fp16, disabled otherwise.
        parameters: Whose gradients are cleared first.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        numerics: Numerics,
        device: torch.device,
        scaler: torch.amp.GradScaler,
        parameters: list[nn.Parameter],
    ) -> None:
        self.model, self.program, self.numerics, self.device = model, program, numerics, device
        self.scaler, self.parameters = scaler, parameters

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Loss (scalar) and logits ``[B, K]`` (None if there are none), detached; gradients are in ``.grad``."""
        for p in self.parameters:
            p.grad = None
        with self.numerics.autocast(self.device):
            loss, logits = self.program.loss(self.model, batch)
        self.scaler.scale(loss).backward()
        return loss.detach(), None if logits is None else logits.detach()


@dataclasses.dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor
    logits: Tensor | None
    gradients: list[Tensor | None]


class GraphedStep:
    """Replays forward and backward from one CUDA graph per batch shape; optimiser and hooks stay outside.

    The first steps of a run and of a shape run directly on a side stream, as capturing asks for. If capturing fails,
    the run goes on without graphs and the log says why. Loss and logits are overwritten by the next step.
    """

    def __init__(self, eager: EagerStep) -> None:
        self._eager = eager
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._seen: dict[tuple[object, ...], int] = {}
        self._stream = torch.cuda.Stream(eager.device)
        self._failed = False

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """As :meth:`EagerStep.__call__`."""
        if self._failed:
            return self._eager(batch)
        key = _shape_key(batch)
        captured = self._captured.get(key)
        if captured is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= _EAGER_STEPS:
                return self._on_side_stream(batch)
            captured = self._capture(batch)
            if captured is None:
                return self._eager(batch)
            self._captured[key] = captured
        for name in ("x", "y", "index", "role", "weight"):
            target, source = getattr(captured.batch, name), getattr(batch, name)
            if target is not None:
                target.copy_(source)
        captured.graph.replay()
        for p, gradient in zip(self._eager.parameters, captured.gradients, strict=True):
            p.grad = gradient
        return captured.loss, captured.logits

    def _on_side_stream(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        current = torch.cuda.current_stream(self._eager.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._eager(batch)
        current.wait_stream(self._stream)
        return result

    def _capture(self, batch: Batch) -> _Captured | None:
        eager = self._eager
        static = batch.replace(
            **{
                name: value.clone()
                for name in ("x", "y", "index", "role", "weight")
                if (value := getattr(batch, name)) is not None
            }
        )
        graph = torch.cuda.CUDAGraph()
        for p in eager.parameters:
            p.grad = None
        try:
            # Casts of weights must be part of the graph, so autocast may not take them from its cache.
            with torch.cuda.graph(graph), eager.numerics.autocast(eager.device, cache=False):
                loss, logits = eager.program.loss(eager.model, static)
                with torch.autocast(eager.device.type, enabled=False):
                    loss.backward()
        except RuntimeError as error:
            self._failed = True
            self._captured.clear()
            _log.warning("CUDA graphs switched off, the step cannot be captured: %s", str(error).splitlines()[0])
            return None
        gradients = [p.grad for p in eager.parameters]
        return _Captured(graph, static, loss.detach(), None if logits is None else logits.detach(), gradients)


def graph_obstacle(recipe: Recipe, program: Program, numerics: Numerics, device: torch.device) -> str | None:
    """Why the step cannot be captured in a CUDA graph; None if it can."""
    if device.type != "cuda":
        return f"training runs on {device.type}"
    if recipe.compile:
        return "the model is compiled"
    if not program.graph_safe:
        return f"{type(program).__name__} does not declare its loss safe to capture (graph_safe)"
    if numerics.dtype == torch.float16:
        return "fp16 scales its loss on the host"
    return None


def make_step(recipe: Recipe, eager: EagerStep) -> EagerStep | GraphedStep:
    """The step a recipe asks for; one that cannot be had is replaced, with a line in the log."""
    if not recipe.cuda_graphs:
        return eager
    obstacle = graph_obstacle(recipe, eager.program, eager.numerics, eager.device)
    if obstacle is not None:
        _log.warning("CUDA graphs switched off: %s", obstacle)
        return eager
    return GraphedStep(eager)


def _shape_key(batch: Batch) -> tuple[object, ...]:
    parts = (batch.x, batch.y, batch.index, batch.role, batch.weight)
    return tuple(None if part is None else (tuple(part.shape), part.dtype, part.is_contiguous()) for part in parts)
