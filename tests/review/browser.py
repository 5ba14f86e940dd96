"""A real Chromium for the tests of the page; no test asks for it without saying why it may be missing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package `chromium`")


@contextmanager
def chromium() -> Iterator[object]:
    """One browser; each test opens its own context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS), headless=True)
        yield browser
        browser.close()


def screenshots(tmp_path: Path) -> Path:
    """Where pictures go."""
    folder = tmp_path / "screenshots"
    folder.mkdir(exist_ok=True)
    return folder
