from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bbfast.report.images import png_uri, to_uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head, _, body = png_uri(image).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(BytesIO(base64.b64decode(body))) as back:
        pixels = np.asarray(back).reshape(5, 7, channels)
    assert (pixels == image.permute(1, 2, 0).numpy()).all()


def test_wrong_images_are_refused() -> None:
    with pytest.raises(TypeError, match="image must be uint8, got float32"):
        png_uri(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"one or three channels, got shape \[2, 4, 4\]"):
        png_uri(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_float_images_are_rounded_and_clamped() -> None:
    assert to_uint8(torch.tensor([-1.0, 0.5, 1.0, 2.0])).tolist() == [0, 128, 255, 255]
