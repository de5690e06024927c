"""What every trigger module shares."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["Trigger", "check_picture", "in_units_of"]


class Trigger(v2.Transform):
    """A trigger as a transform of ``torchvision.transforms.v2``.

    Takes what v2 takes: a tensor ``[C, H, W]`` or ``[..., C, H, W]``, a ``tv_tensors.Image`` or ``Video``, a PIL image,
    or a sample that holds one of these, such as ``(image, label)``; labels, boxes and masks pass through. Images are
    uint8 in 0..255 or floating in 0..1: it stands before ``Normalize``, and before or after ``ToDtype(scale=True)``.
    Every image it sees is triggered; ``v2.RandomApply([trigger], p=0.1)`` triggers some. Tensors are never modified in
    place.

    Subclasses define :meth:`apply`.
    """

    def apply(self, images: Tensor) -> Tensor:
        """Triggered copies of images ``[N, C, H, W]``, same shape and dtype."""
        raise TypeError(f"{type(self).__name__} must define apply(images)")

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One input of a sample, as v2 asks for it."""
        if isinstance(inpt, PIL.Image.Image):
            triggered = self._on_tensor(v2.functional.pil_to_tensor(inpt))
            return v2.functional.to_pil_image(triggered, mode=inpt.mode)
        if isinstance(inpt, tv_tensors.TVTensor):
            if not isinstance(inpt, (tv_tensors.Image, tv_tensors.Video)):
                return inpt
            return tv_tensors.wrap(self._on_tensor(inpt.as_subclass(Tensor)), like=inpt)
        return self._on_tensor(inpt)

    def _on_tensor(self, image: Tensor) -> Tensor:
        name = type(self).__name__
        if image.dim() < 3:
            raise ValueError(f"{name}: image must be [C, H, W] or [..., C, H, W], got {list(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"{name}: image must be uint8 or floating, got {image.dtype}")
        if image.dim() == 4:
            return self.apply(image)
        return self.apply(image.reshape(-1, *image.shape[-3:])).reshape(image.shape)


def check_picture(trigger: Trigger, name: str, value: Any) -> None:
    """A picture that a trigger is given must be uint8 ``[C, H, W]``."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 3:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{type(trigger).__name__}: {name} must be a uint8 tensor [C, H, W], got {got}")


def in_units_of(images: Tensor, picture: Tensor) -> Tensor:
    """A uint8 picture in the units of the images: as it is, or in 0..1."""
    return picture.to(images.dtype) / 255 if images.is_floating_point() else picture
