"""A real browser without a window, for pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser on the system's Chromium; skips the test where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)}): apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Without its sandbox: containers run tests as root, and the pages are our own.
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page that is open, and what went wrong in it.

    Attributes:
        page: Playwright's page.
        said: Messages of the console and errors of scripts, policy violations included.
        asked: Addresses it asked for.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Any, path: Path, *, before: str | None = None, **settings: Any) -> Iterator[Opened]:
    """Opens a page, and fails at the end if it said anything to the console or asked for anything but itself.

    Args:
        browser: From `chromium`.
        path: The page.
        before: A script to run before those of the page; what it breaks is allowed to be said.
        **settings: Of Playwright's ``new_page``: ``viewport``, ``color_scheme`` and so on.
    """
    settings = {"viewport": {"width": 1280, "height": 900}, **settings}
    found = Opened(browser.new_page(**settings))
    found.page.set_default_timeout(10_000)
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    if before is not None:
        found.page.add_init_script(before)
    try:
        found.page.goto(path.as_uri())
        if before is None:
            found.page.wait_for_selector("html[data-ready]", state="attached")
        yield found
        if before is None:
            assert found.said == []
        assert [url for url in found.asked if not url.startswith("data:")] == [path.as_uri()]
    finally:
        found.page.close()
