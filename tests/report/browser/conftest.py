"""A headless Chromium that opens pages from disk. Without it these tests are skipped: `make pages`
installs what drives it, and Debian's packages chromium and chromium-driver are the browser."""

import shutil
import sys
from pathlib import Path

import pytest

for folder in ("replay", "report/compare"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_WAIT_S = 60


class Browser:
    """One window; `open` returns when the page says that it is drawn."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page, *, ready):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver.get(page.resolve().as_uri())
        mark = f"return document.documentElement.dataset.{ready}"
        return WebDriverWait(self.driver, _WAIT_S).until(lambda d: d.execute_script(mark))

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def press(self, keys):
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.TAG_NAME, "body").send_keys(keys)

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def text(self, selector):
        return self.run("document.querySelector(arguments[0]).textContent", selector)

    @property
    def complaints(self):
        """What the console has said since it was last asked."""
        return self.driver.get_log("browser")


@pytest.fixture(scope="session")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: `make pages`")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs a Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Without its own sandbox, which a container does not allow; the pages are ours.
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The window, without what an earlier page has logged."""
    _ = chromium.complaints
    yield chromium
    assert chromium.complaints == []
