"""The page in headless Chromium, served from this machine alone."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from helpers.examples import CASES, EXAMPLES, prompt_and_answer, run, words

# A WebGPU adapter that computes on the CPU, where Chromium brings it.
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
# With more than 32 rows, prefix and all, onnxruntime-web's attention computes in subgroups, and is
# wrong on an adapter whose subgroups have four lanes, as the software one's have.
FEW_ROWS = "p8-short-prefix"


class Handler(SimpleHTTPRequestHandler):
    """The examples' folder, and exports beside what is in there."""

    def __init__(self, *arguments, exports: dict[str, Path], **more):
        self.exports = exports
        super().__init__(*arguments, directory=str(EXAMPLES), **more)

    def translate_path(self, path: str) -> str:
        name, _, file = path.strip("/").partition("/")
        if name in self.exports:
            return str(self.exports[name] / file)
        return super().translate_path(path)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def address(export) -> Iterator[str]:
    """Where the examples are served, and each case's export under its name."""
    exports = {case: export(case, kv_layout="batch") for case in CASES}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, exports=exports))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def submissions() -> dict[str, dict[str, str]]:
    """What to fill into the page's form, one after the other; a field stays as it was."""
    forms = {}
    for case in CASES:
        prompt, _ = prompt_and_answer(case)
        ids = ",".join(map(str, prompt))
        wasm = {"model": f"../{case}", "device": "wasm", "max-tokens": "12"}
        forms[f"{case} ids"] = wasm | {"tokens": ids}
        forms[f"{case} text"] = {"prompt": words(prompt), "tokens": ""}
        if case == FEW_ROWS:
            forms["webgpu"] = {"device": "webgpu", "tokens": ids, "max-tokens": "4"}
    forms["nothing there"] = {"model": "../nothing", "device": "wasm", "tokens": "1,2"}
    forms["not ids"] = {"model": f"../{CASES[0]}", "tokens": "1,x"}
    return forms


@pytest.fixture(scope="module")
def page(node, address) -> dict:
    """The status and the answer after each submission, all requests, and the console's errors."""
    names = ("chromium", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    script, forms = Path(__file__).with_name("use_page.mjs"), submissions()
    url = f"{address}browser/index.html"
    values = json.dumps(list(forms.values()))
    page = json.loads(run(node, script, chromium, url, values, *SOFTWARE_GPU))
    return page | {"results": dict(zip(forms, page["results"], strict=True))}


@pytest.mark.parametrize("case", CASES)
def test_webassembly(page, case):
    _, answer = prompt_and_answer(case)
    by_ids, by_text = page["results"][f"{case} ids"], page["results"][f"{case} text"]
    assert json.loads(by_ids["answer"]) == answer
    assert by_text["answer"] == words(answer)
    assert by_text["status"].startswith("12 tokens in") and "on wasm" in by_text["status"]


def test_webgpu(page):
    result = page["results"]["webgpu"]
    if not page["adapter"]:
        assert result["status"] == "Error: this browser has no WebGPU adapter"
        pytest.skip("this Chromium has no WebGPU adapter")
    _, answer = prompt_and_answer(FEW_ROWS)
    assert json.loads(result["answer"]) == answer[:4]
    assert "on webgpu" in result["status"]


def test_all_comes_from_the_page_s_own_server(page, address):
    assert len(page["requests"]) > 10
    assert all(url.startswith((address, "blob:", "data:")) for url in page["requests"])


def test_it_says_what_is_wrong(page):
    missing = page["results"]["nothing there"]["status"]
    assert missing.startswith("Error: ../nothing/config.json: 404")
    assert page["results"]["not ids"]["status"].startswith("Error: ")
    # Chromium itself notes the 404s; nothing else went wrong unseen.
    assert all("404" in complaint for complaint in page["complaints"])
