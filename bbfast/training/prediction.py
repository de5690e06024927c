"""Run a model over an image set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.data.loader import BatchLoader
from bbfast.data.normalize import normalize
from bbfast.training.device import Numerics, choose_numerics, placed, resolve_device
from bbfast.training.runtime import keep_freed_memory

__all__ = ["evaluating", "outputs", "predict", "predict_labels", "probe"]


def predict(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 512,
    device: torch.device | str = "auto",
    precision: str = "fp32",
) -> Tensor:
    """Logits of every image: eval mode, no augmentation, no gradient.

    The model's mode, device and memory layout are as before afterwards.

    Args:
        model: Any module that takes normalised images ``[B, C, H, W]`` and gives ``[B, K]``.
        images: The set, with the normalisation the model expects.
        batch_size: Images a pass.
        device: Where to run.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (:class:`~bbfast.training.recipe.Recipe`).

    Returns:
        float32 ``[N, K]`` on the CPU.

    Raises:
        TypeError: if ``model`` or ``images`` has the wrong type.
        ValueError: if ``batch_size`` < 1, or ``device`` or ``precision`` cannot be had.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(images, ImageSet):
        raise TypeError(f"images must be an ImageSet, got {type(images).__name__}")
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be 'auto', 'fp32', 'bf16' or 'fp16', got {precision!r}")
    where = resolve_device(device)
    numerics = choose_numerics(precision, "auto", model, where)
    with placed(model, where, numerics.memory_format), keep_freed_memory(where):
        if len(images):
            return torch.cat([part.cpu() for part in outputs(model, images, batch_size, where, numerics)])
        # Without images the number of classes has to be asked for.
        blank = ImageSet(torch.zeros(1, *images.image_size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
        return next(outputs(model, blank, 1, where, numerics))[:0].cpu()


def predict_labels(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 512,
    device: torch.device | str = "auto",
    precision: str = "fp32",
) -> Tensor:
    """The class with the largest logit of every image, int64 ``[N]`` on the CPU; see :func:`predict`."""
    return predict(model, images, batch_size=batch_size, device=device, precision=precision).argmax(1)


def outputs(
    model: nn.Module, images: ImageSet, batch_size: int, device: torch.device, numerics: Numerics
) -> Iterator[Tensor]:
    """Float32 logits of one batch after the other, on ``device``; the model must be there already.

    Of a :class:`~bbfast.data.imageset.BackdoorSet` with ``exact`` pixels these are what the model sees.
    """
    for x in _inputs(images, batch_size, device, numerics):
        with evaluating(model), torch.no_grad(), numerics.autocast(device):
            logits = model(x)
        yield logits.float()


def _inputs(images: ImageSet, batch_size: int, device: torch.device, numerics: Numerics) -> Iterator[Tensor]:
    """Normalised batches, in the stored order."""
    if isinstance(images, BackdoorSet) and images.exact is not None:
        layout = torch.channels_last if numerics.channels_last else torch.contiguous_format
        for part in images.exact.split(batch_size):
            x = normalize(part.to(device), images.mean, images.std)
            yield x.to(numerics.dtype).contiguous(memory_format=layout)
        return
    loader = BatchLoader(
        images,
        batch_size,
        device=device,
        dtype=numerics.dtype,
        channels_last=numerics.channels_last,
        augment=False,
        shuffle=False,
    )
    for batch in loader.epoch(0):
        yield batch.x


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for the block, each module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def probe(model: nn.Module, image_size: Sequence[int], handles: Sequence[RemovableHandle]) -> None:
    """Show hooks a forward pass of one image, all zeros, in eval mode, and remove them.

    Args:
        model: On any device, the meta device too.
        image_size: ``(C, H, W)``.
        handles: What registering the hooks returned.
    """
    parameter = next(model.parameters())
    try:
        with evaluating(model):
            model(torch.zeros(1, *image_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
