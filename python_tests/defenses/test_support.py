"""Which defense takes which model is known without a run; that runs agree with it is in test_run.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bbfast import defenses, models
from bbfast.errors import UnknownNameError


def test_a_refusal_names_method_model_and_reason() -> None:
    said = defenses.refusal("bnp", "vit_b_16")
    assert said is not None and "bnp cannot work on vit_b_16" in said and "BatchNorm2d" in said
    assert defenses.refusal("bnp", "small_cnn") is None
    assert defenses.refusal(defenses.create("ep", norm="layernorm"), "vit_b_16") is None


def test_a_model_without_a_plan_cannot_be_trained_anew() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    said = defenses.refusal("asset", net)
    assert said is not None and "build it with bbfast.models.build" in said


def test_a_given_model_is_left_as_it_was() -> None:
    net = models.build("small_cnn", 10, 32).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert defenses.refusal("rnp", net) is None
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_what_the_data_lack_is_no_refusal_of_the_model() -> None:
    assert defenses.refusal(defenses.create("abl", isolation_ratio=1e-6), "small_cnn") is None


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown defense 'clip'"):
        defenses.refusal("clip", "small_cnn")
    with pytest.raises(UnknownNameError, match="unknown model"):
        defenses.refusal("clp", "resnet19")
