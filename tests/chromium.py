"""Headless Chromium for the tests of the page: fixtures `server` (page_server.py), `page` (open and ready), `tabs` (to open more), and small helpers.

A test also fails when the browser reports an error of the page, a violation of its Content-Security-Policy, or a request to anywhere else. Without
Chromium the test files that import this are skipped, loudly."""

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
    warnings.warn(
        "NO CHROMIUM: nothing of the page is tested. On Debian: apt-get install chromium",
        stacklevel=1,
    )
    pytest.skip(
        "NO CHROMIUM: nothing of the page is tested. On Debian: apt-get install chromium",
        allow_module_level=True,
    )
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
WIDE, PHONE, NARROWEST = (
    {"width": 1280, "height": 800},
    {"width": 390, "height": 844},
    {"width": 360, "height": 640},
)
PATIENCE = 30_000  # ms; a machine that others use too has stood still for ten seconds, and waiting costs nothing where all is well
WATCH = "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`))"
expect.set_options(timeout=PATIENCE)


def in_memory() -> str | None:
    """A folder for the browser's profile and shared memory. On a disk that others keep busy, pages were seen to stand still for a minute; the small
    /dev/shm of containers does not do, though."""
    return (
        "/dev/shm"
        if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30
        else None
    )


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(dir=in_memory(), ignore_cleanup_errors=True) as folder:
        with mock.patch.dict(os.environ, TMPDIR=folder):
            driver = (
                sync_playwright().start()
            )  # of the module, not the session: while it runs, no other test could use asyncio.run
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
    """Opens pages and remembers what each of them did wrong."""

    def __init__(self, browser):
        self.browser, self.contexts, self.pages, self.wrong = browser, [], [], []

    def context(self, size=WIDE, **options):
        self.contexts.append(self.browser.new_context(viewport=size, **options))
        self.contexts[-1].set_default_timeout(PATIENCE)
        self.contexts[-1].add_init_script(WATCH)
        return self.contexts[-1]

    def open(self, url: str, context=None, ready: bool = True, **options) -> Page:
        page = (context or self.context(**options)).new_page()
        self.pages.append(page)
        page.on("pageerror", lambda e: self.wrong.append(f"error of the page: {e}"))
        page.on(
            "console",
            lambda m: (
                self.wrong.append(f"console: {m.text}")
                if m.type == "error" and "Failed to load resource" not in m.text
                else None
            ),
        )
        page.on(
            "request",
            lambda r: (
                self.wrong.append(f"request to {r.url}")
                if not r.url.startswith((url, "data:", "blob:"))
                else None
            ),
        )
        page.goto(url)
        if ready:
            expect(page.locator("#dot")).to_have_class("dot ready")
        return page

    def close(self) -> list[str]:
        found = self.wrong + [
            f"CSP: {v}"
            for p in self.pages
            if not p.is_closed()
            for v in p.evaluate("window.violations")
        ]
        for c in self.contexts:
            c.close()
        return found


@pytest.fixture
def tabs(browser):
    t = Tabs(browser)
    yield t
    found = t.close()
    assert not found, found  # pytest rewrites the asserts of test files only


@pytest.fixture
def page(tabs, server) -> Page:
    return tabs.open(server.url)


def send(page: Page, text: str, wait: bool = True):
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")
    if wait:
        done(page)


def done(page: Page):
    expect(page.locator(".msg.model").last).to_have_attribute("aria-busy", "false")
    expect(page.locator("#send")).to_be_visible()


def reply(page: Page):
    return page.locator(".msg.model").last


def stored(page: Page) -> list[dict]:
    return page.evaluate(
        "Object.keys(localStorage).filter(k => k.startsWith('lamoe:c:')).map(k => JSON.parse(localStorage[k]))"
    )
