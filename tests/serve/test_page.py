"""The page in Debian's Chromium; skipped where that is not installed (apt-get install chromium chromium-driver)."""

import shutil

import pytest
from servers import running_server, served, server  # noqa: F401 # fixtures

from regrad_qdrant.serve.service import Keys

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None, reason="Chromium is not installed"
)
QUESTION = "What is the job of Ida Corvand?"


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(switch)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.implicitly_wait(20)
    yield browser
    browser.quit()


def ask(browser, url, question=QUESTION, models=("regrad", "regrad/grounded", "direct"), key=None):
    browser.get(url)
    if key is not None:
        field = browser.find_element("id", "key")
        field.send_keys(key + "\t")
    if models:
        browser.find_element("css selector", "#models input")
    for box in browser.find_elements("css selector", "#models input") if models else ():
        if box.is_selected() != (box.get_attribute("value") in models):
            box.click()
    browser.find_element("id", "question").send_keys(question)
    browser.find_element("id", "ask").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: browser.find_element("id", "ask").is_enabled())
    return browser.find_elements("css selector", "#answers article")


def test_modes_stand_side_by_side_with_their_documents(browser, server):
    cards = ask(browser, server.url)
    assert [card.find_element("css selector", "h2").text for card in cards] == ["regrad", "regrad/grounded", "direct"]
    own = server.regrad.answer(QUESTION).text
    assert cards[0].find_element("css selector", ".answer").get_attribute("textContent") == own
    assert "tokens in the prompt" in cards[0].find_element("css selector", ".facts").text
    documents = cards[0].find_elements("css selector", "summary")
    assert documents[0].text.startswith("d0") and "weight" in documents[0].text
    assert not cards[2].find_elements("css selector", "details") or "weight" not in cards[2].text


def test_a_grounded_answer_is_marked_in_its_text(browser, server):
    [card] = ask(browser, server.url, models=("regrad/grounded",))
    answer = card.find_element("css selector", ".answer").get_attribute("textContent")
    assert card.find_element("css selector", "mark").text == answer != ""


def test_what_goes_wrong_is_shown(browser, server):
    [card] = ask(browser, server.url, question="x " * 5000, models=("direct",))
    assert "model's context" in card.find_element("css selector", ".error").text


def test_a_key_is_asked_for_and_used(browser, served):
    with running_server(served, keys=Keys("secret")) as running:
        assert ask(browser, running.url, models=()) == []
        [card] = ask(browser, running.url, models=("regrad",), key="secret")
        assert not card.find_elements("css selector", ".error")


def test_nothing_is_fetched_from_elsewhere_and_nothing_goes_wrong(browser, server):
    browser.get_log("browser")  # of the tests before
    ask(browser, server.url)
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert fetched and all(name.startswith(server.url) for name in fetched)
    assert browser.get_log("browser") == []
