"""A tiny data set and an attack on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference_kit import attacked, make_pair

from bbfast.attacks import AttackResult
from bbfast.data import DataPair


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pair() -> DataPair:
    return make_pair()


@pytest.fixture(scope="session")
def result(pair: DataPair) -> AttackResult:
    return attacked(pair, ratio=0.2, target=1)
