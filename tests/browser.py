"""Chromium, driven by playwright, without a network."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    FOUND is None or importlib.util.find_spec("playwright") is None,
    reason="no browser: `apt-get install chromium` and `pip install playwright`",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Programs of a container run as root, which its sandbox refuses."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=FOUND, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """A page in its own context, opened from disk or at an address. `trouble` are errors and requests that it made."""

    def __init__(self, browser: Any, page: Path | str, *, width: int = 1280, theme: str = "light", hash: str = ""):
        address = page.as_uri() if isinstance(page, Path) else page
        offline = isinstance(page, Path)
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=theme, offline=offline)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.trouble: list[str] = []
        self.page.on("console", lambda m: self.trouble.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"alert {dialog.message}"), dialog.dismiss()))
        self.page.on(
            "request", lambda r: self.trouble.append(r.url) if not r.url.startswith((address, "data:")) else None
        )
        self.page.goto(f"{address}{hash}")
        self.level("runs" if not hash else None)

    def level(self, name: str | None = None) -> None:
        """Wait until a level is drawn."""
        self.page.wait_for_selector(f'#main[data-level="{name}"]' if name else "#main[data-level]")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def number(self, selector: str) -> float:
        """A number of the page with all its digits, from its title."""
        node = self.page.locator(selector).first
        inner = node.locator("[title]").first if node.get_attribute("title") is None else node
        return float(inner.get_attribute("title"))

    def close(self) -> None:
        self.context.close()
