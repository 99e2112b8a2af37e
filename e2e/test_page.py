"""The service's page in Chromium: it loads, follows the fleet, filters, and shows a prompt block by block."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.service import Service
from kvindex.service.server import Server
from kvindex.sim import SimProcess

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-page")
CHROMIUM = shutil.which("chromium")
PROMPT = list(range(1000, 1080))
PICTURES = os.environ.get("PAGE_PICTURES")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: make test-page")


class Fleet:
    """A service that follows two simulated pods, and ``silent`` pods without a process."""

    def __init__(self, silent: int, token: str | None = None) -> None:
        self.index = PrefixIndex(block_size=16)
        self.manager = EventManager(self.index)
        self.pods = {name: SimProcess(name=name) for name in ("live-a", "live-b")}
        for name, pod in self.pods.items():
            self.manager.add_pod(PodSource(name, ranks=pod.ranks, model="sim", engine="vllm"))
        assert self.manager.wait_until_exact(30.0) == {}
        self.pods["live-a"].serve(PROMPT[:64])
        for number in range(silent):
            source = PodSource(f"silent-{number}", endpoint=f"tcp://127.0.0.1:{20000 + number}", model="sim")
            self.manager.add_pod(source)
        self.service = Service(self.index, self.manager, token=token)
        self.server = Server(self.service, port=0)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.stop()
        self._thread.join(20)
        self.manager.close()
        for pod in self.pods.values():
            pod.stop()


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    made = Fleet(*getattr(request, "param", (0,)))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, fleet: Fleet, **options: Any) -> tuple[Any, list[str], list[str]]:
    """A tab, the requests that it makes, and the errors on its console."""
    tab = browser.new_page(**options)
    asked: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(fleet.server.url)
    return tab, asked, errors


def until(done: Callable[[], object]) -> None:
    ends = time.monotonic() + 30.0
    while not done():
        assert time.monotonic() < ends, "it did not become so"


def picture(tab: Any, name: str) -> None:
    if PICTURES:
        tab.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def test_it_follows_the_fleet_and_asks_nobody_else(browser: Any, fleet: Fleet) -> None:
    tab, asked, errors = opened(browser, fleet)
    rows = tab.locator("#pods tbody tr")
    sync_api.expect(rows).to_have_count(2)
    sync_api.expect(tab.locator("#summary")).to_have_text("2 pods: 2 exact")
    fleet.pods["live-b"].kill()
    sync_api.expect(rows.first).to_contain_text("live-b", timeout=20_000)
    sync_api.expect(rows.first.locator(".stale")).to_have_text("stale")
    sync_api.expect(rows.first.locator(".reason")).not_to_be_empty()
    sync_api.expect(tab.locator("#summary")).to_have_text("2 pods: 1 exact, 1 stale")
    squares = tab.locator("#map button")
    assert [square.get_attribute("class") for square in squares.all()] == ["exact", "stale"]
    squares.first.click()
    sync_api.expect(rows).to_have_count(1)
    sync_api.expect(rows).to_contain_text("live-a")
    squares.first.click()
    sync_api.expect(rows).to_have_count(2)
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {fleet.server.url.split("/")[2]}
    assert errors == []
    tab.close()


def test_a_prompt_block_by_block(browser: Any, fleet: Fleet) -> None:
    until(lambda: "live-a" in fleet.index.match_prefix(PROMPT, model="sim"))
    tab, _, errors = opened(browser, fleet)
    sync_api.expect(tab.locator("#model")).to_have_value("sim")
    tab.fill("#prompt", ", ".join(map(str, PROMPT)))
    tab.click("#ask button")
    row = tab.locator("#answer .row")
    sync_api.expect(row).to_have_count(1)
    assert [each.get_attribute("class") for each in row.locator(".cells i").all()] == ["GPU"] * 4 + ["none"]
    sync_api.expect(row).to_contain_text("live-a")
    sync_api.expect(row).to_contain_text("64 tokens exact")
    tab.fill("#prompt", "1, <b>two</b>")
    tab.click("#ask button")
    sync_api.expect(tab.locator("#answer")).to_contain_text("Expected `int`")
    assert [error for error in errors if "400" not in error] == []
    tab.close()


def test_an_example_until_another_prompt_is_typed(browser: Any, fleet: Fleet) -> None:
    until(lambda: "live-a" in fleet.index.match_prefix(PROMPT, model="sim"))
    fleet.service.v1.example = PROMPT[:33]
    tab, _, errors = opened(browser, fleet)
    sync_api.expect(tab.locator("#prompt")).to_have_value(", ".join(map(str, PROMPT[:33])))
    row = tab.locator("#answer .row")
    sync_api.expect(row).to_contain_text("32 tokens exact")
    fleet.service.v1.example = PROMPT[:49]
    sync_api.expect(row).to_contain_text("48 tokens exact")
    tab.fill("#prompt", "1, 2")
    sync_api.expect(tab.locator("#example")).to_be_hidden()
    fleet.service.v1.example = PROMPT
    with tab.expect_response("**/v1/fleet"):
        pass
    with tab.expect_response("**/v1/fleet"):
        pass
    sync_api.expect(tab.locator("#prompt")).to_have_value("1, 2")
    assert errors == []
    tab.close()


@pytest.mark.parametrize("fleet", [(500,)], indirect=True)
def test_500_pods_are_filtered_and_sorted(browser: Any, fleet: Fleet) -> None:
    tab, _, errors = opened(browser, fleet)
    rows = tab.locator("#pods tbody tr")
    sync_api.expect(rows).to_have_count(502)
    tab.fill("#filter", "live-")
    sync_api.expect(rows).to_have_count(2)
    sync_api.expect(tab.locator("#shown")).to_have_text("2 of 502")
    tab.fill("#filter", "")
    tab.select_option("#state", "stale")
    sync_api.expect(rows).to_have_count(500)
    sync_api.expect(rows.first).to_contain_text("silent-0")
    tab.select_option("#state", "")
    tab.get_by_role("columnheader", name="blocks").click()
    sync_api.expect(rows.first).to_contain_text("live-a")
    assert errors == []
    tab.close()


@pytest.mark.parametrize("fleet", [(0, "secret")], indirect=True)
def test_a_token_is_asked_for(browser: Any, fleet: Fleet) -> None:
    tab, _, _ = opened(browser, fleet)
    sync_api.expect(tab.locator("#login")).to_be_visible()
    tab.fill("#token", "secret")
    tab.click("#login button")
    sync_api.expect(tab.locator("#pods tbody tr")).to_have_count(2)
    sync_api.expect(tab.locator("#login")).to_be_hidden()
    tab.close()


@pytest.mark.parametrize("fleet", [(6,), (498,)], indirect=True, ids=["8", "500"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, fleet: Fleet, scheme: Any, width: int) -> None:
    until(lambda: "live-a" in fleet.index.match_prefix(PROMPT, model="sim"))
    tab, _, _ = opened(browser, fleet, color_scheme=scheme, viewport={"width": width, "height": 900})
    pods = len(fleet.manager.pods())
    sync_api.expect(tab.locator("#pods tbody tr")).to_have_count(pods)
    tab.fill("#prompt", " ".join(map(str, PROMPT)))
    tab.click("#ask button")
    sync_api.expect(tab.locator("#answer .row")).to_have_count(1)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    picture(tab, f"{pods}-{width}-{scheme}")
    tab.close()
