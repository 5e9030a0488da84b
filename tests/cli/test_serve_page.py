"""The page at / in headless Chromium: a chat, its tokens' streams, the switch of P."""

import shutil
import time

from parscale_mlx.engine.batch import Batch

import pytest
from helpers.serving import CHAT, Reference, chat, post, serving

pytest.importorskip("selenium", reason="driving Chromium needs selenium")
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-default-apps --disable-extensions --window-size=1000,800"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=ChromeService(driver)) as browser:
        yield browser


class Page:
    def __init__(self, browser, server):
        self.browser = browser
        browser.get(server.url)
        self.wait(lambda: len(self.all("#streams input")) > 0)

    def wait(self, condition):
        return WebDriverWait(self.browser, 30).until(lambda _: condition())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        (element,) = self.all(selector)
        return element

    def ask(self, text: str, tokens: int):
        """Ask, and wait for the answer."""
        self.browser.execute_script(f"document.getElementById('limit').value = {tokens}")
        self.one("#text").send_keys(text)
        self.one("#send").click()
        return self.answer(len(self.all(".answer")))

    def answer(self, number: int):
        self.wait(lambda: len(self.all(".answer")) >= number and self.all(".again"))
        return self.all(".answer")[-1]

    def requests(self) -> list[str]:
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return self.browser.execute_script(script)


def spans(answer):
    return answer.find_elements(By.CSS_SELECTOR, ".token")


def test_a_chat(browser, opened):
    reference = Reference(*opened)
    with serving(opened) as server:
        page = Page(browser, server)
        assert [i.get_attribute("value") for i in page.all("#streams input")] == [
            "tiny:p1",
            "tiny:p2",
            "tiny:p4",
        ]
        assert page.one("#streams input:checked").get_attribute("value") == "tiny:p4"
        assert "capital" in page.one("#first").text
        answer = page.ask("Hi", 8)
        assert answer.find_element(By.CSS_SELECTOR, ".text").text == reference.chat("Hi", 8, 4)
        assert "8 tokens" in answer.text and "cut at the limit" in answer.text

        # Each token has the tint of the stream with the largest weight, and its weights on hover.
        again = post(server, CHAT, chat("Hi", stream_weights=True)).json()
        tokens = [token["id"] for token in again["choices"][0]["parscale_streams"]]
        weights = reference.weights(reference.ids("Hi"), tokens, 4)
        largest = [row.index(max(row)) + 1 for row in weights]
        assert [int(span.get_attribute("data-stream")) for span in spans(answer)] == largest
        backgrounds = {span.value_of_css_property("background-color") for span in spans(answer)}
        assert len(backgrounds) > 1 and len(page.all("#key span")) == 4
        ActionChains(browser).move_to_element(spans(answer)[2]).perform()
        page.wait(lambda: page.one("#tip").is_displayed())
        shown = page.one("#tip").text.splitlines()
        assert [line for line in shown if line.endswith("%")] == [
            f"{100 * weight:.1f} %" for weight in weights[2]
        ]

        # The switch: the same question with two streams, then with one, which has no tints.
        for streams in (2, 1):
            page.one(f"#streams input[value='tiny:p{streams}']").click()
            page.one(".again").click()
            answer = page.answer(4 - streams)
            text = answer.find_element(By.CSS_SELECTOR, ".text").text
            assert text == reference.chat("Hi", 8, streams)
            assert all(
                (span.get_attribute("data-stream") is None) == (streams == 1)
                for span in spans(answer)
            )
        answer = page.ask("More", 5)
        history = f"<|user|>Hi\n<|assistant|>{text}\n<|user|>More\n<|assistant|>"
        prompt = reference.tokenizer.encode(history, add_special_tokens=False)
        assert answer.find_element(By.CSS_SELECTOR, ".text").text == reference.text(prompt, 5, 1)
        assert all(name.startswith(server.url) for name in page.requests())
        page.one("#new").click()
        assert not page.all(".turn")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_cannot_be_answered_is_said(browser, opened):
    with serving(opened, max_tokens=10) as server:
        page = Page(browser, server)
        answer = page.ask("Hi", 11)
        assert "max_tokens must be a whole number from 1 to 10" in answer.text
        # The page takes text as text.
        page.ask("<img src=x onerror=alert(1)>", 5)
        assert page.all(".user .text")[-1].text == "<img src=x onerror=alert(1)>"
    browser.get_log("browser")


def test_a_long_answer_can_be_stopped(browser, opened, monkeypatch):
    with serving(opened) as server:
        step = Batch.step
        monkeypatch.setattr(Batch, "step", lambda self: (time.sleep(0.02), step(self))[1])
        page = Page(browser, server)
        browser.execute_script("document.getElementById('limit').value = 450")
        page.one("#text").send_keys("long")
        page.one("#send").click()
        page.wait(lambda: page.all(".token"))
        assert page.one("#send").text == "Stop"
        page.one("#send").click()
        assert "stopped" in page.answer(1).text
        page.wait(lambda: not server.serving.busy)


def test_a_server_with_a_key(browser, opened):
    with serving(opened, api_key="s3cret") as server:
        browser.get(server.url)
        script = "return document.getElementById('model').textContent"
        wait = WebDriverWait(browser, 30)
        wait.until(lambda b: "API key" in b.execute_script(script))
        browser.execute_script(
            "const key = document.getElementById('secret'); key.value = 's3cret';"
            "key.dispatchEvent(new Event('change'))"
        )
        wait.until(lambda b: b.execute_script(script) == "tiny")
        browser.execute_script("sessionStorage.clear()")
