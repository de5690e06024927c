"""The site in a real headless Chromium, opened from its file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_kit import HOSTILE

from bbfast.bench import Plan
from bbfast.report.site import write_site
from bbfast.store import Store

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed (Debian: chromium)", allow_module_level=True)

_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def site(ran: tuple[Store, Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("browser")
    published = place / "published.csv"
    rows = [f"digits,small_cnn,badnet,none,0.2,{0.91},{0.88},{0.05}"]
    rows += [f"cifar10,preactresnet18,lf,nc,{i / 1000},0.9,{i / 1000},0.1" for i in range(1, 251)]
    header = "dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra"
    published.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return write_site(ran[0], place / "site", published=published, progress=False).index


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any, site: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The index, opened in a window of the width and colour scheme of the parameter; at the end nothing may have been
    said on the console or asked from a network."""
    width, scheme = getattr(request, "param", (1440, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: complaints.append(request.url) if request.url[:5] not in ("file:", "data:") else 0
    )
    page.goto(site.as_uri())
    yield page
    context.close()
    assert complaints == []


def _cells(page: Any, rows: str) -> list[list[str]]:
    """Class and text of every cell."""
    script = "rows => rows.map(row => [...row.cells].map(cell => `${cell.className} ${cell.textContent}`))"
    found: list[list[str]] = page.locator(rows).evaluate_all(script)
    return found


def _column(page: Any, key: str) -> list[str]:
    heads = page.locator("#board thead th").evaluate_all("heads => heads.map(head => head.dataset.key)")
    return [row[heads.index(key)].split(" ", 1)[-1] for row in _cells(page, "#board tbody tr")]


def test_sorts_by_mouse_and_by_keyboard(tab: Any) -> None:
    assert tab.locator("#board tbody tr").count() == 3, "done ones are shown first"
    tab.click("#board th[data-key=asr] button")
    figures = [float(text.split()[0]) for text in _column(tab, "asr") if text != "\N{EN DASH}"]
    assert figures == sorted(figures, reverse=True) and len(figures) == 2
    assert tab.get_attribute("#board th[data-key=asr]", "aria-sort") == "descending"
    tab.keyboard.press("Enter")  # the head keeps the focus
    assert tab.get_attribute("#board th[data-key=asr]", "aria-sort") == "ascending"
    assert _column(tab, "asr")[-1] == "\N{EN DASH}", "what has no figure comes last either way"


def test_filters_by_choice_and_by_words(tab: Any) -> None:
    tab.select_option("#filter-defense", "clp")
    assert _column(tab, "defense") == ["clp"]
    tab.select_option("#filter-defense", "")
    tab.select_option("#filter-status", "")
    assert "260 of 260" in tab.inner_text("#count")
    tab.fill("#find", "lf nc")
    assert "250 of 260" in tab.inner_text("#count") and tab.locator("#board tbody tr").count() == 100
    tab.click("#page-on")
    tab.click("#page-on")
    assert tab.locator("#board tbody tr").count() == 50 and tab.is_disabled("#page-on")
    address = tab.url
    tab.goto("about:blank")
    tab.goto(address)
    assert "250 of 260" in tab.inner_text("#count"), "the address holds the filter"


def test_what_has_no_figures_says_why_and_hostile_text_stays_text(tab: Any) -> None:
    tab.select_option("#filter-status", "failed")
    assert HOSTILE in tab.inner_text("#board tbody")
    tab.select_option("#filter-status", "not_applicable")
    assert "not applicable: " in tab.inner_text("#board tbody")
    assert tab.locator("main img").count() == 0 and tab.title() == "Backdoor benchmark"


def test_published_figures_beside_ours(tab: Any) -> None:
    assert tab.locator("#board th[data-key=published_asr]").count() == 0
    tab.check("#beside")
    assert "88.00" in _column(tab, "published_asr")


def test_follows_a_run_and_its_attack(tab: Any) -> None:
    tab.click("#board tbody tr:has-text('clp') td a")
    assert "against BadNets" in tab.inner_text("h1")
    tab.click("nav.path a:nth-of-type(2)")
    assert tab.inner_text("h1") == "BadNets on digits" and tab.locator("img.pixels").count() >= 2
    assert tab.inner_text("pre").startswith("bbfast attack badnets --dataset digits")
    tab.click("nav.path a")
    assert tab.locator("#board tbody tr").count() == 3


def test_heat_maps(tab: Any) -> None:
    tab.select_option("#map-metric", "c_acc")
    cells = _cells(tab, "#map tbody tr")
    heads = tab.locator("#map thead th").all_inner_texts()
    badnets = dict(zip(heads, next(row for row in cells if "badnets" in row[0]), strict=True))
    sig = dict(zip(heads, next(row for row in cells if "sig" in row[0]), strict=True))
    assert badnets["none"].strip().isdigit() and badnets["ft"].split() == ["failed", "\N{MULTIPLICATION SIGN}"]
    assert badnets["nc"].startswith("missing") and sig["clp"].split() == ["not_applicable", "n/a"]
    tab.select_option("#map-metric", "asr")
    assert "ASR: 0" in tab.inner_text("#legend")
    tab.click("#map tbody td a >> nth=0")
    assert tab.inner_text("h1") == "BadNets on digits"


def _tab_to(page: Any, what: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("what => document.activeElement.matches(what)", what):
            return
    raise AssertionError(f"the tabulator does not lead to {what}")


def test_filters_and_sorts_without_a_mouse(tab: Any) -> None:
    _tab_to(tab, "#filter-defense")
    tab.keyboard.press("ArrowDown")
    chosen = tab.input_value("#filter-defense")
    assert chosen and set(_column(tab, "defense")) == {chosen}
    tab.keyboard.press("ArrowUp")
    assert tab.input_value("#filter-defense") == "" and len(_column(tab, "defense")) == 3
    _tab_to(tab, "#find")
    tab.keyboard.type("badnets")
    address = tab.url
    tab.keyboard.press("Enter")
    assert tab.url == address and tab.input_value("#find") == "badnets", "nothing is sent"
    assert tab.evaluate("document.activeElement.id") == "find" and len(_column(tab, "defense")) == 3
    head = "#board th[data-key=c_acc]"
    _tab_to(tab, f"{head} button")
    for key, order in (("Enter", "descending"), ("Space", "ascending")):
        tab.keyboard.press(key)
        assert tab.get_attribute(head, "aria-sort") == order
        figures = [float(text.split()[0]) for text in _column(tab, "c_acc") if text != "\N{EN DASH}"]
        assert figures == sorted(figures, reverse=order == "descending") and len(figures) == 2
    _tab_to(tab, "#board tbody a")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("nav.path")
    assert "/runs/" in tab.url


@pytest.mark.parametrize("tab", [(1440, "dark"), (390, "light")], indirect=True, ids=lambda value: f"{value[0]}")
def test_fits_the_window_in_both_schemes(tab: Any, site: Path) -> None:
    width, scheme = tab.viewport_size["width"], "dark" if tab.viewport_size["width"] == 1440 else "light"
    runs = site.parent / "runs"
    for path in (site, *sorted(runs.glob("*-ss-*"))[:1], *sorted(runs.glob("attack*"))[:1]):
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, path.name
        ink, paper = tab.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        light = [sum(map(int, value[4:-1].split(","))) for value in (ink, paper)]
        assert (light[0] > light[1]) == (scheme == "dark")


@pytest.mark.parametrize("tab", [(390, "light")], indirect=True, ids=["390"])
def test_sorts_filters_and_follows_on_a_telephone(tab: Any) -> None:
    tab.select_option("#filter-defense", "clp")
    tab.click("#board th[data-key=asr] button")
    assert _column(tab, "defense") == ["clp"]
    tab.click("#board tbody td a")
    assert "against BadNets" in tab.inner_text("h1")
