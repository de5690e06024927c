"""Every method on the paper's four networks: it runs to its end, or refuses before any work as the table says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bbfast import defenses
from bbfast.attacks.result import AttackResult
from bbfast.errors import UnsupportedModelError
from bbfast.models import build

MakeAttack = Callable[..., AttackResult]
NETWORKS = ("preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16")


def smallest(name: str) -> dict[str, Any]:
    """Settings that make any method short: one of everything that is counted, no more passes than it must."""
    counted = ("epochs", "iters", "rounds", "steps", "overlays", "inner", "max_iters", "size_c_samples")
    defaults = defenses.info(name)["defaults"]
    fewer = {"reserve_per_class": 10, "semi_batch": 8, "isolation_ratio": 0.1}
    return {
        **{key: 1 for key in defaults if key.endswith(counted)},
        **{key: value for key, value in fewer.items() if key in defaults},
    }


@pytest.fixture(scope="module", params=NETWORKS)
def attacked(request: pytest.FixtureRequest, toy_attack: MakeAttack) -> AttackResult:
    torch.manual_seed(0)
    result = toy_attack(build(request.param, 2, 32), n=60, n_test=24, classes=2, size=(3, 32, 32))
    recipe = {**result.config["recipe"], "epochs": 1}
    return dataclasses.replace(result, config={**result.config, "recipe": recipe})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", defenses.available())
def test_it_runs_to_its_end(attacked: AttackResult, name: str) -> None:
    defense = defenses.create(name, **smallest(name))
    state = {key: value.clone() for key, value in attacked.model.state_dict().items()}
    refused = defenses.refusal(defense, attacked.model)
    if refused is not None:
        with pytest.raises(UnsupportedModelError):
            defenses.defend(defense, attacked, 0.5, device="cpu", progress=False)
        return
    started = time.perf_counter()
    result = defenses.defend(defense, attacked, 0.5, device="cpu", progress=False)
    print(f"{name}: {time.perf_counter() - started:.1f} s")
    assert all(torch.equal(value, state[key]) for key, value in attacked.model.state_dict().items())
    if result.model is not None:
        logits = result.model(torch.randn(3, 3, 32, 32))
        assert logits.shape == (3, 2) and bool(logits.isfinite().all())
    if result.scores is not None:
        assert result.flags is not None and result.flags.shape == result.scores.shape
