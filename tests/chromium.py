"""Headless Chromium for the tests of the web page.

Fixtures: `server` (page_server.py), `page` (an open page that is ready), `tabs` (opens more pages).

A test also fails if the browser reports an error of the page, a violation of its
Content-Security-Policy, or a request to another server. Without Chromium, the test files that
import this module are skipped with a warning.
"""

import os
import shutil
import tempfile
import warnings
from unittest import mock

import pytest

from page_server import Server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    MESSAGE = "NO CHROMIUM: the web page is not tested. On Debian: apt-get install chromium"
    warnings.warn(MESSAGE, stacklevel=1)
    pytest.skip(MESSAGE, allow_module_level=True)
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
NARROWEST = {"width": 360, "height": 640}
TIMEOUT_MS = 30_000  # because a busy machine can stall for ten seconds
RECORD_VIOLATIONS = """
window.violations = [];
addEventListener('securitypolicyviolation',
  e => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
"""
expect.set_options(timeout=TIMEOUT_MS)


def memory_folder() -> str | None:
    """Return a folder in memory for the browser's profile, or None if there is no large one.

    On a busy disk, pages stalled for up to a minute. The /dev/shm of a container is often too small
    for a browser.
    """
    folder = "/dev/shm"
    is_usable = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1 << 30
    return folder if is_usable else None


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(dir=memory_folder(), ignore_cleanup_errors=True) as folder:
        with mock.patch.dict(os.environ, TMPDIR=folder):
            # One driver per module, not session: while it runs, no other test can use asyncio.run
            driver = sync_playwright().start()
            b = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()
        driver.stop()


@pytest.fixture
def server():
    s = Server().begin()
    yield s
    s.down = True
    s.shutdown()
    s.server_close()


class Tabs:
    """Opens pages and records their errors."""

    def __init__(self, browser):
        self.browser, self.contexts, self.pages, self.errors = browser, [], [], []

    def context(self, size=WIDE, **options):
        self.contexts.append(self.browser.new_context(viewport=size, **options))
        self.contexts[-1].set_default_timeout(TIMEOUT_MS)
        self.contexts[-1].add_init_script(RECORD_VIOLATIONS)
        return self.contexts[-1]

    def open(self, url: str, context=None, ready: bool = True, **options) -> Page:
        page = (context or self.context(**options)).new_page()
        self.pages.append(page)
        page.on("pageerror", lambda e: self.errors.append(f"error of the page: {e}"))
        page.on("console", self._check_console)
        page.on("request", lambda request: self._check_request(request, url))
        page.goto(url)
        if ready:
            expect(page.locator("#dot")).to_have_class("dot ready")
        return page

    def _check_console(self, message) -> None:
        # Failed requests do not count as errors, because tests provoke them.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(f"console: {message.text}")

    def _check_request(self, request, url: str) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            self.errors.append(f"request to {request.url}")

    def close(self) -> list[str]:
        """Close all pages. Return all errors that were recorded."""
        for page in self.pages:
            if not page.is_closed():
                self.errors += [f"CSP: {v}" for v in page.evaluate("window.violations")]
        for context in self.contexts:
            context.close()
        return self.errors


@pytest.fixture
def tabs(browser):
    t = Tabs(browser)
    yield t
    errors = t.close()
    assert not errors, errors  # `, errors`: pytest shows values by itself only in test files


@pytest.fixture
def page(tabs, server) -> Page:
    return tabs.open(server.url)


def send(page: Page, text: str, wait: bool = True):
    """Send a message, and wait for the end of the reply unless told otherwise."""
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")
    if wait:
        done(page)


def done(page: Page):
    """Wait until the last reply on the page is complete."""
    expect(page.locator(".msg.model").last).to_have_attribute("aria-busy", "false")
    expect(page.locator("#send")).to_be_visible()


def reply(page: Page):
    return page.locator(".msg.model").last


def stored(page: Page) -> list[dict]:
    """Return the conversations in the page's localStorage."""
    return page.evaluate(
        "Object.keys(localStorage).filter(key => key.startsWith('lamoe:c:'))"
        ".map(key => JSON.parse(localStorage[key]))"
    )
