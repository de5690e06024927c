from __future__ import annotations

import pytest

from bbfast.cli._frame import UsageFailure
from bbfast.cli._options import merge_settings, parse_settings


def test_values_are_yaml() -> None:
    given = ["a=1", "b=0.5", "c=true", "d=[1, 2]", "e=null", "f=some text", "g=x=y", "h=", "i=off", "j=yes", "k=FALSE"]
    expected = {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": None, "f": "some text", "g": "x=y", "h": None}
    expected |= {"i": "off", "j": "yes", "k": False}
    assert parse_settings(given) == expected


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["ratio"], "--set takes KEY=VALUE, got 'ratio'"),
        (["=1"], "--set takes KEY=VALUE, got '=1'"),
        (["a=1", "a=2"], "--set a is given twice"),
        (["a=[1"], r"--set a: the value must be YAML, got '\[1'"),
    ],
)
def test_what_is_not_a_setting_is_wrong_usage(pairs: list[str], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        parse_settings(pairs)


def test_yaml_cannot_make_objects() -> None:
    with pytest.raises(UsageFailure, match="must be YAML"):
        parse_settings(["a=!!python/object/apply:os.system ['true']"])


def test_options_and_settings_are_one_and_a_double_is_refused() -> None:
    assert merge_settings({"ratio": 0.1, "target": None}, {"size": 3}) == {"ratio": 0.1, "size": 3}
    with pytest.raises(UsageFailure, match="label_mode is given twice: by --label-mode and by --set label_mode="):
        merge_settings({"label_mode": "all2all"}, {"label_mode": "all2one"})
