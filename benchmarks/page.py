"""docs/serving.png: the server's page, with the default initialization over invented biographies.

Needs Chromium (apt-get install chromium chromium-driver).
python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.support.ui import WebDriverWait

from regrad_loaders.data.facts import generate
from regrad_qdrant import GradientBank, MetaInitialization, ReGrad, load_base_model
from regrad_qdrant.bank.ingest import add_corpus, attach_atoms
from regrad_qdrant.serve.app import make_app, served
from regrad_qdrant.serve.engine import Engine
from regrad_qdrant.serve.metrics import Metrics
from regrad_qdrant.serve.service import Keys, Service

PEOPLE = 40
MODELS = ("regrad", "regrad/grounded", "direct")


def shoot(url: str, question: str, out: Path) -> None:
    """Ask on the page, wait for all answers, and keep what it looks like."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,820"):
        options.add_argument(switch)
    browser = webdriver.Chrome(options=options, service=Driver(shutil.which("chromedriver")))
    try:
        browser.implicitly_wait(10)
        browser.get(url)
        browser.find_element("css selector", "#models input")
        browser.find_element("id", "question").send_keys(question)
        browser.find_element("id", "ask").click()
        WebDriverWait(browser, 120).until(lambda _: browser.find_element("id", "ask").is_enabled())
        for summary in browser.find_elements("css selector", "article:first-child summary")[:1]:
            summary.click()
        browser.save_screenshot(str(out))
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="smollm2-135m-instruct")
    parser.add_argument("--question", type=int, default=0, help="which of the invented world's")
    parser.add_argument("--out", type=Path, default=Path("docs/serving.png"))
    arguments = parser.parse_args()
    initialization = MetaInitialization.load(arguments.init)
    model, tokenizer = load_base_model(initialization.base.name)
    world = generate("demo", PEOPLE, 1)
    with tempfile.TemporaryDirectory() as folder, GradientBank.open(folder, "docs", initialization.fingerprint) as bank:
        regrad = ReGrad(model, tokenizer, bank, initialization, check_model=False)
        add_corpus(bank, world.passages, regrad.gradients)
        attach_atoms(bank, regrad.gradients, "sign")
        app = make_app(Service(regrad, None, Engine(), Keys(), deadline=120), Metrics())
        with served(app) as url:
            shoot(url, world.questions[arguments.question].question, arguments.out)


if __name__ == "__main__":
    main()
