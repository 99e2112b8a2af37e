"""The site that ``make docs`` builds, opened as files: its search works in Chromium without a server."""

import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-page")
CHROMIUM = shutil.which("chromium")
SITE = Path(__file__).resolve().parents[1] / ".build/site"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: make test-page"),
    pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built: make docs"),
]


@pytest.fixture(scope="module")
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def test_the_search_finds_a_heading_without_a_server(page):
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url) if request.url.startswith("http") else None)
    page.goto((SITE / "guides/router.html").as_uri())
    page.locator("input[name=query]").press_sequentially("glossary")
    found = page.locator(".md-search-result__link").first
    found.wait_for(state="attached")
    assert "concepts.html" in found.get_attribute("href")
    assert not elsewhere
