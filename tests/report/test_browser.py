"""The pages in a browser, at the widths of a telephone and of a desk, in both colour schemes.

Chromium and its driver are to be on PATH. Without them the tests are skipped; in continuous integration they fail.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aura_jax.experiments.compare import page as compared
from aura_jax.report import page as report

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart" / "report.html"
COMPARED = ROOT / "benchmarks" / "results" / "compare" / "summary.json"
# By what its edges are: of what sticks out of the page, beside what scrolls by itself.
STICKS_OUT = """
const width = document.documentElement.clientWidth;
const scrolls = e => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return [...document.body.querySelectorAll('*')]
  .filter(e => !e.closest('svg') || e.tagName === 'svg')
  .filter(e => { const box = e.getBoundingClientRect(); return box.width && (box.right > width + 1 || box.left < -1); })
  .filter(e => !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 120));
"""
# The least ratio of luminances (WCAG 2.1) of a text to the first background behind it, and that text.
FAINTEST = """
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const weights = [0.2126, 0.7152, 0.0722];
const luminance = colour => channels(colour).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * weights[i], 0);
const isClear = e => channels(getComputedStyle(e).backgroundColor)[3] === 0;
const behind = e => isClear(e) && e.parentElement ? behind(e.parentElement) : getComputedStyle(e).backgroundColor;
const told = [...document.body.querySelectorAll('*')].filter(e => !e.closest('svg, audio'))
  .filter(e => [...e.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
return told.map(e => {
  const [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 60)];
}).sort((a, b) => a[0] - b[0])[0];
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs chromium and chromedriver on PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started
    started.quit()


@pytest.fixture(scope="module", params=["the quickstart's", "a small run's", "a comparison"])
def page(request, make_report_data, tmp_path_factory) -> Path:
    """A run's page as it was written down, and what the templates make now."""
    if request.param == "the quickstart's":
        return QUICKSTART
    of_run = request.param == "a small run's"
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report.render(make_report_data()) if of_run else compared.render(json.loads(COMPARED.read_text())))
    return path


def opened(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def test_a_page_loads_nothing_and_complains_of_nothing(browser, page):
    opened(browser, page)
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    ids = browser.execute_script("return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1))")
    assert ids and not [name for name in ids if not browser.execute_script(f"return document.getElementById({name!r})")]


@pytest.mark.parametrize("width", (390, 1280))
def test_nothing_sticks_out(browser, page, width):
    opened(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(STICKS_OUT) == []


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_all_text_can_be_read(browser, page, scheme):
    opened(browser, page, scheme=scheme)
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    ratio, text = browser.execute_script(FAINTEST)
    assert ratio >= 4.5, text


def test_examples_can_be_heard_and_seen(browser):
    opened(browser, QUICKSTART)
    heard = browser.execute_async_script(
        """
        const done = arguments[0], clips = [...document.querySelectorAll('audio')];
        const loaded = clip => clip.readyState > 0 || clip.error ? clip : new Promise(say => {
          clip.preload = 'metadata'; clip.onloadedmetadata = clip.onerror = () => say(clip); clip.load();
        });
        Promise.all(clips.map(loaded)).then(clips => done(clips.map(clip => clip.error ? 0 : clip.duration)));
        """
    )
    assert len(heard) > 3 and all(0.2 < seconds < 60 for seconds in heard)
    seen = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert seen and all(width > 10 for width in seen)
