"""Every page of the site in a browser: nothing missing, nothing on the console, nothing wider than a phone."""

import importlib.util
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.test_docs_site import needs_mkdocs, site

__all__ = ["site"]  # the fixture

pytestmark = [
    needs_mkdocs,
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("selenium") is None or shutil.which("chromedriver") is None,
        reason="selenium, chromium and chromedriver are not installed",
    ),
]
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
ELSEWHERE = (
    "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
)


class Handler(SimpleHTTPRequestHandler):
    """Keeps what was asked for and is not there."""

    missing: list[str] = []

    def send_error(self, code, message=None, explain=None):
        self.missing.append(f"{code} {self.path}")
        super().send_error(code, message, explain)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):  # noqa: F811  (the fixture)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_every_page_in_a_browser(site, address, browser):  # noqa: F811
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 40
    for page in pages:
        browser.get(f"{address}/{page}")
        assert browser.find_element("css selector", "h1").text.strip("¶ \n"), page
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE["width"], page
        assert not browser.execute_script(ELSEWHERE), page
        broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert not browser.execute_script(broken), page
        said = [entry["message"] for entry in browser.get_log("browser")]
        assert not said, f"{page}: {said}"
    assert not Handler.missing


def test_search_and_dark_mode(address, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**PHONE, "width": 1400, "height": 1000, "mobile": False}
    )
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    browser.get(f"{address}/index.html")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    assert browser.find_element("tag name", "body").get_attribute("data-md-color-scheme") == "slate"
    browser.find_element("css selector", "input.md-search__input").send_keys("flip_rate")
    WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", ".md-search-result__link"))
