"""The Space in headless Chromium: both pages clicked through, wide and on a phone.

The pictures in docs/images are made by

    SPACE_SCREENSHOTS=docs/images python -m pytest -m soak tests/examples/test_space_browser.py
"""

import os
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
WIDE, PHONE = (1400, 1000), (400, 850)
# Of a job, on a machine that is busy with others.
LONGEST = 400


@pytest.fixture(scope="module")
def browser():
    """Return a browser without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


class Page:
    """A page of the app in a browser of some width."""

    def __init__(self, browser, url, size=WIDE):
        self.browser, self.url = browser, url
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)
        self.wait(lambda: self.all("button.primary"))

    def all(self, selector):
        return [element for element in self.browser.find_elements("css selector", selector) if element.is_displayed()]

    def click(self, text):
        """Click what bears a text: a button, a link or a tick."""
        path = f"//button[contains(., '{text}')] | //a[contains(., '{text}')] | //label[contains(., '{text}')]"
        found = self.wait(lambda: self.browser.find_elements("xpath", path))
        self.browser.execute_script("arguments[0].click()", found[0])

    def type(self, selector, text):
        from selenium.webdriver.common.keys import Keys

        (field,) = self.all(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.BACKSPACE)
        field.send_keys(Keys.TAB)

    def wait(self, condition, seconds=LONGEST):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        # Gradio replaces what it draws anew.
        stale = [StaleElementReferenceException]
        waiting = WebDriverWait(self.browser, seconds, poll_frequency=0.3, ignored_exceptions=stale)
        return waiting.until(lambda browser: condition())

    def text(self, selector, part, seconds=LONGEST):
        """Return the text of an element when it has a part."""
        return self.wait(lambda: next((e.text for e in self.all(selector) if part in e.text), None), seconds)

    def message(self):
        """Return the message that stands on top of the page, and close it."""
        text = self.text(".toast-body", "")
        self.all(".toast-close")[0].click()
        self.wait(lambda: not self.all(".toast-body"))
        return text

    def overflow(self):
        """Return by how many pixels the page is wider than the window."""
        return self.browser.execute_script(
            "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
        )

    def foreign(self):
        """Return what was fetched from elsewhere."""
        names = self.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        origin = self.browser.execute_script("return location.origin")
        return [name for name in names if not name.startswith((origin, "data:", "blob:"))]

    def picture(self, path):
        """Save what the window shows; the pages of docs/ show two of them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.browser.execute_script("window.scrollTo(0, 0)")
        self.browser.save_screenshot(str(path))
        assert path.stat().st_size < 200_000


@pytest.fixture
def folder(tmp_path):
    return Path(os.environ.get("SPACE_SCREENSHOTS") or tmp_path)


def draw(page):
    page.click("Draw")
    page.wait(lambda: "Drawn by" not in page.all("#status")[0].text)
    page.text("#status", "Drawn by")
    return page.all(".drawn")


def test_pictures_page(browser, space_url, folder):
    page = Page(browser, space_url)
    columns = draw(page)
    names = [column.find_element("css selector", "h3").text for column in columns]
    assert names == [
        "CFG (stock)", "Adaptive Guidance", "APG", "Golden noise", "One More Step", "All ticked, together",
    ]  # fmt: skip
    assert "40 evaluations per picture" in columns[0].text and "saved; stopped at" in columns[1].text
    for image in page.all(".pixels img"):
        assert image.value_of_css_property("image-rendering") == "pixelated"
        assert int(image.get_property("naturalWidth")) >= 200 and image.size["width"] >= 230
    # Side by side: the first three stand in one row.
    assert len({column.location["y"] for column in columns[:3]}) == 1
    assert page.overflow() <= 0 and page.foreign() == []
    page.picture(folder / "space_pictures.png")
    page.click("Python that draws the same")
    page.wait(lambda: any("hfnoise.AdaptiveGuidance(threshold=0.99" in code.text for code in page.all(".cm-content")))
    page.click("APG")
    page.type("#prompt textarea, #prompt input", "a photo of the digit two")
    assert len(draw(page)) == 5


def test_messages(browser, space_url):
    page = Page(browser, space_url)
    page.type("#prompt textarea, #prompt input", "")
    page.click("Draw")
    assert "The prompt is empty: type one." in page.message()
    page.type("#prompt textarea, #prompt input", "two")
    page.type("#seed input", "")
    page.click("Draw")
    assert "The seed must be a whole number from 0" in page.message()
    page.type("#seed input", "3")
    page.type("#model input", "nobody/nothing")
    page.click("Draw")
    assert "'nobody/nothing' cannot be loaded" in page.message()


def test_labels_page(browser, space_url, folder):
    page = Page(browser, space_url)
    page.click("Label noise")
    page.wait(lambda: page.all("#find"))
    page.click("Find flipped labels")
    verdict = page.text("#verdict", "Flipped here:")
    assert "Estimated flip rate:" in verdict and "95 % interval" in verdict
    assert "Of the 50 most suspect labels" in verdict
    (picture,) = page.wait(lambda: page.all("#margins img"))
    page.wait(lambda: int(picture.get_property("naturalWidth")) > 600)
    assert "yes" in page.all("#suspects")[0].text
    assert page.overflow() <= 0 and page.foreign() == []
    page.picture(folder / "space_labels.png")


def test_on_a_phone(browser, space_url, tmp_path):
    page = Page(browser, space_url, PHONE)
    assert page.overflow() <= 0
    columns = draw(page)
    assert len({column.location["x"] for column in columns}) == 1
    assert page.overflow() <= 0
    page.browser.execute_script("arguments[0].scrollIntoView()", page.all("#status")[0])
    page.browser.save_screenshot(str(tmp_path / "phone.png"))
    page = Page(browser, f"{space_url}/labels", PHONE)
    page.type("#pairs input[type=number]", "50")
    page.click("Find flipped labels")
    verdict = page.text("#verdict", "Flipped here:")
    assert "not estimated" in verdict and "50 pairs are too few" in verdict
    assert page.overflow() <= 0
    page.browser.execute_script("arguments[0].scrollIntoView()", page.all("#verdict")[0])
    page.browser.save_screenshot(str(tmp_path / "phone_labels.png"))
