"""Debian's Chromium for tests of the page, which are skipped if it is not installed (CI installs it)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from support.kinds import CHROMIUM

# Two test processes share two cores, and some of what they run beside this is heavy.
_TIMEOUT_MILLISECONDS = 30_000
expect.set_options(timeout=_TIMEOUT_MILLISECONDS)

needs_chromium = pytest.mark.browser

# It runs as root in CI, and it is not to look for anything but the page.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(browser: Browser, url: str, *, before: str = "", **context: object) -> AsyncIterator[Page]:
    """A page in a profile of its own, after the script `before`.

    Fails if a script failed or the page's own policy stopped something.
    """
    wrong: list[str] = []
    async with await browser.new_context(**context) as profile:  # type: ignore[arg-type]
        profile.set_default_timeout(_TIMEOUT_MILLISECONDS)
        page = await profile.new_page()
        await page.add_init_script(before)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: _note(message, wrong))
        await page.goto(url)
        yield page
    assert not wrong


def _note(message: ConsoleMessage, wrong: list[str]) -> None:
    # Chromium itself notes answers above 399, which tests ask for.
    if message.type == "error" and not message.text.startswith("Failed to load resource"):
        wrong.append(message.text)
