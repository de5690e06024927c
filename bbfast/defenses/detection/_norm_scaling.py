"""A network and variants of it with amplified normalisation layers, run in one pass that shares what is common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bbfast.defenses.features import normalised
from bbfast.errors import UnsupportedModelError
from bbfast.training.device import Numerics

__all__ = ["ScaledNorms", "affine_norms", "first_count", "model_name", "scaling_consistency"]


def affine_norms(model: nn.Module, kind: str) -> list[nn.Module]:
    """Affine BatchNorm2d (``kind="batch"``) or LayerNorm (``"layer"``) modules in the order of registration."""
    if kind == "batch":
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    return [m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine]


class ScaledNorms:
    """Variants of a network: in variant ``i`` weight and bias of the last ``counts[i]`` layers are times ``omega``.

    Nothing is copied or changed. An affine layer whose weight and bias are multiplied gives its output multiplied, so
    hooks multiply outputs, and all variants go through the network as one batch. Up to the first layer that any of them
    changes they are the same network: the images go that far once, and are repeated for the variants at the input of
    the innermost module after which everything depends on that input alone. Which one that is follows from a trial: a
    module qualifies if the pass works and its logits agree with those of images repeated from the start.

    Args:
        model: Normalised images to logits; in eval mode.
        norms: The layers, see :func:`affine_norms`.
        counts: Ascending, each ``0..len(norms)``.
        omega: Factor, positive.
        trial: Two or more normalised images for the trial, in float32; None repeats from the start.

    Attributes:
        shared: Dotted name of the module at whose input images are repeated; empty for the network itself.
    """

    def __init__(
        self, model: nn.Module, norms: Sequence[nn.Module], counts: Sequence[int], omega: float, trial: Tensor | None
    ) -> None:
        if list(counts) != sorted(counts) or not counts or not 0 <= counts[0] <= counts[-1] <= len(norms):
            raise ValueError(f"counts must ascend within 0..{len(norms)}, at least one, got {list(counts)}")
        self.model, self.omega, self.variants = model, omega, len(counts)
        # Layer j from the end is changed in the variants from the first whose count reaches j.
        first = [sum(count < len(norms) - index for count in counts) for index in range(len(norms))]
        self._changed = [(norm, start) for norm, start in zip(norms, first, strict=True) if start < self.variants]
        self.shared = "" if trial is None else self._innermost(trial)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[variants, B, K]`` of normalised images ``[B, C, H, W]``."""
        return self._pass(x, self.shared)

    def _pass(self, x: Tensor, shared: str) -> Tensor:
        with self._hooked(shared, len(x)):
            return self.model(x).unflatten(0, (self.variants, len(x)))

    @contextlib.contextmanager
    def _hooked(self, shared: str, batch: int) -> Iterator[None]:
        def repeat(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if args[0].shape[0] != batch:
                raise RuntimeError("the module is called more than once")
            return (args[0].repeat(self.variants, *[1] * (args[0].dim() - 1)), *args[1:])

        def amplify(start: int) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                output[start * batch :].mul_(self.omega)  # a norm's output is its own memory: no copy
                return output

            return hook

        handles = [self.model.get_submodule(shared).register_forward_pre_hook(repeat)]
        handles += [norm.register_forward_hook(amplify(start)) for norm, start in self._changed]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _innermost(self, trial: Tensor) -> str:
        if not self._changed:
            return ""
        expected = self._pass(trial, "")
        tolerance = 1e-4 * float(expected.nan_to_num(0, 0, 0).abs().amax())
        path = next(name for name, module in self.model.named_modules() if module is self._changed[0][0]).split(".")
        for depth in range(len(path), 0, -1):
            name = ".".join(path[:depth])
            try:
                found = self._pass(trial, name)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                continue  # something after the module also depends on what came before: shapes do not fit
            if found.shape == expected.shape and torch.allclose(found, expected, 0, tolerance, equal_nan=True):
                return name
        return ""


@torch.inference_mode()
def first_count(
    model: nn.Module,
    norms: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    omega: float,
    error_rate: float,
    together: int = 5,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    numerics: Numerics,
) -> tuple[int, list[float]]:
    """The smallest number of amplified layers with an error above ``error_rate``, 0 if there is none.

    Args:
        model: Normalised images to logits; in eval mode.
        norms: Its layers, see :func:`affine_norms`.
        images: uint8 ``[N, C, H, W]``, N >= 1.
        labels: True labels, int64 ``[N]``.
        omega: Factor.
        error_rate: Bound on the part of images whose prediction is wrong; a NaN is wrong.
        together: Variants that are run at a time.
        mean: Per-channel mean of the normalisation, in 0..1 units.
        std: Per-channel standard deviation of the normalisation, in 0..1 units.
        batch_size: Images of all variants together in a forward pass.
        numerics: Number format and memory layout.

    Returns:
        The number, and the errors of 0, 1, 2, ... amplified layers as far as they were looked at.

    Raises:
        UnsupportedModelError: if the unchanged model predicts NaN.
    """
    errors: list[float] = []
    while len(errors) <= len(norms):
        counts = range(len(errors), min(len(errors) + together, len(norms) + 1))
        wrong = torch.zeros(len(counts), dtype=torch.int64, device=images.device)
        variants = _variants(model, norms, counts, omega, images, mean, std)
        for at, logits in _logits(variants, images, mean, std, batch_size, numerics):
            broken = logits.isnan().any(dim=2)
            if counts[0] == 0 and bool(broken[0].any()):
                reason, hint = "its predictions on clean images are NaN", "its training diverged"
                raise UnsupportedModelError("ibd_psc", model_name(model), reason, hint)
            wrong += ((logits.argmax(2) != labels[at]) | broken).sum(dim=1)
        errors += (wrong.double() / len(images)).tolist()
        above = [k for k in counts if k and errors[k] > error_rate]
        if above:
            return above[0], errors[: above[0] + 1]
    return 0, errors


@torch.inference_mode()
def scaling_consistency(
    model: nn.Module,
    norms: Sequence[nn.Module],
    images: Tensor,
    counts: Sequence[int],
    omega: float,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    numerics: Numerics,
) -> tuple[Tensor, str]:
    """PSC of every image, float32 ``[N]``, and where the variants part; arguments as in :func:`first_count`.

    Where amplification overflows, the probability counts as 0.
    """
    parts = [torch.zeros(0, device=images.device)]
    if not len(images):
        return parts[0], ""
    variants = _variants(model, norms, [0, *counts], omega, images, mean, std)
    for _, logits in _logits(variants, images, mean, std, batch_size, numerics):
        own = logits[0].argmax(1).expand(len(counts), -1)
        chosen = logits[1:].softmax(2).gather(2, own[..., None])[..., 0]
        parts.append(chosen.nan_to_num(0.0).mean(dim=0))
    return torch.cat(parts), variants.shared


def _variants(
    model: nn.Module,
    norms: Sequence[nn.Module],
    counts: Sequence[int],
    omega: float,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ScaledNorms:
    # Two images, the same one twice if there is no other: a batch of one would fit every shape by broadcasting.
    trial = images[torch.arange(2, device=images.device) % len(images)]
    return ScaledNorms(model, norms, counts, omega, normalised(trial, 0, 2, mean, std, channels_last=True))


def _logits(
    variants: ScaledNorms,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    numerics: Numerics,
) -> Iterator[tuple[slice, Tensor]]:
    """Positions of the images and float32 logits ``[variants, B, K]``, batch by batch."""
    step = max(1, batch_size // variants.variants)
    for start in range(0, len(images), step):
        with numerics.autocast(images.device):
            logits = variants(normalised(images, start, step, mean, std, channels_last=True))
        yield slice(start, start + step), logits.float()


def model_name(model: nn.Module) -> str:
    """Name in the zoo, or the class's."""
    spec = getattr(model, "bbfast_spec", None)
    return str(getattr(spec, "name", type(model).__name__))
