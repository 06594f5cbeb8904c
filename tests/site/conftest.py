"""The built book, a server for it on this machine and a browser to look at it."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

from tests.examples import thorough
from tools import pdf

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
CHAPTERS = sorted(f"{page}.html" for page in parse_toc_yaml(ROOT / "_toc.yml"))
# _static holds templates of the theme beside what pages load.
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)

on_screens = pytest.mark.parametrize(
    ("width", "colours"),
    [(320, "dark"), (1280, "light"), *thorough((320, "light"), (390, "light"), (390, "dark"), (1280, "dark"))],
)
"""For tests of a figure in its page."""


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    if not (SITE / "index.html").is_file():
        pytest.fail("the book is not built: run make book first")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def origin() -> Iterator[str]:
    """Where the built book is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = pdf.browser()
    if found is None:
        install = "apt install chromium-headless-shell"
        missing = f"no Chromium is installed, so nobody looks at the pages (Debian: {install})"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=pdf.FLAGS)
        yield browser
        browser.close()
