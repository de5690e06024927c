"""One really trained backdoor for all tools: BadNets on the digits, and a fine-tuned model of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bbfast import Recipe, attack, attacks, datasets, defend, defenses
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult


@pytest.fixture(scope="session")
def badnets() -> AttackResult:
    """small_cnn, 5 epochs, 200 test images: about four seconds on one core."""
    return _trained(ratio=0.1, epochs=5)


@pytest.fixture(scope="session")
def strong() -> AttackResult:
    """The same, learned to the end (ASR 100 %): in five epochs at a tenth the trigger is hardly learned."""
    return _trained(ratio=0.2, epochs=8)


def _trained(ratio: float, epochs: int) -> AttackResult:
    data = datasets.load("digits")
    small = dataclasses.replace(data, test=data.test[:200], fingerprint="")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(epochs=epochs, eval_every=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return attack(attacks.create("badnets", ratio=ratio), small, "small_cnn", recipe, device="cpu", progress=False)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tuned(badnets: AttackResult) -> DefenseResult:
    return defend(defenses.create("ft", epochs=2), badnets, device="cpu", progress=False)
