"""Opens pages in headless Chromium, from Debian's package, and records what they ask for and complain of."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REQUIRED = "VOXQUILT_NEEDS_CHROMIUM"
"""The environment variable that makes a missing browser a failure, as in CI."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Names of the browser: Debian's, Ubuntu's, and Google's."""
# Software rendering, the same on every machine; and no name is resolved, since Chromium itself asks for updates.
_FLAGS = [
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped, or fails if the environment says so, where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)("there is no chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api") if not os.environ.get(REQUIRED) else None
    if playwright is None:
        from playwright import sync_api as playwright
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page, the addresses that it asked for, and its complaints.

    Args:
        browser: See `chromium`.
        allowed: What addresses begin with; requests for others are aborted.
        scheme: 'light' or 'dark'.
        size: Width and height of the window.
    """

    def __init__(
        self, browser: Any, allowed: str, *, scheme: str = "light", size: tuple[int, int] = (1280, 900)
    ) -> None:
        self._context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, device_scale_factor=1, color_scheme=scheme
        )
        self.page = self._context.new_page()
        self.asked: list[str] = []
        self.foreign: list[str] = []
        self.complaints: list[str] = []
        self._allowed = allowed
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.route("**/*", self._decide)

    def _decide(self, route: Any) -> None:
        address = route.request.url
        self.asked.append(address)
        if address.startswith((self._allowed, "data:")):
            route.continue_()
        else:
            self.foreign.append(address)
            route.abort()

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def wait(self) -> None:
        """Wait for the viewer. Not by a function, which the page's policy would not let run."""
        self.page.locator("body[data-ready],body[data-error]").wait_for(state="attached", timeout=60_000)
