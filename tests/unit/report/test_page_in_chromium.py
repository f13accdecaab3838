"""The page in a real browser: every width and colour scheme, no fetches, no errors, keyboard, contrast, live."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.conftest import metrics_line
from toolkit.report.serve import page_server

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("ONECARD_CHROMIUM") or Path(sys.prefix) / "chromium")
SCREENS = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}
READABLE = 4.5  # WCAG 2.2, 1.4.3

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; bash scripts/setup.sh dev")
pytestmark = pytest.mark.skipif(
    not (FOLDER / "chromium").is_file(), reason=f"no Chromium in {FOLDER}; run scripts/browser.py {FOLDER}"
)

CONTRASTS = """() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = colour => colour.slice(0, 3).map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const ground = element => { for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!(numbers(colour).length === 4 && numbers(colour)[3] === 0)) return colour; } return 'rgb(255, 255, 255)'; };
  const texts = 'h1, p, a, dt, dd, b, .quiet, figcaption, figure > details > summary, pre, svg text';
  return [...document.querySelectorAll(texts)].map(e => {
    const style = getComputedStyle(e);
    const [a, b] = [e instanceof SVGElement ? style.fill : style.color, ground(e)].map(c => light(numbers(c)));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + ' ' + e.textContent.slice(0, 30)]; });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("browser", ROOT / "scripts" / "browser.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = {"executable_path": str(FOLDER / "chromium"), "env": script.environment(FOLDER)}
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(**options, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_reads_well_alone(browser: Any, page: Path, screen: str, scheme: str) -> None:
    tab = browser.new_page(viewport=SCREENS[screen], color_scheme=scheme, offline=True)
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: told.append(request.url) if not request.url.startswith(("data:", "file:")) else 0)
    tab.goto(page.as_uri())
    assert told == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["width"]
    assert tab.evaluate("window.injected") is None
    assert tab.locator("dd", has_text="<script>").count() == 1
    contrasts = tab.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert not [(round(ratio, 2), text) for ratio, text in contrasts if ratio < READABLE]
    pictures = tab.locator("figure svg")
    boxes = [pictures.nth(index).bounding_box() for index in range(pictures.count())]
    assert all(box["width"] > 250 and box["height"] > 80 for box in boxes)
    tab.close()


def test_the_keyboard_reaches_everything(browser: Any, page: Path) -> None:
    tab = browser.new_page(viewport=SCREENS["desktop"])
    tab.goto(page.as_uri())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the outcome"
    tab.locator("figure summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("figure details[open] table").first.is_visible()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "wide", "a table that scrolls can be scrolled by key"
    tab.close()


def test_live_it_follows_the_run_to_its_end(browser: Any, unfinished: Path) -> None:
    tab = browser.new_page(viewport=SCREENS["phone"])
    with page_server(unfinished) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.goto(f"http://127.0.0.1:{server.server_port}/")
        assert "running, step 400" in tab.inner_text("header")
        with (unfinished / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(metrics_line(401)) + "\n")
        tab.get_by_text("running, step 401").wait_for(timeout=30_000)  # it loads itself again
        server.shutdown()
    tab.close()
