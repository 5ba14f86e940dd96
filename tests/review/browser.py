"""A real Chromium for the tests of the page; no test asks for it without saying why it may be missing."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.review.builders import PASSWORD

pytest.importorskip("playwright", reason="no playwright: install the extra `dev`")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package `chromium`")


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser; each test opens its own context."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS), headless=True)
        yield browser
        browser.close()


def log_in(page: Page, address: str, username: str = "reader") -> None:
    """Logs in by the form and waits for the first page."""
    page.goto(f"{address}/login")
    page.fill("[name=username]", username)
    page.fill("[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("nav")
    page.wait_for_load_state("domcontentloaded")  # by then the keys listen


def open_study(page: Page, address: str, study_id: str) -> None:
    """Logs in as a reader and opens a study."""
    log_in(page, address)
    page.goto(f"{address}/studies/{study_id}")


def wait_for_picture(page: Page) -> None:
    """Waits until a slice is on the canvas."""
    page.wait_for_selector("#viewer[data-painted]")


def until(page: Page, expression: str, seconds: float = 30.0) -> None:
    """Waits until an expression is true; playwright's own waiting needs `unsafe-eval`, which the page does not allow."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def cut_or_overlapping(page: Page) -> list[str]:
    """What lies outside the window, is wider than its box, or lies over another control; nothing should."""
    return list(page.evaluate(_LAYOUT))


def hard_to_read(page: Page) -> list[str]:
    """What axe-core finds serious or critical, contrast of the text among it; nothing should be."""
    found = Axe().run(page).response["violations"]
    return [f"{v['id']} {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in {"serious", "critical"}]


def picture(page: Page, name: str) -> None:
    """A screenshot for people, where the environment variable SCREENSHOTS names a folder."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # a hidden caret is a style that playwright puts into the page, which our policy rightly refuses
        page.screenshot(path=Path(folder) / f"{name}.png", caret="initial")


_LAYOUT = """() => {
  const told = [];
  const seen = (e) => e.checkVisibility() && !e.closest('.hidden, .skip, [hidden], dialog:not([open])');
  const box = (e) => e.getBoundingClientRect();
  const name = (e) => `${e.tagName.toLowerCase()}.${e.className} ${(e.textContent || e.name || '').trim().slice(0, 30)}`;
  if (document.documentElement.scrollWidth > innerWidth) told.push('the page is wider than the window');
  const controls = [...document.querySelectorAll('button, a, input, select, textarea, h1, h2, h3, .state, .mark')].filter(seen);
  for (const e of controls) {
    const b = box(e);
    if (b.width && (b.left < -1 || b.right > innerWidth + 1)) told.push('outside: ' + name(e));
    const lines = b.height / parseFloat(getComputedStyle(e).lineHeight);
    if (e.matches('button, .state') && lines > 2) told.push('broken: ' + name(e));
    if (e.matches('button, .state, h1, h2, h3') && e.scrollWidth > e.clientWidth + 1) told.push('cut: ' + name(e));
  }
  const still = controls.filter((e) => e.matches('button, select, input') && !e.closest('.summary, dialog, #report-side'));
  for (let i = 0; i < still.length; i++) for (let j = i + 1; j < still.length; j++) {
    const [a, b] = [box(still[i]), box(still[j])];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const over = wide > 2 && high > 2;
    if (over && a.width && b.width) told.push(`overlap: ${name(still[i])} / ${name(still[j])}`);
  }
  return told;
}"""
