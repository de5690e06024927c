"""The python examples of the documentation pages run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bbfast

ROOT = Path(__file__).resolve().parents[1]


def examples(page: Path) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.startswith("--8<--")]  # an included file is run by the README's test


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_page_run(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(examples(page)))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_the_quick_start_that_ships() -> None:
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "examples" / "quickstart.py").read_text().strip() in readme


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page not in navigation]


def test_the_page_of_attacks_has_them_all() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .*? \| ([\w-]+) \| ([\w, ]+) \|", (ROOT / "docs/attacks.md").read_text(), re.MULTILINE
    )
    cards = {name: bbfast.attacks.info(name) for name in bbfast.attacks.available()}
    assert sorted(rows) == sorted(
        (name, card["threat"], ", ".join(card["label_modes"])) for name, card in cards.items()
    )


def test_the_page_of_defenses_says_who_takes_which_network() -> None:
    text = (ROOT / "docs/defenses.md").read_text()
    head, *rows = re.findall(r"^\| (?:name|`\w+`) \|.*\|$", text, re.MULTILINE)
    models = [cell.strip() for cell in head.split("|")[5:-1]]
    assert models == ["preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16", "small_cnn"]
    with torch.device("meta"):
        built = [bbfast.models.build(model, 10, 32) for model in models]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[3:-1]] for row in rows}
    assert cells == {
        name: [
            ", ".join(card["kinds"]),
            ", ".join(card["needs"]),
            *("yes" if bbfast.defenses.refusal(name, model) is None else "no" for model in built),
        ]
        for name, card in ((name, bbfast.defenses.info(name)) for name in bbfast.defenses.available())
    }
