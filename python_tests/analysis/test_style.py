"""What all figures share."""

from __future__ import annotations

from io import BytesIO

import pytest
from matplotlib.text import Text

from bbfast.analysis._text import plain_powers
from bbfast.analysis.style import figure, short_name


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


def test_logarithmic_axes_have_plain_labels() -> None:
    """Saved outside the context, where Matplotlib would make its ticks with formulas and in its own size."""
    with figure(3, 3) as made:
        axis = made.subplots()
        axis.loglog([1e-3, 1e2], [2, 3])
        axis.set_title("$x$")
    made.savefig(BytesIO())
    words = [text for text in made.findobj(Text) if isinstance(text, Text) and text.get_text()]
    assert not any(text.get_parse_math() for text in words)
    across = [label.get_text() for label in axis.get_xticklabels()]
    assert "10\u207b\u00b2" in across and "10\u00b2" in across and axis.get_title() == "$x$"
    assert {label.get_fontsize() for label in axis.get_xticklabels()} == {9}
    minor = [label.get_text() for label in axis.get_yticklabels(minor=True)]
    assert "2\u00d710\u2070" in minor and not any("$" in word for word in minor)


@pytest.mark.parametrize(
    ("formula", "shown"),
    [
        (r"$\mathdefault{10^{-12}}$", "10\u207b\u00b9\u00b2"),
        (r"$\mathdefault{-10^{3}}$", "\u221210\u00b3"),
        (r"$\mathdefault{2\times10^{-1}}$", "2\u00d710\u207b\u00b9"),
        (r"$\mathdefault{0}$", "0"),
        ("", ""),
    ],
)
def test_plain_powers(formula: str, shown: str) -> None:
    assert plain_powers(formula) == shown
