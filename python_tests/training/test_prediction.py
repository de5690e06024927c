from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bbfast.data.imageset import BackdoorSet, ImageSet
from bbfast.training import predict, predict_labels

MakeSet = Callable[..., ImageSet]
MakeNet = Callable[..., nn.Module]


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_logits_are_those_of_a_plain_pass(make_set: MakeSet, make_net: MakeNet, batch_size: int) -> None:
    data, model = make_set(20), make_net(dropout=0.5)
    logits = predict(model, data, batch_size=batch_size, device="cpu")
    model.eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    expected = model((data.images.float() / 255 - mean) / std).detach()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert torch.equal(predict_labels(model, data, batch_size=batch_size, device="cpu"), logits.argmax(1))


def test_exact_pixels_are_what_the_model_sees(make_set: MakeSet, make_net: MakeNet) -> None:
    data, model = make_set(20), make_net()
    plain = BackdoorSet(data.images, data.labels, data.mean, data.std, original_labels=data.labels)
    same = dataclasses.replace(plain, exact=data.images.float() / 255)
    expected = predict(model, plain, device="cpu")
    torch.testing.assert_close(predict(model, same, batch_size=7, device="cpu"), expected, rtol=1e-4, atol=1e-5)
    shifted = dataclasses.replace(plain, exact=data.images.float() / 255 + 0.3 / 255)  # less than 8 bits hold
    assert not torch.allclose(predict(model, shifted, device="cpu"), expected, atol=1e-4)
    assert predict(model, shifted[:0], device="cpu").shape == (0, 3)


def test_the_model_is_left_as_it_was(make_set: MakeSet, make_net: MakeNet) -> None:
    model = make_net()
    model.train()
    model[1].eval()  # type: ignore[index]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, make_set(5), device="cpu")
    assert model.training and model[0].training and not model[1].training  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())


def test_the_model_is_left_as_it_was_after_an_error(make_set: MakeSet) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(5, 2, 1)).train()
    with pytest.raises(RuntimeError):
        predict(model, make_set(5), device="cpu")
    assert model.training and model[1].weight.is_contiguous()


def test_no_images(make_set: MakeSet, make_net: MakeNet) -> None:
    assert predict(make_net(classes=4), make_set(5)[:0], device="cpu").shape == (0, 4)
    assert predict_labels(make_net(), make_set(5)[:0], device="cpu").shape == (0,)


def test_bf16_is_close(make_set: MakeSet, make_net: MakeNet) -> None:
    model, data = make_net(), make_set(12)
    exact, rounded = (predict(model, data, device="cpu", precision=p) for p in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


def test_bad_arguments(make_set: MakeSet, make_net: MakeNet) -> None:
    model, data = make_net(), make_set(5)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        predict(predict, data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images must be an ImageSet, got Tensor"):
        predict(model, data.images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        predict(model, data, batch_size=0, device="cpu")
    with pytest.raises(ValueError, match=r"precision must be .*got 'half'"):
        predict(model, data, precision="half")
    with pytest.raises(ValueError, match=r"device must be .*got 'gpu'"):
        predict(model, data, device="gpu")
