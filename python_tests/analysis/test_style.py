"""What all figures share."""

from __future__ import annotations

import pytest

from bbfast.analysis.style import short_name


@pytest.mark.parametrize(
    ("name", "most", "shown"),
    [
        ("Speed limit 30", 12, "Speed li\u2026 30"),
        ("Speed limit 30", 14, "Speed limit 30"),
        ("Wild animals crossing", 12, "Wild animal\u2026"),
        ("Dangerous curve left", 12, "Danger\u2026 left"),
        ("automobiles!!", 12, "automobiles\u2026"),
        ("", 3, ""),
    ],
)
def test_short_names_keep_what_tells_them_apart(name: str, most: int, shown: str) -> None:
    assert (short_name(name, most) == shown and len(shown) <= most) or name == shown
