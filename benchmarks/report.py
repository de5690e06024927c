"""How fast the report's leaderboard is in a browser: opening it and sorting it, with many lines.

python benchmarks/report.py --lines 5000 15360
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from bbfast import attacks, defenses
from bbfast.report.site import write_site

# From the click to the second frame after it: then the sorted table is on the screen.
SORT = """key => new Promise(done => {
  const began = performance.now();
  document.querySelector(`#board th[data-key=${key}] button`).click();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
})"""
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def write_table(path: Path, lines: int) -> None:
    """A published table of that many cells with random figures."""
    chance = random.Random(0)
    places = itertools.product(
        ("cifar10", "cifar100", "gtsrb", "tiny"),
        ("preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16"),
        (0.001, 0.005, 0.01, 0.05, 0.1),
        attacks.available(),
        ["none", *defenses.available()],
    )
    rows = [
        f"{data},{model},{attack},{defense},{ratio},{chance.random()},{chance.random()},{chance.random()}"
        for data, model, ratio, attack, defense in itertools.islice(places, lines)
    ]
    header = "dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")


def measure(browser: Browser, index: Path, rounds: int) -> dict[str, Any]:
    load, sort = [], []
    for _ in range(rounds):
        page = browser.new_page()
        page.goto(f"{index.as_uri()}#status=&beside=1")
        load.append(page.evaluate(LOADED))
        sort += [page.evaluate(SORT, key) for key in ("published_asr", "attack", "published_c_acc")]
        page.close()
    return {"load": load, "sort": sort}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="+", default=[5000, 15360])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        (root / "runs").mkdir()
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", "--disable-gpu"])
        for lines in given.lines:
            write_table(root / "table.csv", lines)
            site = write_site(root / "runs", root / "site", published=root / "table.csv", progress=False)
            size = site.index.stat().st_size / 2**20
            found = measure(browser, site.index, given.rounds)
            said = ", ".join(
                f"{what} {statistics.median(times):.0f} ms (slowest {max(times):.0f})" for what, times in found.items()
            )
            print(f"{lines} lines, {size:.1f} MiB: {said}")
        browser.close()


if __name__ == "__main__":
    main()
