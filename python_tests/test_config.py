"""Settings of methods: typed, checked, frozen; messages name the owner, the key and the value."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from bbfast._config import MethodConfig, build_config
from bbfast._hashing import sha256_json
from bbfast.errors import BBFastError, ConfigError


class Settings(MethodConfig):
    ratio: float = Field(0.1, gt=0, le=1)
    target: int = Field(0, ge=0)
    mode: Literal["all2one", "all2all"] = "all2one"
    layers: tuple[int, ...] = (1, 2)

    @model_validator(mode="after")
    def check(self) -> Settings:
        if self.mode == "all2all" and self.target:
            raise ValueError("target must be 0 with all2all")
        return self


def test_defaults_and_values() -> None:
    assert build_config(Settings, "attack badnets", {}) == Settings()
    config = build_config(Settings, "attack badnets", {"ratio": 1, "layers": [3]})
    assert config.ratio == 1.0 and type(config.ratio) is float and config.layers == (3,)


def test_made_directly_the_class_is_the_owner() -> None:
    with pytest.raises(ConfigError, match=r"^Settings: unknown setting 'ratoi'; did you mean ratio\?$"):
        Settings(ratoi=0.1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^Settings: settings: target must be 0 with all2all, got "):
        Settings(mode="all2all", target=3)


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().ratio = 0.5  # type: ignore[misc]


def test_the_same_settings_hash_the_same_however_they_are_written() -> None:
    a, b = Settings(ratio=1, layers=(1, 2)), build_config(Settings, "x", {"layers": [1, 2], "ratio": 1.0})
    assert sha256_json(a.model_dump()) == sha256_json(b.model_dump())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratoi": 0.1}, r"attack badnets: unknown setting 'ratoi'; did you mean ratio\?"),
        ({"zzz": 1}, r"unknown setting 'zzz'; known: ratio, target, mode, layers"),
        ({"ratio": 0}, r"ratio: Input should be greater than 0, got 0"),
        ({"ratio": 1.5}, r"ratio: .*less than or equal to 1, got 1\.5"),
        ({"ratio": float("nan")}, r"ratio: .*finite.*, got nan"),
        ({"ratio": "much"}, r"ratio: .*valid number.*, got 'much'"),
        ({"target": 0.5}, r"target: .*integer.*, got 0\.5"),
        ({"mode": "all"}, r"mode: Input should be 'all2one' or 'all2all', got 'all'"),
        ({"layers": [1, "a"]}, r"layers\.1: .*integer.*, got 'a'"),
        ({"mode": "all2all", "target": 3}, r"settings: .*target must be 0 with all2all"),
        ({"ratio": 0, "target": -1}, r"ratio: .*got 0; target: .*got -1"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(Settings, "attack badnets", values)
    assert str(caught.value).startswith("attack badnets: ")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, BBFastError)


def test_settings_of_a_class_without_any() -> None:
    with pytest.raises(ConfigError, match=r"defense ac: unknown setting 'x'; known: none"):
        build_config(MethodConfig, "defense ac", {"x": 1})
